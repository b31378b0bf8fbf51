"""Batch samplers under the trainers of others, in two processes: every row is trained on, none twice, and the bank follows.

`make check-integrations` runs them where the packages are, and requires them; elsewhere they are left out.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from integrations.programs import BATCH, N, Numbers

PROGRAMS = Path(__file__).with_name("programs.py")
for name in ("accelerate", "lightning", "sentence_transformers", "torchdata", "transformers"):
    if os.environ.get("SPECTRAL_KERNELS_PEERS") != "require":
        pytest.importorskip(name)


def run(name: str, out: Path, *arguments: object, ranks: int = 2) -> list[Any]:
    """What each rank wrote."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, str(PROGRAMS), name, str(out), *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def check_epochs(rows_of_ranks: list[list[list[int]]], drop_last: bool) -> None:
    """Two epochs, each of as many batches on every rank, and with every row, as evenly as these deal out."""
    assert len({len(batches) for batches in rows_of_ranks}) == 1
    ranks, batches = len(rows_of_ranks), len(rows_of_ranks[0]) // 2
    share = N // ranks // BATCH * BATCH if drop_last else -(-N // ranks)
    for epoch in range(2):
        own = [one[epoch * batches : (epoch + 1) * batches] for one in rows_of_ranks]
        assert all(sum(map(len, batches)) == share for batches in own)
        counts = Counter(row for batches in own for batch in batches for row in batch)
        assert len(counts) == min(N, share * ranks), "rows repeated that need not be"


def check_bank(found: list[Any]) -> None:
    """Each rank's bank has what the model made of each row that any rank trained on, after one update a batch."""
    trained = {row for one in found for batch in one["rows"] for row in batch}
    for one in found:
        assert set(one["right"]) == trained
        assert one["step"] == 1 + len(one["rows"])


def test_accelerate(tmp_path: Path) -> None:
    for case in zip(*run("accelerate", tmp_path), strict=True):
        found = list(case)
        check_epochs([one["rows"] for one in found], found[0]["drop_last"])
        assert all(2 * one["len"] == len(one["rows"]) for one in found)
        if found[0]["kind"] != "random":
            check_bank(found)
            assert found[0]["embeddings"] == found[1]["embeddings"]


@pytest.mark.parametrize(
    ("kind", "drop_last", "accumulate"), [("greedy", False, 1), ("pool", True, 2), ("global", False, 1)]
)
def test_transformers(kind: str, drop_last: bool, accumulate: int, tmp_path: Path) -> None:
    found = run("transformers", tmp_path, kind, drop_last, accumulate)
    check_epochs([one["rows"] for one in found], drop_last)
    check_bank(found)


@pytest.mark.parametrize(("kind", "stopped"), [("greedy", 4), ("greedy", 8), ("global", 4)])
def test_transformers_resumes_in_mid_epoch(kind: str, stopped: int, tmp_path: Path) -> None:
    for one in run("transformers_resumed", tmp_path, kind, stopped):
        assert one["parts"] == one["whole"]
        assert one["banks"][0] == one["banks"][1]


@pytest.mark.parametrize("drop_last", [True, False])
def test_sentence_transformers(drop_last: bool, tmp_path: Path) -> None:
    found = run("sentence_transformers", tmp_path, "greedy", drop_last)
    check_epochs([one["rows"] for one in found], drop_last)
    check_bank(found)


def test_lightning(tmp_path: Path) -> None:
    found = run("lightning", tmp_path, "greedy", False)
    check_epochs([one["rows"] for one in found], False)
    check_bank(found)
    for one in found:
        assert "use_distributed_sampler=False" in one["refused"]
        assert one["parts"] == one["rows"] and one["resumed"] == one["embeddings"]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader(workers: int, tmp_path: Path) -> None:
    (found,) = run("stateful", tmp_path, "greedy", workers, ranks=1)
    assert found["parts"] == found["whole"]
    assert sorted(row for batch in found["whole"] for row in batch) == list(range(len(Numbers())))


def test_accelerate_refuses_to_cut_batches() -> None:
    shard = importlib.import_module("accelerate.data_loader").BatchSamplerShard
    sampler = importlib.import_module("spectral_kernels").RandomBatchSampler(N, BATCH)
    with pytest.raises(ValueError, match="split_batches=True cuts batches"):
        iter(shard(sampler, 2, 0, split_batches=True)).__next__()
