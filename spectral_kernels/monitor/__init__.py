"""Diagnostics of a training run: what its batches' spectra and gradients say, and when to worry."""

from spectral_kernels.monitor.lightning import lightning_callback
from spectral_kernels.monitor.spectrum_monitor import SpectrumMonitor, SpectrumWarning

__all__ = ["SpectrumMonitor", "SpectrumWarning", "lightning_callback"]
