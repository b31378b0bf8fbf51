"""Eigenvalues of the second moment or covariance, in float64 whatever the input.

float32 d x d eigenvalues put order 1 on nearly singular spectra off by 1 % and raise on collapsed batches.
"""

import torch
from torch import Tensor

from spectral_kernels.ops._rows import (
    accumulation_dtype,
    center_rows,
    in_range,
    is_negligible,
    read_rows,
    read_rows_backward,
)
from spectral_kernels.ops.covariance.reference import second_moment64


def eigenvalues(moment: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues of a symmetric float64 matrix (..., d, d), descending, rounding below 0 taken away."""
    values: Tensor = torch.linalg.eigvalsh(moment)
    values = values.flip(-1).clamp_min(0.0)
    in_range(values, dtype)
    return values.to(dtype)


def _gram64(z: Tensor, center: bool, normalize: bool) -> tuple[Tensor, Tensor]:
    """(Centred) rows x and xxᵀ/n in float64, the latter exactly 0 where C is rounding noise."""
    rows = read_rows(z, normalize, torch.float64)
    x = center_rows(rows, center)
    gram = x @ x.mT / z.shape[-2]
    if center:
        spread = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        noise = is_negligible(spread, rows.square().sum((-2, -1)) / z.shape[-2])
        gram = torch.where(noise[..., None, None], 0.0, gram)
    return x, gram


def spectrum(z: Tensor, center: bool, normalize: bool) -> Tensor:
    n, d = z.shape[-2:]
    if n >= d:
        return eigenvalues(second_moment64(z, center, normalize), accumulation_dtype(z.dtype))
    # the smaller Gram matrix has the same eigenvalues but for d - n zeros
    values = eigenvalues(_gram64(z, center, normalize)[1], accumulation_dtype(z.dtype))
    return torch.nn.functional.pad(values, (0, d - n))


def spectrum_backward(grad: Tensor, z: Tensor, center: bool, normalize: bool) -> Tensor:
    # exact for symmetric functions of the eigenvalues also where these repeat: no 1/(λᵢ - λⱼ) appears
    n, d = z.shape[-2:]
    wide = n < d
    if wide:
        x, matrix = _gram64(z, center, normalize)
    else:
        x = center_rows(read_rows(z, normalize, torch.float64), center)
        matrix = second_moment64(z, center, normalize)
    _, vectors = torch.linalg.eigh(matrix)
    outer = vectors * grad[..., : min(n, d)].double().flip(-1).unsqueeze(-2) @ vectors.mT
    dx = 2.0 / n * (outer @ x if wide else x @ outer)
    return read_rows_backward(center_rows(dx, center), z, normalize)
