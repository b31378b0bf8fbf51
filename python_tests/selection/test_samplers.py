"""The batch samplers: what an epoch covers, ranks, seeds, resuming, cold banks, and that they select."""

import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sampler_helpers import KINDS, PARTITIONS, D, bank_of, make, warm_bank
from torch.utils.data import BatchSampler

import spectral_kernels as sk
from spectral_kernels.selection import (
    EffectiveRankWindow,
    GreedyBatchSampler,
    MemoryBank,
    PoolBatchSampler,
    RandomBatchSampler,
)


def imbalanced_bank(n: int = 400) -> MemoryBank:
    """Nine rows in ten lie near one direction."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(n, 16, generator=generator) * 0.1
    common = torch.rand(n, generator=generator) < 0.9
    z[common, 0] += 1
    z[~common] *= 10
    return bank_of(z)


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    num_replicas=st.integers(1, 4),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
    unseen=st.sets(st.integers(0, 39)),
    min_seen=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_an_epoch_covers_what_is_promised(kind, n, batch_size, num_replicas, drop_last, epoch, unseen, min_seen):
    shard_size = n // num_replicas if drop_last else -(-n // num_replicas)
    assume(num_replicas <= n)
    assume(batch_size <= shard_size)
    bank = warm_bank(n, [row for row in unseen if row < n])
    options = {"drop_last": drop_last, "num_replicas": num_replicas, "min_seen": min_seen}
    samplers = [make(kind, bank, batch_size, rank=rank, **options) for rank in range(num_replicas)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [list(sampler) for sampler in samplers]
    shards = [list(sampler.sampler) for sampler in samplers]

    # shards: equally long, without repeats; together everything up to the remainder
    assert all(len(shard) == len(set(shard)) == shard_size for shard in shards)
    dealt = [row for place in zip(*shards, strict=True) for row in place]
    assert len(set(dealt[:n])) == min(n, len(dealt))
    assert dealt[n:] == dealt[: max(0, len(dealt) - n)], "the last places go to the first rows"

    for sampler, shard, own in zip(samplers, shards, batches, strict=True):
        count = shard_size // batch_size if drop_last else -(-shard_size // batch_size)
        assert len(own) == len(sampler) == count
        assert all(len(set(batch)) == len(batch) and set(batch) <= set(shard) for batch in own)
        rows = [row for batch in own for row in batch]
        if kind not in PARTITIONS:
            assert all(len(batch) == batch_size for batch in own)
        else:
            assert len(rows) == len(set(rows)) == (count * batch_size if drop_last else shard_size)
            assert all(len(batch) == batch_size for batch in own[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_epochs(kind):
    bank = warm_bank(60)

    def batches(epoch=0, **options):
        sampler = make(kind, bank, 8, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = batches()
    assert len({frozenset(batch) for batch in first}) == len(first)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert batches() == first
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert batches(epoch=1) != first
    assert batches(seed=1) != first
    assert batches(seed=1) != batches(epoch=1)
    assert batches(num_replicas=2, rank=0) != batches(num_replicas=2, rank=1)
    assert list(make(kind, bank, 8)) == first


def test_greedy_batches_are_those_of_the_op():
    """Without replicas and with replacement the op gets the bank itself: no copy, no mask."""
    bank = warm_bank(30)
    sampler = GreedyBatchSampler(bank, 6, candidates=4)
    original = sampler._greedy_select

    def watched(pool, k, valid, generator):
        assert pool is bank.embeddings and valid is None
        return original(pool, k, valid, generator)

    sampler._greedy_select = watched
    next(iter(sampler))


@pytest.mark.parametrize("replacement", [True, False])
def test_the_last_selection_is_that_of_the_batch(replacement):
    bank = warm_bank(30)
    sampler = GreedyBatchSampler(bank, 7, candidates=4, replacement=replacement, drop_last=False)
    for batch in sampler:
        assert sampler.last_selection.indices.tolist() == batch
        rank = sk.effective_rank(bank.gather(torch.tensor(batch)), order=2)
        assert float(sampler.last_selection.effective_rank[-1]) == pytest.approx(float(rank), rel=1e-5)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_pool_batches_are_the_best_of_their_draws(replacement, num_replicas):
    bank = imbalanced_bank()
    for policy, extreme in (("high", torch.max), ("low", torch.min)):
        sampler = PoolBatchSampler(bank, 16, policy=policy, replacement=replacement, num_replicas=num_replicas, rank=0)
        for batch in sampler:
            ranks = sampler.last_selection.effective_rank
            assert sampler.last_selection.indices.tolist() == batch
            own = sk.effective_rank(bank.gather(torch.tensor(batch)), order=2)
            assert len(ranks) == 16
            assert float(own) == pytest.approx(float(extreme(ranks)), rel=1e-5)


def mean_rank(bank: MemoryBank, sampler) -> float:
    ranks = [float(sk.effective_rank(bank.gather(torch.tensor(batch)), order=2)) for batch in sampler]
    return sum(ranks) / len(ranks)


def test_selection_raises_effective_rank_on_an_imbalanced_pool():
    bank = imbalanced_bank()
    random = mean_rank(bank, RandomBatchSampler(bank, 16))
    assert mean_rank(bank, PoolBatchSampler(bank, 16)) == pytest.approx(random, rel=0.2)
    assert mean_rank(bank, PoolBatchSampler(bank, 16, policy="high")) > 1.3 * random
    assert mean_rank(bank, GreedyBatchSampler(bank, 16)) > 3 * random
    assert mean_rank(bank, GreedyBatchSampler(bank, 16, num_replicas=2, rank=1)) > 3 * random


def test_a_window_is_preferred_and_may_be_set_between_batches():
    bank = imbalanced_bank()
    free = mean_rank(bank, PoolBatchSampler(bank, 16))
    sampler = PoolBatchSampler(bank, 16, draws=64, window=EffectiveRankWindow(1.5 * free, 2 * free))
    assert mean_rank(bank, sampler) > 1.2 * free
    sampler.window = (0, 0.8 * free)
    assert mean_rank(bank, sampler) < 0.9 * free


@pytest.mark.parametrize("kind", KINDS[1:5])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_cold_bank_is_random_and_says_so_once(kind, num_replicas):
    bank = MemoryBank(64, D)
    options = {"num_replicas": num_replicas, "rank": 0, "seed": 4}
    sampler = make(kind, bank, 8, **options)
    ordinary = RandomBatchSampler(bank, 8, **options)
    with pytest.warns(UserWarning, match=f"bank is cold: 0 of {64 // num_replicas} rows") as caught:
        assert list(sampler) == list(ordinary)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert sampler.last_selection is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(sampler)
        bank.update(torch.arange(64), torch.randn(64, D))
        assert list(sampler) != list(ordinary)
        assert sampler.last_selection is not None
        bank.reset()
        next(iter(sampler))
    assert sampler.last_selection is None


@pytest.mark.parametrize("kind", ["pool", "greedy"])
def test_how_much_of_the_shard_must_be_seen(kind):
    """The share is of the rank's own shard, and a batch's worth of rows is needed whatever it is."""
    for seen, options, cold in (
        (27, {}, True),  # 0.9 of 32 is 28.8
        (29, {}, False),
        (7, {"min_seen": 0.0}, True),
        (8, {"min_seen": 0.0}, False),
        (31, {"min_seen": 1.0}, True),
        (32, {"min_seen": 1.0}, False),
    ):
        bank = MemoryBank(64, D)
        sampler = make(kind, bank, 8, num_replicas=2, rank=1, **options)
        shard = list(sampler.sampler)
        rows = torch.tensor(shard[:seen] + [row for row in range(64) if row not in shard])
        bank.update(rows, torch.randn(len(rows), D))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(iter(sampler))
        assert bool(caught) == cold, (seen, options)


@pytest.mark.parametrize(("replacement", "batches"), [(True, 40), (False, 6)])
def test_greedy_visits_unseen_rows_in_proportion(replacement, batches):
    unseen = list(range(0, 48, 4))
    bank = warm_bank(48, unseen)
    sampler = GreedyBatchSampler(bank, 8, candidates=4, min_seen=0.5, replacement=replacement)
    first = next(iter(sampler))
    assert len(set(first) & set(unseen)) == 2
    assert len(sampler.last_selection.indices) == 6
    # a loop that updates the bank leaves none behind
    done = 0
    while done < batches:
        for batch in sampler:
            bank.update(torch.tensor(batch), torch.randn(8, D, generator=torch.Generator().manual_seed(done)))
            done += 1
        sampler.set_epoch(done)
    assert bank.num_seen == 48


def test_looks_like_a_batch_sampler():
    """What torch and Lightning ask of one."""
    sampler = GreedyBatchSampler(warm_bank(32), 8)
    standard = BatchSampler(range(32), 8, drop_last=True)
    assert {name for name in vars(standard) if not name.startswith("_")} <= set(dir(sampler))
    assert len(sampler.sampler) == 32
    assert sorted(sampler.sampler) == list(range(32))
    sampler.sampler.set_epoch(3)
    assert sampler.epoch == 3
    assert (sampler.rank, sampler.num_replicas, sampler.seed, sampler.drop_last) == (0, 1, 0, True)
    assert sampler.selection_seconds == 0.0
    next(iter(sampler))
    once = sampler.selection_seconds
    assert once > 0.0
    list(sampler)
    assert sampler.selection_seconds > once


def test_an_older_iteration_ends_where_batches_depend_on_it():
    sampler = GreedyBatchSampler(warm_bank(32), 8, replacement=False)
    older = iter(sampler)
    next(older)
    list(sampler)
    with pytest.raises(RuntimeError, match="superseded"):
        next(older)


@pytest.mark.parametrize("given_as", [torch.Tensor.clone, torch.Tensor.numpy])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("pool", "greedy"))])
def test_embeddings_in_the_place_of_a_bank(kind, given_as):
    bank = warm_bank(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such a bank is not cold
        assert list(make(kind, given_as(bank.embeddings * 3), 8)) == list(make(kind, bank, 8))
