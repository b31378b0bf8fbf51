"""Whitening on the CPU: covariance and the products with rows in C++, the d x d work by torch in float64."""

import torch
from torch import Tensor

from spectral_kernels.ops.whitening.reference import (
    drop_noise,
    too_narrow,
    whiten_backward_in_float64,
    whiten_in_float64,
    whitening_matrix,
    whitening_matrix_backward,
)


def whiten(z: Tensor, method: str, shrinkage: float, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = torch.ops.spectral_kernels_cpp
    covariance, mean = kernels.covariance_mean(z, center, False, 0)
    if too_narrow(covariance, mean):
        return whiten_in_float64(whiten, z, method, shrinkage, center)
    # in float32 what is rounding noise was too narrow
    spread = drop_noise(covariance, mean) if covariance.dtype == torch.float64 else covariance
    matrix = whitening_matrix(spread, method, shrinkage)
    return kernels.whiten_apply(z, mean, matrix, method == "cholesky"), mean, covariance, matrix


def whiten_backward(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    covariance: Tensor,
    matrix: Tensor,
    method: str,
    shrinkage: float,
    center: bool,
    y: Tensor | None = None,
) -> Tensor:
    if too_narrow(covariance, mean):
        return whiten_backward_in_float64(whiten, whiten_backward, grad, z, method, shrinkage, center)
    if method == "cholesky":
        return _cholesky_backward(grad, z, mean, matrix, shrinkage, center, y)
    kernels = torch.ops.spectral_kernels_cpp
    dmatrix, grad_mean, rest = kernels.cross_moment(grad, z, mean, center, False)
    outer = 2 / z.shape[-2] * whitening_matrix_backward(dmatrix, covariance, matrix, method, shrinkage)
    # what the rounding of the mean leaves of it
    offset = rest.double().unsqueeze(-2) @ outer
    result: Tensor = kernels.whiten_apply_backward(
        grad, z, grad_mean, mean, matrix, outer.to(mean.dtype), offset.squeeze(-2).to(mean.dtype)
    )
    return result


def _cholesky_backward(
    grad: Tensor, z: Tensor, mean: Tensor, matrix: Tensor, shrinkage: float, center: bool, y: Tensor | None
) -> Tensor:
    """dx = gW + (2/n) x dC in terms of y = xWᵀ.

    dC is (1 − ε) times the symmetric part of WᵀΦW, Φ = −tril(gᵀy) with half its diagonal, and ε times the mean t of that
    part's diagonal on its own. With x = yW⁻ᵀ then dx = (g + (1 − ε)/n y (Φ + Φᵀ)) W + (2ε/n) t x: half of gᵀy is enough,
    and no d x d matrices are multiplied but for t.
    """
    kernels = torch.ops.spectral_kernels_cpp
    if y is None or y.dtype != mean.dtype:
        # half of it cancels where rows are few: rounded to z's half precision it would not do
        y = kernels.whiten_apply(z.to(mean.dtype), mean, matrix, True)
    upper, y_mean, grad_mean = kernels.cross_moment(y, grad, None, center, True)
    n, d = z.shape[-2:]
    phi = -(upper + upper.triu(1).mT)
    trace = 0.5 * (phi * (matrix @ matrix.mT)).sum((-2, -1))
    inner, scale = (1 - shrinkage) / n * phi, 2 * shrinkage / (n * d) * trace
    result: Tensor = kernels.whiten_cholesky_backward(grad, y, z, grad_mean, y_mean, mean, matrix, inner, scale)
    return result
