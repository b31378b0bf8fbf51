"""Covariance and its gradient, by the kernels that ops share."""

import torch
from torch import Tensor

from spectral_kernels.kernels.apply import apply, whole_rows
from spectral_kernels.kernels.launch import AotCall
from spectral_kernels.kernels.moments import moments
from spectral_kernels.kernels.rows import dense_rows
from spectral_kernels.kernels.statistics import Statistics, read_rows_backward, row_statistics
from spectral_kernels.ops._rows import accumulation_dtype


def covariance(z: Tensor, center: bool, normalize: bool, correction: int, precision: str) -> Tensor:
    z = dense_rows(z)
    count = z.shape[1] - correction
    acc = accumulation_dtype(z.dtype)
    return moments(z, None, center, normalize, acc=acc, precision=precision, count=count).matrix


def covariance_backward(
    grad: Tensor, z: Tensor, center: bool, normalize: bool, correction: int, precision: str
) -> Tensor:
    z, grad = dense_rows(z), grad.contiguous()
    statistics = row_statistics(z, None, normalize, center, grad.dtype)
    fused = whole_rows(z.shape[-1])
    dx = apply(
        z, grad, statistics, count=z.shape[1] - correction, precision=precision, symmetrize=True,
        dtype=z.dtype if fused or not normalize else None, tangent=fused and normalize,
    )  # fmt: skip
    return dx if fused or not normalize else read_rows_backward(dx, z, True, Statistics())


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover the kernels and configurations of moments."""

    def call(n: int, d: int, dtype: torch.dtype, plain: bool, precision: str) -> None:
        z = torch.empty(2, n, d, dtype=dtype, device="meta")
        matrix = covariance(z, not plain, not plain, 0, precision)
        covariance_backward(matrix, z, not plain, not plain, 0, precision)

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    cases = [(65536, d, dtype, False, "ieee") for d in (16, 32, 64, 128, 512) for dtype in dtypes]
    # rows that are neither normalised nor centred go to the products as they are loaded: other code, other registers
    cases += [(65536, d, dtype, True, "ieee") for d in (128, 512) for dtype in dtypes]
    cases += [(65536, d, torch.float32, plain, name)
              for d in (128, 512) for plain in (False, True) for name in ("tf32", "bf16x3")]  # fmt: skip
    # one chunk of rows: finished in one launch
    cases += [(256, d, dtype, False, "ieee") for d in (128, 2048) for dtype in dtypes]
    return [lambda case=case: call(*case) for case in cases]  # type: ignore[misc]
