"""Which epoch an iteration is: set, loaded, or the next."""

import pytest
from sampler_helpers import KINDS, make, warm_bank
from torch.utils.data import DataLoader

N, BATCH = 48, 8
BANK = warm_bank(N)
kinds = pytest.mark.parametrize("kind", KINDS)


def epoch_of(kind: str, epoch: int) -> list[list[int]]:
    sampler = make(kind, BANK, BATCH)
    sampler.set_epoch(epoch)
    return list(sampler)


@kinds
def test_each_iteration_moves_on_unless_told_otherwise(kind):
    sampler = make(kind, BANK, BATCH)
    assert sampler.epoch == 0
    for epoch in range(3):
        assert list(sampler) == epoch_of(kind, epoch)
        assert sampler.epoch == epoch
    sampler.set_epoch(7)
    assert list(sampler) == epoch_of(kind, 7)
    assert list(sampler) == epoch_of(kind, 8)
    sampler.set_epoch(8)
    assert list(sampler) == epoch_of(kind, 8), "an epoch set again is repeated"
    assert len({str(epoch_of(kind, epoch)) for epoch in range(4)}) == 4


@kinds
def test_an_iteration_given_up_counts_one_however_far_it_came(kind):
    far, near, never = (make(kind, BANK, BATCH) for _ in range(3))
    iterator = iter(far)
    for _ in range(4):
        next(iterator)
    next(iter(near))
    iter(never)
    assert list(far) == list(near) == epoch_of(kind, 1)
    assert list(never) == epoch_of(kind, 0), "nothing was asked of it"


@kinds
def test_a_state_names_the_epoch_it_was_taken_in(kind):
    sampler = make(kind, BANK, BATCH)
    list(sampler)
    iterator = iter(sampler)
    head = [next(iterator), next(iterator)]
    state = sampler.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 2)
    for set_too in (False, True):
        resumed = make(kind, BANK, BATCH)
        resumed.load_state_dict(state)
        if set_too:
            resumed.set_epoch(1)
        assert resumed.state_dict()["batch"] == 2
        assert head + list(resumed) == epoch_of(kind, 1)
        assert list(resumed) == epoch_of(kind, 2)
    resumed.set_epoch(2)
    assert resumed.state_dict()["batch"] == 0, "set anew, it has not begun"


@pytest.mark.parametrize("options", ({}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}), ids=str)
def test_data_loaders(options):
    kind = "greedy partition"
    sampler = make(kind, BANK, BATCH)
    loader = DataLoader(range(N), batch_sampler=sampler, **options)
    assert len(loader) == 6
    next(iter(loader))  # a look at the first batch
    for epoch in (1, 2):
        assert [batch.tolist() for batch in loader] == epoch_of(kind, epoch)
        assert sampler.epoch == epoch
    sampler.set_epoch(9)
    assert [batch.tolist() for batch in loader] == epoch_of(kind, 9)


def test_the_shard_alone_moves_on_and_disturbs_no_one():
    sampler = make("random", BANK, BATCH)
    first, second = list(sampler.sampler), list(sampler.sampler)
    assert first != second and sorted(first) == sorted(second)
    iterator = iter(sampler)
    assert [row for _ in range(2) for row in next(iterator)] == first[: 2 * BATCH]
    list(sampler.sampler), list(sampler.sampler)
    assert (sampler.epoch, sampler.state_dict()["batch"]) == (0, 2)
    assert [row for batch in sampler for row in batch] == second
