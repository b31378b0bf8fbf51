"""Pools that change: classes come and go, rows are replaced; what banks and samplers promise holds at every stage."""

import pytest
import torch
from sampler_helpers import PARTITIONS, make
from torch import Tensor

from spectral_kernels.selection import MemoryBank, RandomBatchSampler

CLASSES, PER_CLASS, D, BATCH = 6, 50, 12, 16


def rows_of(*classes: int) -> Tensor:
    return torch.cat([torch.arange(PER_CLASS) + PER_CLASS * label for label in classes])


def embed(indices: Tensor) -> Tensor:
    """Rows near the directions of their classes."""
    centers = torch.eye(D)[indices // PER_CLASS]
    return centers + 0.3 * torch.randn(len(indices), D)


def stream() -> list[set[int]]:
    """The rows of each stage: at stage s classes s and s + 1 are there."""
    return [set(rows_of(stage, stage + 1).tolist()) for stage in range(CLASSES - 1)]


def enter(bank: MemoryBank, stage: int) -> None:
    """A class comes, another goes."""
    if stage == 0:
        bank.retire(rows_of(*range(2, CLASSES)))
    else:
        bank.admit(rows_of(stage + 1))
        bank.retire(rows_of(stage - 1))


@pytest.mark.parametrize("ranks", (1, 3))
@pytest.mark.parametrize("kind", PARTITIONS)
def test_epochs_of_a_class_incremental_stream(kind: str, ranks: int) -> None:
    """Each epoch hands out every active row once (over the ranks, up to the filling), and no other."""
    torch.manual_seed(0)
    bank = MemoryBank(CLASSES * PER_CLASS, D)
    options = {"drop_last": False, "min_seen": 0.5, "num_replicas": ranks}
    samplers = [make(kind, bank, BATCH, rank=rank, **options) for rank in range(ranks)]
    for stage, active in enumerate(stream()):
        enter(bank, stage)
        assert bank.num_active == len(active) == int(bank.active.sum())
        for epoch in (2 * stage, 2 * stage + 1):
            counts = torch.zeros(bank.n, dtype=torch.int64)
            for sampler in samplers:
                sampler.set_epoch(epoch)
            assert len({len(sampler) for sampler in samplers}) == 1
            for batches in zip(*samplers, strict=True):
                for batch in batches:
                    assert len(set(batch)) == len(batch)
                    counts[batch] += 1
                    bank.update(torch.tensor(batch), embed(torch.tensor(batch)))
            assert set(counts.nonzero()[:, 0].tolist()) == active
            # without drop_last the last places are filled with the first rows
            assert int(counts.sum()) - len(active) == -len(active) % ranks
        assert bank.num_seen == len(active)


@pytest.mark.parametrize("kind", ("pool", "greedy"))
def test_batches_with_replacement_follow_the_stream(kind: str) -> None:
    bank = MemoryBank(CLASSES * PER_CLASS, D)
    sampler = make(kind, bank, BATCH, min_seen=0.5)
    for stage, active in enumerate(stream()):
        enter(bank, stage)
        sampler.set_epoch(stage)
        assert len(sampler) == len(active) // BATCH
        for batch in sampler:
            assert len(set(batch)) == BATCH
            assert active.issuperset(batch)
            bank.update(torch.tensor(batch), embed(torch.tensor(batch)))
        # a new class is explored at its share of the rows from the first epoch on
        assert bank.seen[rows_of(stage + 1)].any()


def test_rows_are_forgotten_as_they_change() -> None:
    bank = MemoryBank(10, 3)
    bank.update(torch.arange(10), torch.randn(10, 3))
    bank.retire(torch.tensor([2, 3]))
    bank.update(torch.tensor([1, 2]), torch.ones(2, 3))  # 2 was on its way
    assert bank.seen.tolist() == [i not in (2, 3) for i in range(10)]
    assert (bank.embeddings[[2, 3]] == 0).all()
    bank.admit(torch.tensor([3, 4]))  # 4 is replaced
    assert bank.active.tolist() == [i != 2 for i in range(10)]
    assert bank.num_active == 9
    assert bank.num_seen == int(bank.seen.sum()) == 7
    assert bank.staleness().seen == 7 / 9


def test_bad_changes() -> None:
    bank = MemoryBank(4, 3)
    with pytest.raises(ValueError, match="indices names every active row"):
        bank.retire(torch.arange(4))
    with pytest.raises(ValueError, match="indices"):
        bank.admit(torch.tensor([4]))
    bank.retire(torch.arange(3))
    with pytest.raises(ValueError, match="batch_size = 2 exceeds the 1 rows"):
        RandomBatchSampler(bank, 2)
