"""The batch sampler of a strategy, and the seeds of a run."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spectral_kernels.selection import (
    GreedyBatchSampler,
    LiveBatchSampler,
    MemoryBank,
    PoolBatchSampler,
    RandomBatchSampler,
)
from spectral_kernels.selection.sharding import hashed_seed
from spectral_kernels.training.config import Config, Strategy


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that no two streams share their numbers."""
    return hashed_seed(f"{seed} {purpose}")


def make_sampler(
    strategy: Strategy, bank: MemoryBank, config: Config, embed: Callable[[Tensor], Tensor]
) -> RandomBatchSampler | PoolBatchSampler | GreedyBatchSampler | LiveBatchSampler:
    """The batch sampler of a strategy; `embed` makes embeddings of rows for a live pool."""
    selection, size = config.selection, config.train.batch_size
    seed = derive_seed(config.train.seed, "sampler")
    if strategy.kind == "random":
        return RandomBatchSampler(bank, size, seed=seed)
    if strategy.kind == "live":
        return LiveBatchSampler(bank, size, embed, pool=selection.live_pool, candidates=strategy.candidates, seed=seed)
    shared: dict[str, Any] = {"min_seen": selection.min_seen, "replacement": selection.replacement, "seed": seed}
    if strategy.kind == "greedy":
        return GreedyBatchSampler(bank, size, candidates=strategy.candidates, **shared)
    window = selection.window if strategy.window else None
    return PoolBatchSampler(bank, size, draws=selection.draws, policy=strategy.policy, window=window, **shared)
