"""Spectra: the matrix in float64 by Triton, its eigenvalues by csrc/spectrum.cu, a CTA to a matrix."""

import torch
from torch import Tensor

from spectral_kernels.kernels.rows import dense_rows
from spectral_kernels.ops.spectrum.triton import gathered_spectrum


def eigenvalues(moment: Tensor, dtype: torch.dtype) -> Tensor:
    """As `eigenvalues` of reference.py."""
    values: Tensor = torch.ops.spectral_kernels_cuda.eigenvalues(moment, False)
    return values.to(dtype)


def spectrum(z: Tensor, center: bool, normalize: bool) -> Tensor:
    return gathered_spectrum(dense_rows(z), None, center, normalize, eigenvalues)
