"""Other packages as judges: the cases of lightly's and pytorch-metric-learning's NT-Xent tests and of vendi-score's README.

`make check-peers` runs them where the packages are, and requires them; elsewhere they are left out.
"""

import importlib
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk


def judge(module: str) -> Any:
    if os.environ.get("SPECTRAL_KERNELS_PEERS") == "require":
        return importlib.import_module(module)
    return pytest.importorskip(module, exc_type=ImportError)


@pytest.fixture
def lightly(request: pytest.FixtureRequest) -> Any:
    judge("lightly")
    request.getfixturevalue("torchvision")  # which it imports
    return judge("lightly.loss").NTXentLoss


@pytest.fixture
def metric_learning() -> Any:
    return judge("pytorch_metric_learning.losses").NTXentLoss


@pytest.fixture
def vendi() -> Any:
    return judge("vendi_score.vendi")


def views(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def gradients(loss: Any, *inputs: Tensor) -> tuple[float, tuple[Tensor, ...]]:
    leaves = [one.clone().requires_grad_() for one in inputs]
    value = loss(*leaves)
    return float(value.detach()), torch.autograd.grad(value, leaves)


def assert_agree(ours: Any, theirs: Any, *inputs: Tensor) -> None:
    """Value and gradients."""
    (mine, my_gradients), (right, right_gradients) = gradients(ours, *inputs), gradients(theirs, *inputs)
    assert mine == pytest.approx(right, rel=1e-5, abs=1e-5)
    for got, expected in zip(my_gradients, right_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [2, 4, 19])
@pytest.mark.parametrize("d", [1, 2, 16, 64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_nt_xent_by_lightly(lightly: Any, n: int, d: int, temperature: float) -> None:
    first, second = views(n, d)
    ours = sk.NTXentLoss(temperature=temperature)
    assert_agree(ours, lightly(temperature=temperature), first, second)
    assert float(ours(first, second)) == pytest.approx(float(ours(second, first)), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 8, 16])
@pytest.mark.parametrize("size", [1, 2, 8, 15, 16, 17])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_queue_by_lightlys_memory_bank(lightly: Any, n: int, size: int, temperature: float) -> None:
    query, key = views(n, 5, size)
    theirs = lightly(temperature=temperature, memory_bank_size=(size, 5))
    queue = theirs.memory_bank.bank.clone().reshape(size, 5)
    assert float(sk.info_nce(query, key, queue=queue, temperature=temperature)) == pytest.approx(
        float(theirs(query, key)), rel=1e-5, abs=1e-6
    )


def coordinates(*degrees: float, dtype: torch.dtype = torch.float32) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
def test_nt_xent_by_metric_learning(metric_learning: Any, dtype: torch.dtype, temperature: float) -> None:
    theirs, labels = metric_learning(temperature=temperature), torch.arange(3).repeat(2)
    for first, second in (
        (coordinates(0, 20, 60, dtype=dtype), coordinates(10, 50, 80, dtype=dtype)),
        (coordinates(0, 40, 80, dtype=dtype), coordinates(0, 40, 80, dtype=dtype)),
        (coordinates(0, 0, 0, dtype=dtype), coordinates(0, 180, 90, dtype=dtype)),
    ):
        mine = float(sk.nt_xent(first, second, temperature=temperature))
        right = float(theirs(torch.cat([first, second]).double(), labels))
        assert mine == pytest.approx(right, rel=1e-2 if dtype == torch.float16 else 1e-5, abs=1e-5)
        if dtype == torch.float64:
            assert_agree(
                lambda a, b: sk.nt_xent(a, b, temperature=temperature),
                lambda a, b: theirs(torch.cat([a, b]), labels),
                first,
                second,
            )


def test_info_nce_by_metric_learning(metric_learning: Any) -> None:
    """Keys as its reference embeddings; with the very same labels it would take both for one set."""
    query, key = (view.double() for view in views(12, 6))
    labels = torch.arange(12)
    assert_agree(
        lambda a: sk.info_nce(a, key, temperature=0.1),
        lambda a: metric_learning(temperature=0.1)(a, labels, ref_emb=key, ref_labels=labels.clone()),
        query,
    )


def test_no_negatives(lightly: Any, metric_learning: Any) -> None:
    """One pair alone teaches nothing: to them a loss of 0, refused here."""
    first, second = coordinates(0), coordinates(20)
    assert float(lightly(temperature=0.1)(first, second)) == 0
    assert float(metric_learning(temperature=0.1)(torch.cat([first, second]), torch.zeros(2, dtype=torch.long))) == 0
    with pytest.raises(ValueError, match="z0 has 1 row: there is no negative"):
        sk.nt_xent(first, second, temperature=0.1)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("shape", [(2, 3), (50, 8), (8, 50), (300, 32)])
def test_effective_rank_by_vendi_score(vendi: Any, shape: tuple[int, int], order: float) -> None:
    z = views(*shape)[0] * torch.arange(1, shape[1] + 1) ** -0.5
    right = vendi.score_dual(z.double().numpy(), q="inf" if order == math.inf else order)
    # what it finds below 0 and what is above by rounding counts for low orders
    rel = 1e-3 if order < 1 else 1e-5
    assert float(sk.effective_rank(z, order=order)) == pytest.approx(float(right), rel=rel)


def test_vendi_score_of_repeated_rows(vendi: Any) -> None:
    z = torch.eye(10)[torch.arange(60) % 3]
    for order in (1.0, 2.0):
        right = float(vendi.score_dual(z.numpy(), q=order))
        assert right == pytest.approx(3, rel=1e-6)
        assert float(sk.effective_rank(z, order=order)) == pytest.approx(right, rel=1e-6)
