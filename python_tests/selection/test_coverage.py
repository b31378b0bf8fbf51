"""Which rows a sampler has handed out so far."""

import pytest
import torch
from sampler_helpers import KINDS, PARTITIONS, bank_of, make, warm_bank

from spectral_kernels.selection import GreedyBatchSampler

N, BATCH = 120, 10


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_is_the_share_of_rows_handed_out(kind):
    sampler = make(kind, warm_bank(N), BATCH)
    assert sampler.coverage == 0
    rows = set()
    for _ in range(2):
        for batch in sampler:
            rows.update(batch)
            assert sampler.coverage == len(rows) / N
        assert (sampler.coverage == 1) == (kind in PARTITIONS)
        assert set(sampler.visited.nonzero()[:, 0].tolist()) == rows
    sampler.reset_coverage()
    assert sampler.coverage == 0
    next(iter(sampler))
    assert sampler.coverage == BATCH / N


def test_coverage_is_of_active_rows_and_of_a_rank():
    pool = warm_bank(N)
    samplers = [make("random", pool, BATCH, num_replicas=2, rank=rank) for rank in range(2)]
    for sampler in samplers:
        list(sampler)
        assert sampler.coverage == 0.5
    assert bool((samplers[0].visited ^ samplers[1].visited).all())
    pool.retire(samplers[0].visited.nonzero()[:, 0])
    assert [sampler.coverage for sampler in samplers] == [0, 1]


def test_what_replacement_passes_over():
    """The figures of README and of GreedyBatchSampler."""
    z = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 129) ** -0.5
    sampler, shares = GreedyBatchSampler(bank_of(z), 256), []
    for _ in range(20):
        list(sampler)
        shares.append(sampler.coverage)
    assert 0.29 < shares[2] < 0.33 and 0.55 < shares[19] < 0.6
