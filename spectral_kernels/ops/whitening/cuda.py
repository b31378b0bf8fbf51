"""Whitening by Cholesky of up to 128 features: Triton's launches, with the matrix by csrc/whitening.cu between them."""

import torch
from torch import Tensor

from spectral_kernels.kernels.rows import dense_rows
from spectral_kernels.ops._rows import negligible_share
from spectral_kernels.ops.whitening.reference import awaited, refuse_singular
from spectral_kernels.ops.whitening.triton import covariance_of, whiten_backward, whitened

__all__ = ["whiten", "whiten_backward"]


def whitening_matrix(
    covariance: Tensor, mean: Tensor, shrinkage: float, negligible: float, least: float
) -> tuple[Tensor, Tensor]:
    """W and which are singular (b,): csrc/whitening.cu."""
    found: tuple[Tensor, Tensor] = torch.ops.spectral_kernels_cuda.whitening_matrix(
        covariance, mean, shrinkage, negligible, least
    )
    return found


def whiten(z: Tensor, method: str, shrinkage: float, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = dense_rows(z)
    covariance, mean = covariance_of(z, center)
    noise = z.shape[-1] * torch.finfo(covariance.dtype).eps
    negligible = negligible_share(covariance.dtype)
    matrix, singular = whitening_matrix(covariance, mean, shrinkage, negligible, 0.0 if shrinkage > 0 else noise)
    if awaited(covariance, shrinkage):
        refuse_singular(singular.any(), shrinkage)
    return whitened(z, mean, matrix, center), mean, covariance, matrix
