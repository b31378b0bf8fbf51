"""Which rows a sampler has handed out so far."""

import pytest
import torch

from spectral_kernels.selection import (
    GreedyBatchSampler,
    LiveBatchSampler,
    MemoryBank,
    PoolBatchSampler,
    RandomBatchSampler,
)

N, D, BATCH = 120, 8, 10
Z = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, D)


def bank() -> MemoryBank:
    made = MemoryBank(N, D)
    made.update(torch.arange(N), Z)
    return made


MAKERS = {
    "random": lambda: RandomBatchSampler(bank(), BATCH),
    "pool": lambda: PoolBatchSampler(bank(), BATCH, draws=3),
    "greedy": lambda: GreedyBatchSampler(bank(), BATCH, candidates=8),
    "greedy partition": lambda: GreedyBatchSampler(bank(), BATCH, candidates=8, replacement=False),
    "live": lambda: LiveBatchSampler(N, BATCH, lambda rows: Z[rows]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_coverage_is_the_share_of_rows_handed_out(name):
    sampler = MAKERS[name]()
    assert sampler.coverage == 0
    rows = set()
    for _ in range(2):
        for batch in sampler:
            rows.update(batch)
            assert sampler.coverage == len(rows) / N
        assert (sampler.coverage == 1) == (name in ("random", "greedy partition"))
        assert set(sampler.visited.nonzero()[:, 0].tolist()) == rows
    sampler.reset_coverage()
    assert sampler.coverage == 0
    next(iter(sampler))
    assert sampler.coverage == BATCH / N


@pytest.mark.parametrize("name", MAKERS)
def test_coverage_goes_on_after_a_resume(name):
    sampler = MAKERS[name]()
    list(sampler)
    iterator = iter(sampler)
    shares = []
    for _ in range(6):
        next(iterator)
        shares.append(sampler.coverage)
    resumed = MAKERS[name]()
    resumed.load_state_dict(sampler.state_dict(consumed=4))
    assert resumed.coverage == shares[3], "what a loader took ahead does not count"
    next(iter(resumed))
    assert resumed.coverage == shares[4]
    assert resumed.state_dict(consumed=5)["visited"].sum() == N * shares[4]
    assert resumed.state_dict(consumed=4)["visited"].sum() == N * shares[3]
    assert sampler.coverage == shares[5]


def test_coverage_is_of_active_rows_and_of_a_rank():
    pool = bank()
    samplers = [RandomBatchSampler(pool, BATCH, num_replicas=2, rank=rank) for rank in range(2)]
    for sampler in samplers:
        list(sampler)
        assert sampler.coverage == 0.5
    assert bool((samplers[0].visited ^ samplers[1].visited).all())
    pool.retire(samplers[0].visited.nonzero()[:, 0])
    assert [sampler.coverage for sampler in samplers] == [0, 1]


def test_what_replacement_passes_over():
    """The figures of README and of GreedyBatchSampler."""
    z = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 129) ** -0.5
    embeddings = MemoryBank(4096, 128)
    embeddings.update(torch.arange(4096), z)
    sampler, shares = GreedyBatchSampler(embeddings, 256), []
    for _ in range(20):
        list(sampler)
        shares.append(sampler.coverage)
    assert 0.29 < shares[2] < 0.33 and 0.55 < shares[19] < 0.6
