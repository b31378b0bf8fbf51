"""Pools that change: classes come and go, rows are replaced; what banks and samplers promise holds at every stage."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.selection import GreedyBatchSampler, MemoryBank, PoolBatchSampler, RandomBatchSampler

CLASSES, PER_CLASS, D, BATCH = 6, 50, 12, 16
SAMPLERS = {
    "random": lambda bank, **options: RandomBatchSampler(bank, BATCH, **options),
    "pool": lambda bank, **options: PoolBatchSampler(bank, BATCH, draws=4, min_seen=0.5, **options),
    "greedy": lambda bank, **options: GreedyBatchSampler(bank, BATCH, candidates=8, min_seen=0.5, **options),
}
Make = Callable[..., RandomBatchSampler | PoolBatchSampler | GreedyBatchSampler]


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
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_epochs_of_a_class_incremental_stream(make: Make, ranks: int) -> None:
    """Each epoch hands out every active row once (over the ranks, up to the filling), and no other."""
    torch.manual_seed(0)
    bank = MemoryBank(CLASSES * PER_CLASS, D)
    options = {} if make is SAMPLERS["random"] else {"replacement": False}
    samplers = [make(bank, drop_last=False, num_replicas=ranks, rank=rank, **options) for rank in range(ranks)]
    for stage, active in enumerate(stream()):
        enter(bank, stage)
        assert bank.num_active == len(active) == int(bank.active.sum())
        for epoch in (2 * stage, 2 * stage + 1):
            counts = torch.zeros(bank.n, dtype=torch.int64)
            iterators = []
            for sampler in samplers:
                sampler.set_epoch(epoch)
                iterators.append(iter(sampler))
            assert len({len(sampler) for sampler in samplers}) == 1
            for batches in zip(*iterators, strict=True):
                for batch in batches:
                    assert len(set(batch)) == len(batch)
                    counts[batch] += 1
                    bank.update(torch.tensor(batch), embed(torch.tensor(batch)))
            assert set(counts.nonzero()[:, 0].tolist()) == active
            # without drop_last the last places are filled with the first rows
            assert int(counts.sum()) - len(active) == -len(active) % ranks
        assert bank.num_seen == len(active)


@pytest.mark.parametrize("name", ("pool", "greedy"))
def test_batches_with_replacement_follow_the_stream(name: str) -> None:
    bank = MemoryBank(CLASSES * PER_CLASS, D)
    sampler = SAMPLERS[name](bank, replacement=True)
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


def test_greedy_batches_stay_more_diverse_than_random_ones() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(CLASSES * PER_CLASS, D)
    every = torch.arange(bank.n)
    for stage in range(CLASSES - 1):
        enter(bank, stage)
        # five times as many of the older class
        rare = rows_of(stage + 1)[PER_CLASS // 5 :]
        bank.retire(rare)
        seen = every[bank.active]
        bank.update(seen, embed(seen))
        ranks = []
        for sampler in (SAMPLERS["greedy"](bank), SAMPLERS["random"](bank)):
            sampler.set_epoch(stage)
            chosen = torch.tensor(next(iter(sampler)))
            ranks.append(float(sk.effective_rank(bank.gather(chosen), order=2)))
        assert ranks[0] > ranks[1]
        bank.admit(rare)


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


def test_a_stream_is_resumed() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(CLASSES * PER_CLASS, D)
    enter(bank, 0)
    bank.update(rows_of(0, 1), embed(rows_of(0, 1)))
    sampler = SAMPLERS["greedy"](bank, replacement=False)
    batches = iter(sampler)
    next(batches)
    saved = {"bank": {k: v.clone() if isinstance(v, Tensor) else v for k, v in bank.state_dict().items()}}
    saved["sampler"] = sampler.state_dict()
    rest = list(batches)
    other = MemoryBank(bank.n, D)
    other.load_state_dict(saved["bank"])
    resumed = SAMPLERS["greedy"](other, replacement=False)
    resumed.load_state_dict(saved["sampler"])
    assert list(resumed) == rest
    assert other.num_active == bank.num_active


def test_bad_changes() -> None:
    bank = MemoryBank(4, 3)
    with pytest.raises(ValueError, match="indices names every active row"):
        bank.retire(torch.arange(4))
    with pytest.raises(ValueError, match="indices"):
        bank.admit(torch.tensor([4]))
    bank.retire(torch.arange(3))
    with pytest.raises(ValueError, match="batch_size = 2 exceeds the 1 rows"):
        RandomBatchSampler(bank, 2)
    state = bank.state_dict() | {"active": torch.zeros(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="active of the state"):
        bank.load_state_dict(state)
