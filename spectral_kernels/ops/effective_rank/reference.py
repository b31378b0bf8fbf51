"""Order-2 effective rank as its definition (docs/theory.md §1): (tr M)²/‖M‖²_F, and over many batches of one pool."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._rows import (
    accumulation_dtype,
    center_rows,
    is_negligible,
    read_rows,
    read_rows_backward,
    too_narrow,
    unit_scale,
)
from spectral_kernels.ops.spectrum.reference import spectrum, spectrum_backward


@dataclass(frozen=True)
class Rank2:
    """R₂ of each batch and its derivatives by T = Σᵢ‖xᵢ‖², F = ‖XᵀX‖²_F and Q = Σᵢ‖xᵢ‖⁴; 0 where there is no spread."""

    value: Tensor
    by_trace: Tensor
    by_frobenius: Tensor
    by_quartic: Tensor


def rank2_from_sums(t: Tensor, f: Tensor, q: Tensor, zero: Tensor, n: int, center: bool, unbiased: bool) -> Rank2:
    """R₂ = T²/E where E estimates n² tr M² (plain: F; unbiased: the U-statistic).

    The centred U-statistic for tr C², with an unknown mean, is the estimator of Himeno and Yamada (2014); its scale
    is that of the covariance with n − 1.
    """
    if not unbiased:
        a, b, c = 1.0, 0.0, 0.0
    elif not center:
        a, b, c = n / (n - 1), 0.0, -n / (n - 1)
    else:
        common = (n - 1) / (n * (n - 2) * (n - 3))
        a, b, c = common * (n - 1) * (n - 2), common, -common * n * (n - 1)
    e = a * f + b * t * t + c * q
    positive = ~zero & (e > 0)
    e = torch.where(positive, e, 1.0)
    value = torch.where(positive, t * t / e, torch.where(zero, 0.0, torch.inf))
    by_e = torch.where(positive, -t * t / e.square(), 0.0)
    by_t = torch.where(positive, 2 * t / e, 0.0) + 2 * b * t * by_e
    return Rank2(value, by_t, a * by_e, c * by_e)


def _rank2(z: Tensor, center: bool, normalize: bool, unbiased: bool) -> tuple[Rank2, Tensor]:
    """R₂ and the rows that it is of; in float64 where float32 does not do."""
    rows = read_rows(z, normalize)
    x = center_rows(rows, center)
    n, d = x.shape[-2:]
    norms = x.square().sum(-1)
    t, total = norms.sum(-1), rows.square().sum((-2, -1))
    if too_narrow(z, total, t):
        return _rank2(z.double(), center, normalize, unbiased)
    gram = x.mT @ x if d <= n else x @ x.mT
    zero = is_negligible(t, total) | (total == 0)
    return rank2_from_sums(t, gram.square().sum((-2, -1)), norms.square().sum(-1), zero, n, center, unbiased), x


def effective_rank2(z: Tensor, center: bool, normalize: bool, unbiased: bool) -> Tensor:
    scaled = z if normalize else z * unit_scale(z)
    return _rank2(scaled, center, normalize, unbiased)[0].value.to(accumulation_dtype(z.dtype))


def effective_rank2_backward(grad: Tensor, z: Tensor, center: bool, normalize: bool, unbiased: bool) -> Tensor:
    scale = None if normalize else unit_scale(z)
    scaled = z if scale is None else z * scale
    rank, x = _rank2(scaled, center, normalize, unbiased)
    # of a collapsed batch little is left of the gradient's terms
    if x.dtype != torch.float64 and checks.readable(x) and bool((rank.value < 1.01).any()):
        rank, x = _rank2(scaled.double(), center, normalize, unbiased)
    moment_x = x @ (x.mT @ x) if x.shape[-1] <= x.shape[-2] else (x @ x.mT) @ x
    norms = x.square().sum(-1, keepdim=True)
    weight = [(grad * by)[..., None, None] for by in (rank.by_trace, rank.by_frobenius, rank.by_quartic)]
    dx = center_rows(2 * weight[0] * x + 4 * weight[1] * moment_x + 4 * weight[2] * norms * x, center)
    return read_rows_backward(dx if scale is None else dx * scale, z, normalize)


def batch_effective_rank2(pool: Tensor, indices: Tensor, center: bool, normalize: bool) -> Tensor:
    return effective_rank2(pool[indices], center, normalize, False)


def _scatter_rows(gathered: Tensor, pool: Tensor, indices: Tensor) -> Tensor:
    total = torch.zeros(pool.shape, dtype=accumulation_dtype(pool.dtype), device=pool.device)
    rows = gathered.reshape(-1, pool.shape[1]).to(total.dtype)
    return total.index_add_(0, indices.reshape(-1), rows).to(pool.dtype)


def batch_effective_rank2_backward(
    grad: Tensor, pool: Tensor, indices: Tensor, center: bool, normalize: bool
) -> Tensor:
    return _scatter_rows(effective_rank2_backward(grad, pool[indices], center, normalize, False), pool, indices)


def batch_spectrum(pool: Tensor, indices: Tensor, center: bool, normalize: bool) -> Tensor:
    return spectrum(pool[indices], center, normalize)


def batch_spectrum_backward(grad: Tensor, pool: Tensor, indices: Tensor, center: bool, normalize: bool) -> Tensor:
    return _scatter_rows(spectrum_backward(grad, pool[indices], center, normalize), pool, indices)
