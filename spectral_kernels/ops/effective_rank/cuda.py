"""Spectra of the batches of a pool: see ops/spectrum/cuda.py."""

from torch import Tensor

from spectral_kernels.kernels.rows import dense_rows
from spectral_kernels.ops.spectrum.cuda import eigenvalues
from spectral_kernels.ops.spectrum.triton import gathered_spectrum


def batch_spectrum(pool: Tensor, indices: Tensor, center: bool, normalize: bool) -> Tensor:
    return gathered_spectrum(dense_rows(pool), indices.contiguous(), center, normalize, eigenvalues)
