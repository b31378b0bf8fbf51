"""Rows as every op reads them: accumulation dtype, normalisation, centring, and their gradients."""

import torch
from torch import Tensor

from spectral_kernels import checks

# a selection counts a row that is no longer than this as unseen
NORM_FLOOR = 1e-12


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 rows, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flatten(z: Tensor) -> Tensor:
    """(..., n, d) to (b, n, d)."""
    return z if z.ndim == 3 else z.reshape(-1, z.shape[-2], z.shape[-1])


def _peak(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Largest magnitude, 1 where all are 0; a constant to derivatives."""
    peak = x.detach().abs().amax(dim, keepdim=True)
    return torch.where(peak > 0, peak, 1.0)


def _scale_and_unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """1/‖x‖ and x/‖x‖ of each row, 0 of a zero row."""
    # of largest magnitude 1, no row's squares over- or underflow
    peak = _peak(x, -1)
    x = x / peak
    square = x.square().sum(-1, keepdim=True)
    seen = square > 0
    inverse = torch.where(seen, torch.where(seen, square, 1.0).rsqrt(), 0.0)
    # a subnormal row's inverse length may not be a number
    return (inverse / peak).clamp_max(torch.finfo(x.dtype).max), x * inverse


def read_rows(z: Tensor, normalize: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Rows in the accumulation dtype, or in `dtype`, L2-normalised on request: each but a zero row, whatever its length."""
    x = z.to(dtype or accumulation_dtype(z.dtype))
    return _scale_and_unit(x)[1] if normalize else x


def read_rows_backward(grad: Tensor, z: Tensor, normalize: bool) -> Tensor:
    """Gradient on z from the gradient on `read_rows(z)`; 0 on zero rows, where the direction is undefined."""
    if not normalize:
        return grad.to(z.dtype)
    inverse, unit = _scale_and_unit(z.to(grad.dtype))
    return ((grad - unit * (unit * grad).sum(-1, keepdim=True)) * inverse).to(z.dtype)


def unit_scale(z: Tensor) -> Tensor:
    """The power of two (..., 1, 1) that brings the largest magnitude of a batch (..., n, d) to about 1, exactly.

    For what does not depend on the scale of its rows: their squares then do not over- or underflow.
    """
    peak = _peak(z.to(accumulation_dtype(z.dtype)), (-2, -1))
    # both 2^limit and 2^-limit are normal numbers
    limit = 1022 if peak.dtype == torch.float64 else 126
    return torch.ldexp(torch.ones_like(peak), -torch.frexp(peak).exponent.clamp(-limit, limit))


def center_rows(x: Tensor, center: bool) -> Tensor:
    """Rows minus their mean."""
    return x - x.mean(-2, keepdim=True) if center else x


def too_narrow(z: Tensor, total: Tensor, spread: Tensor) -> bool:
    """Whether float32 does not do for the moments of rows (b, n, d): their squares leave its range, or nearly equal rows differ
    by its rounding. `total` is the sum of the squares of each batch, `spread` that of the centred rows.
    """
    if spread.dtype == torch.float64 or not checks.readable(spread):
        return False
    square = total / z.shape[-2]
    return not bool(((square > 1e-24) & (square < 1e24) & (spread > 1e-7 * total)).all())


def in_range(variances: Tensor, dtype: torch.dtype) -> None:
    """Raise where the largest of the float64 variances or eigenvalues (b, d) is infinite, or no normal number, in `dtype`."""
    if checks.readable(variances):
        largest, limits = variances.amax(-1), torch.finfo(dtype)
        if bool(((largest > limits.max) | ((largest > 0) & (largest < limits.tiny))).any()):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"z has variances beyond {name}; scale its rows{', or give float64' if name == 'float32' else ''}"
            )


def negligible_share(dtype: torch.dtype) -> float:
    """The share of tr M up to which tr C, in `dtype`, is rounding noise."""
    return float((32 * torch.finfo(dtype).eps) ** 2)


def is_negligible(spread: Tensor, total: Tensor) -> Tensor:
    """Whether tr C (`spread`) is rounding noise of tr M (`total`), as it is for identical rows."""
    return spread <= negligible_share(spread.dtype) * total
