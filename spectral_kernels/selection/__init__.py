"""Choosing batches: the memory bank, windows on effective rank, and batch samplers."""

from spectral_kernels.selection.memory_bank import MemoryBank, Staleness
from spectral_kernels.selection.samplers import (
    GreedyBatchSampler,
    LiveBatchSampler,
    PoolBatchSampler,
    RandomBatchSampler,
)
from spectral_kernels.selection.window import EffectiveRankWindow

__all__ = [
    "EffectiveRankWindow",
    "GreedyBatchSampler",
    "LiveBatchSampler",
    "MemoryBank",
    "PoolBatchSampler",
    "RandomBatchSampler",
    "Staleness",
]
