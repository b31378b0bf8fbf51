"""Choosing batches: the memory bank, windows on effective rank, and batch samplers."""

from spectral_kernels.selection.bank_samplers import GreedyBatchSampler, PoolBatchSampler
from spectral_kernels.selection.batch_sampler import RandomBatchSampler
from spectral_kernels.selection.global_batches import GlobalBatchSampler
from spectral_kernels.selection.live import LiveBatchSampler
from spectral_kernels.selection.memory_bank import MemoryBank, Staleness
from spectral_kernels.selection.window import EffectiveRankWindow

__all__ = [
    "EffectiveRankWindow",
    "GlobalBatchSampler",
    "GreedyBatchSampler",
    "LiveBatchSampler",
    "MemoryBank",
    "PoolBatchSampler",
    "RandomBatchSampler",
    "Staleness",
]
