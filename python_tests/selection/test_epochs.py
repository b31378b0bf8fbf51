"""Which epoch an iteration is: set, loaded, or the next."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from spectral_kernels.selection import (
    GreedyBatchSampler,
    LiveBatchSampler,
    MemoryBank,
    PoolBatchSampler,
    RandomBatchSampler,
)

N, D, BATCH = 48, 6, 8
Z = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
BANK = MemoryBank(N, D)
BANK.update(torch.arange(N), Z)
MAKERS = {
    "random": lambda **options: RandomBatchSampler(N, BATCH, **options),
    "pool": lambda **options: PoolBatchSampler(BANK, BATCH, draws=3, **options),
    "pool partition": lambda **options: PoolBatchSampler(BANK, BATCH, draws=3, replacement=False, **options),
    "greedy": lambda **options: GreedyBatchSampler(BANK, BATCH, candidates=3, **options),
    "greedy partition": lambda **options: GreedyBatchSampler(BANK, BATCH, candidates=3, replacement=False, **options),
    "live": lambda **options: LiveBatchSampler(N, BATCH, lambda rows: Z[rows], pool=2, **options),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Rows(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return index


def epoch_of(make, epoch: int) -> list[list[int]]:
    sampler = make()
    sampler.set_epoch(epoch)
    return list(sampler)


@makers
def test_each_iteration_moves_on_unless_told_otherwise(make):
    sampler = make()
    assert sampler.epoch == 0
    for epoch in range(3):
        assert list(sampler) == epoch_of(make, epoch)
        assert sampler.epoch == epoch
    sampler.set_epoch(7)
    assert list(sampler) == epoch_of(make, 7)
    assert list(sampler) == epoch_of(make, 8)
    sampler.set_epoch(8)
    assert list(sampler) == epoch_of(make, 8), "an epoch set again is repeated"
    assert len({str(epoch_of(make, epoch)) for epoch in range(4)}) == 4


@makers
def test_an_iteration_given_up_counts_one_however_far_it_came(make):
    far, near, never = make(), make(), make()
    iterator = iter(far)
    for _ in range(4):
        next(iterator)
    next(iter(near))
    iter(never)
    assert list(far) == list(near) == epoch_of(make, 1)
    assert list(never) == epoch_of(make, 0), "nothing was asked of it"


@makers
def test_a_state_names_the_epoch_it_was_taken_in(make):
    sampler = make()
    list(sampler)
    iterator = iter(sampler)
    head = [next(iterator), next(iterator)]
    state = sampler.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 2)
    for set_too in (False, True):
        resumed = make()
        resumed.load_state_dict(state)
        if set_too:
            resumed.set_epoch(1)
        assert resumed.state_dict()["batch"] == 2
        assert head + list(resumed) == epoch_of(make, 1)
        assert list(resumed) == epoch_of(make, 2)
    resumed.set_epoch(2)
    assert resumed.state_dict()["batch"] == 0, "set anew, it has not begun"


@pytest.mark.parametrize("options", ({}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}), ids=str)
def test_data_loaders(options):
    make = MAKERS["greedy partition"]
    sampler = make()
    loader = DataLoader(Rows(), batch_sampler=sampler, **options)
    next(iter(loader))  # a look at the first batch
    for epoch in (1, 2):
        assert [batch.tolist() for batch in loader] == epoch_of(make, epoch)
        assert sampler.epoch == epoch
    sampler.set_epoch(9)
    assert [batch.tolist() for batch in loader] == epoch_of(make, 9)


def test_the_shard_alone_moves_on_and_disturbs_no_one():
    sampler = MAKERS["random"]()
    first, second = list(sampler.sampler), list(sampler.sampler)
    assert first != second and sorted(first) == sorted(second)
    iterator = iter(sampler)
    assert [row for _ in range(2) for row in next(iterator)] == first[: 2 * BATCH]
    list(sampler.sampler), list(sampler.sampler)
    assert (sampler.epoch, sampler.state_dict()["batch"]) == (0, 2)
    assert [row for batch in sampler for row in batch] == second
