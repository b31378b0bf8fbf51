"""The batch samplers refuse bad arguments, states and rows."""

import pytest
import torch
from sampler_helpers import warm_bank

from spectral_kernels.selection import GreedyBatchSampler, PoolBatchSampler, RandomBatchSampler

BANK = warm_bank(32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomBatchSampler(0, 1), "rows must be at least 1, got 0"),
        (lambda: RandomBatchSampler(10.0, 1), "rows must be an integer, got 10.0"),
        (lambda: RandomBatchSampler(10, 0), "batch_size must be at least 1, got 0"),
        (lambda: RandomBatchSampler(10, 11), "batch_size = 11 exceeds the 10 rows"),
        (lambda: RandomBatchSampler(10, 6, num_replicas=2, rank=0), "batch_size = 6 exceeds the 5 rows"),
        (lambda: RandomBatchSampler(10, 2, num_replicas=2, rank=2), "rank must be between 0 and 1, got 2"),
        (lambda: RandomBatchSampler(10, 2, num_replicas=0), "num_replicas must be at least 1, got 0"),
        (lambda: RandomBatchSampler(10, 2, seed=-1), "seed must be at least 0, got -1"),
        (lambda: PoolBatchSampler([[1.0]], 8), r"bank must be a MemoryBank, or embeddings \(n, d\), got list"),
        (lambda: GreedyBatchSampler(BANK.embeddings[0], 8), "bank must have 2 dimensions"),
        (lambda: GreedyBatchSampler(BANK.embeddings.numpy() * float("nan"), 8), "z row 0 holds NaN or Inf"),
        (lambda: PoolBatchSampler(BANK, 8, draws=0), "draws must be at least 1, got 0"),
        (lambda: PoolBatchSampler(BANK, 8, policy="best"), "policy must be one of low, balanced, high"),
        (lambda: PoolBatchSampler(BANK, 8, policy=1.5), "quantile in \\[0, 1\\], got 1.5"),
        (lambda: PoolBatchSampler(BANK, 8, window=(3, 2)), "window must satisfy 0 <= lo <= hi"),
        (lambda: PoolBatchSampler(BANK, 8, order=-1.0), "order"),
        (lambda: PoolBatchSampler(BANK, 8, min_seen=1.5), "min_seen must be between 0 and 1, got 1.5"),
        (lambda: GreedyBatchSampler(BANK, 33), "batch_size = 33 exceeds the 32 rows"),
        (lambda: GreedyBatchSampler(BANK, 8, candidates=0), "candidates must be at least 1, got 0"),
        (
            lambda: GreedyBatchSampler(BANK, 8, objective="trace"),
            "objective must be one of effective_rank, logdet",
        ),
        (lambda: PoolBatchSampler(BANK, 8, window=4), "window must be a pair"),
        (lambda: GreedyBatchSampler(BANK, 8, min_seen="all"), "min_seen must be between 0 and 1, got 'all'"),
        (lambda: GreedyBatchSampler(BANK, 8).set_epoch(-1), "epoch must be at least 0, got -1"),
        (lambda: GreedyBatchSampler(BANK, 8).set_epoch(1.0), "epoch must be an integer, got 1.0"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_rows_with_nan_are_named():
    bank = warm_bank(32)
    bank.embeddings[7] = torch.nan
    with pytest.raises(ValueError, match="pool row 7 holds NaN or Inf"):
        next(iter(GreedyBatchSampler(bank, 8, candidates=None)))
