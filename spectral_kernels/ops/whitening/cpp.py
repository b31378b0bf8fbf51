"""Whitening on the CPU: covariance and the products with rows in C++, the d x d work by torch in float64 (reference.py)."""

import torch
from torch import Tensor

from spectral_kernels.ops.whitening.reference import whitening_matrix, whitening_matrix_backward


def whiten(z: Tensor, method: str, shrinkage: float, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = torch.ops.spectral_kernels_cpp
    covariance, mean = kernels.covariance_mean(z, center, False, 0)
    matrix = whitening_matrix(covariance, method, shrinkage)
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
) -> Tensor:
    kernels = torch.ops.spectral_kernels_cpp
    dmatrix = kernels.cross_moment(grad, z, mean)
    dcovariance = whitening_matrix_backward(dmatrix, covariance, matrix, method, shrinkage).to(mean.dtype)
    result: Tensor = kernels.whiten_apply_backward(grad, z, mean, matrix, dcovariance, center, method == "cholesky")
    return result
