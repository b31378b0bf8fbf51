"""`EffectiveRank` as torchmetrics' own tests take a metric: batches, forward, pickles, merging, devices, two processes."""

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk

if os.environ.get("SPECTRAL_KERNELS_PEERS") != "require":
    pytest.importorskip("torchmetrics")
from torchmetrics import MetricCollection

from spectral_kernels.integrations.torchmetrics import EffectiveRank

D, SIZES = 12, (7, 16, 1, 33, 20, 9)
ORDERS = (0, 0.5, 1, 2, math.inf)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def batches(dtype: torch.dtype = torch.float32, rank: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    scale = torch.arange(1, D + 1) ** -1.0
    return [(torch.randn(size, D, generator=generator) * scale + 0.5).to(dtype) for size in SIZES]


def options() -> list[dict[str, Any]]:
    return [
        {"order": order, "center": c, "normalize": n} for order in ORDERS for c in (False, True) for n in (False, True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", options(), ids=str)
def test_is_that_of_all_rows(option: dict[str, Any], dtype: torch.dtype) -> None:
    """The value of a batch by `forward`, of all by `compute`, before and after a pickle, and anew after `reset`."""
    metric = pickle.loads(pickle.dumps(EffectiveRank(D, **option)))
    rows = batches(dtype)
    for _ in range(2):
        for i, z in enumerate(rows):
            if i % 2:
                metric.update(z)
            else:
                torch.testing.assert_close(metric(z), sk.effective_rank(z, **option), rtol=2e-4, atol=1e-6)
            metric = pickle.loads(pickle.dumps(metric))
        whole = torch.cat(rows)
        expected = sk.effective_rank(whole, **option)
        torch.testing.assert_close(metric.compute(), expected, rtol=2e-5 if dtype != torch.float64 else 1e-9, atol=0)
        assert metric.count == len(whole)
        metric.reset()
        assert metric.count == 0 and not metric.second.any()


def test_merges() -> None:
    parts = [EffectiveRank(D, order=2, center=True) for _ in range(2)]
    for metric, z in zip(parts, (batches()[3], batches()[4] + 1), strict=True):
        metric.update(z)
    parts[0].merge_state(parts[1])
    expected = sk.effective_rank(torch.cat((batches()[3], batches()[4] + 1)), order=2, center=True)
    torch.testing.assert_close(parts[0].compute(), expected, rtol=1e-5, atol=0)


def test_state_dict_clone_and_collection() -> None:
    metric = EffectiveRank(D, order=2)
    metric.persistent(True)
    metric.update(batches()[3])
    other = EffectiveRank(D, order=2)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(batches()[4])
    both = sk.effective_rank(torch.cat(batches()[3:5]), order=2)
    torch.testing.assert_close(other.compute(), both, rtol=1e-5, atol=0)
    # metrics of one state share it in a collection, and differ in what they make of it
    found = MetricCollection({f"R{order}": EffectiveRank(D, order=order) for order in (1, 2)})
    for z in batches():
        found.update(z)
    for name, value in found.compute().items():
        expected = sk.effective_rank(torch.cat(batches()), order=float(name[1:]))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert metric.clone().compute() == metric.compute()


def test_dtype_moves_lose_no_rows() -> None:
    metric = EffectiveRank(D).set_dtype(torch.float16).half().to("cpu")
    for _ in range(300):
        metric.update(batches()[3])
    assert metric.count == 300 * 33 and metric.second.dtype == torch.float64
    torch.testing.assert_close(metric.compute(), sk.effective_rank(batches()[3]), rtol=1e-5, atol=0)


def test_rows_without_spread() -> None:
    metric = EffectiveRank(D, center=True)
    metric.update(torch.ones(5, D))
    assert metric.compute() == 0
    metric = EffectiveRank(D)
    metric.update(torch.zeros(5, D))
    assert metric.compute() == 0
    raw = EffectiveRank(D, normalize=False, order=2)
    raw.update(batches()[3] * 1e-37)
    torch.testing.assert_close(
        raw.compute(), sk.effective_rank(batches()[3], normalize=False, order=2), rtol=1e-5, atol=0
    )


def test_bad_rows() -> None:
    metric = EffectiveRank(D)
    bad = batches()[3]
    bad[4, 2] = torch.nan
    for z, message in (
        (bad, "z row 4 holds NaN or Inf"),
        (bad[:, 1:], "z has d = 11, but num_features is 12"),
        (bad[0], "z must have 2 dimensions"),
        (bad.long(), "z must be float64"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(z)
    assert metric.count == 0
    with pytest.raises(ValueError, match="whose squares leave float64"):
        EffectiveRank(D, normalize=False).update(batches(torch.float64)[3] * 1e-200)
    with pytest.raises(ValueError, match="order must be"):
        EffectiveRank(D, order=-1)


def process(rank: int, folder: str) -> None:
    """One of two processes: every option, ranks with other numbers of rows, synchronised in `compute` and in `forward`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own, other = ([*batches(rank=r)][r:] for r in (rank, 1 - rank))
    for option in options():
        metric = pickle.loads(pickle.dumps(EffectiveRank(D, **option)))
        for z in own:
            metric.update(z)
        expected = sk.effective_rank(torch.cat(own + other), **option)
        torch.testing.assert_close(metric.compute(), expected, rtol=2e-5, atol=0)
        assert metric.count == sum(map(len, own)), "after compute a process has its own sums again"
    metric = EffectiveRank(D, dist_sync_on_step=True)
    both = torch.cat((own[-1], other[-1]))
    torch.testing.assert_close(metric(own[-1]), sk.effective_rank(both), rtol=2e-5, atol=0)
    Path(folder, f"done{rank}").touch()
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
