"""Whitening: covariance and both products with rows by Triton, the d x d work by torch in float64 (reference.py)."""

import torch
from torch import Tensor

from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops._triton import AotCall, Configuration, Statistics, apply, dense_rows, row_statistics
from spectral_kernels.ops.covariance.triton import cross_product, moments
from spectral_kernels.ops.whitening.reference import whitening_matrix, whitening_matrix_backward

# the kernels and their configurations are covariance's
CONFIGURATIONS: dict[str, Configuration] = {}


def _covariance(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    found = moments(z, None, center, False, acc=accumulation_dtype(z.dtype), count=z.shape[1])
    if not center:
        return found.matrix, found.matrix.new_zeros(z.shape[0], z.shape[2])
    mean = found.mean if found.mean is not None else found.statistics.mean()
    assert mean is not None
    return found.matrix, mean


def _whitened(z: Tensor, mean: Tensor, matrix: Tensor, center: bool) -> Tensor:
    return apply(z, matrix, Statistics(sums=mean if center else None), transpose=True, dtype=z.dtype)


def whiten(z: Tensor, method: str, shrinkage: float, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = dense_rows(z)
    covariance, mean = _covariance(z, center)
    matrix = whitening_matrix(covariance, method, shrinkage).contiguous()
    return _whitened(z, mean, matrix, center), mean, covariance, matrix


def _gradient(grad: Tensor, z: Tensor, mean: Tensor, matrix: Tensor, dcovariance: Tensor, center: bool) -> Tensor:
    # taking the mean out of grad takes it out of the result: the other term has none
    statistics = row_statistics(grad, None, False, center, matrix.dtype)
    return apply(grad, matrix, statistics, second=(z, mean, dcovariance), dtype=z.dtype)


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
    z, grad = dense_rows(z), dense_rows(grad)
    dmatrix = cross_product(grad, z, mean.contiguous(), mean.dtype)
    dcovariance = whitening_matrix_backward(dmatrix, covariance, matrix, method, shrinkage).to(mean.dtype)
    return _gradient(grad, z, mean.contiguous(), matrix.contiguous(), dcovariance.contiguous(), center)


def aot_calls() -> list[AotCall]:
    """What surrounds the d x d work, which reads values and so does not run on meta tensors."""

    def call(d: int, dtype: torch.dtype) -> None:
        z = torch.empty(1, 4096, d, dtype=dtype, device="meta")
        covariance, mean = _covariance(z, True)
        _whitened(z, mean, covariance, True)
        cross_product(z, z, mean, mean.dtype)
        cross_product(z[:, :512], z[:, :512], mean, mean.dtype)
        _gradient(z, z, mean, covariance, covariance, True)

    return [
        lambda: call(64, torch.float32),
        lambda: call(128, torch.float32),
        lambda: call(128, torch.bfloat16),
        lambda: call(128, torch.float64),
    ]
