"""Choosing batches: the memory bank, windows on effective rank, and batch samplers."""

from spectral_kernels.selection.memory_bank import MemoryBank, Staleness
from spectral_kernels.selection.samplers import GreedyBatchSampler, PoolBatchSampler, RandomBatchSampler
from spectral_kernels.selection.window import EffectiveRankWindow

__all__ = [
    "EffectiveRankWindow",
    "GreedyBatchSampler",
    "MemoryBank",
    "PoolBatchSampler",
    "RandomBatchSampler",
    "Staleness",
]
