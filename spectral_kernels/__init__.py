"""Measure and steer the diversity of a contrastive-learning batch."""

from spectral_kernels.checks import set_checks
from spectral_kernels.dispatch.backends import BackendError, BackendWarning, use_backend
from spectral_kernels.errors import check
from spectral_kernels.inspection.diagnosis import diagnose
from spectral_kernels.modules import InfoNCELoss, NTXentLoss, Whitening
from spectral_kernels.monitor import SpectrumMonitor, SpectrumWarning
from spectral_kernels.ops._selection import Selection
from spectral_kernels.ops.coding_rate import coding_rate
from spectral_kernels.ops.covariance import covariance
from spectral_kernels.ops.effective_rank import batch_effective_rank, effective_rank, rankme
from spectral_kernels.ops.effective_rank.error import effective_rank_error
from spectral_kernels.ops.greedy import greedy_select
from spectral_kernels.ops.infonce import info_nce, info_nce_grad_norms, nt_xent, sigmoid_loss
from spectral_kernels.ops.pool import pool_select
from spectral_kernels.ops.spectrum import spectrum
from spectral_kernels.ops.whitening import whiten
from spectral_kernels.selection import (
    GlobalBatchSampler,
    GreedyBatchSampler,
    LiveBatchSampler,
    MemoryBank,
    PoolBatchSampler,
    RandomBatchSampler,
)
from spectral_kernels.theory.band import GradientBand, gradient_band
from spectral_kernels.theory.gradient_variance import GradientVariance, gradient_variance

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendWarning",
    "GlobalBatchSampler",
    "GradientBand",
    "GradientVariance",
    "GreedyBatchSampler",
    "InfoNCELoss",
    "LiveBatchSampler",
    "MemoryBank",
    "NTXentLoss",
    "PoolBatchSampler",
    "RandomBatchSampler",
    "Selection",
    "SpectrumMonitor",
    "SpectrumWarning",
    "Whitening",
    "batch_effective_rank",
    "check",
    "coding_rate",
    "covariance",
    "diagnose",
    "effective_rank",
    "effective_rank_error",
    "gradient_band",
    "gradient_variance",
    "greedy_select",
    "info_nce",
    "info_nce_grad_norms",
    "nt_xent",
    "pool_select",
    "rankme",
    "set_checks",
    "sigmoid_loss",
    "spectrum",
    "use_backend",
    "whiten",
]
