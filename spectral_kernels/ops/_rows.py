"""Rows as every op reads them: accumulation dtype, normalisation, centring, and their gradients."""

import torch
from torch import Tensor

# as torch.nn.functional.normalize: a row shorter than this counts as zero
NORM_FLOOR = 1e-12


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 rows, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flatten(z: Tensor) -> Tensor:
    """(..., n, d) to (b, n, d)."""
    return z if z.ndim == 3 else z.reshape(-1, z.shape[-2], z.shape[-1])


def read_rows(z: Tensor, normalize: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Rows in the accumulation dtype, or in `dtype`, L2-normalised on request."""
    x = z.to(dtype or accumulation_dtype(z.dtype))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_FLOOR) if normalize else x


def read_rows_backward(grad: Tensor, z: Tensor, normalize: bool) -> Tensor:
    """Gradient on z from the gradient on `read_rows(z)`; 0 on zero rows, where the direction is undefined."""
    if not normalize:
        return grad.to(z.dtype)
    x = z.to(grad.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / norm.clamp_min(NORM_FLOOR)
    tangent = grad - unit * (unit * grad).sum(-1, keepdim=True)
    return torch.where(norm > NORM_FLOOR, tangent / norm.clamp_min(NORM_FLOOR), 0.0).to(z.dtype)


def center_rows(x: Tensor, center: bool) -> Tensor:
    """Rows minus their mean."""
    return x - x.mean(-2, keepdim=True) if center else x


def negligible_share(dtype: torch.dtype) -> float:
    """The share of tr M up to which tr C, in `dtype`, is rounding noise."""
    return float((32 * torch.finfo(dtype).eps) ** 2)


def is_negligible(spread: Tensor, total: Tensor) -> Tensor:
    """Whether tr C (`spread`) is rounding noise of tr M (`total`), as it is for identical rows."""
    return spread <= negligible_share(spread.dtype) * total
