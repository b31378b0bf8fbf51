"""Standard error of the order-2 effective rank, by the jackknife over rows."""

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import float64_needed
from spectral_kernels.ops._rows import center_rows, is_negligible, read_rows
from spectral_kernels.ops.effective_rank.reference import rank2_from_sums


def _without(x: Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Σ‖x‖², ‖XᵀX‖²_F and Σ‖x‖⁴ of the other n − 1 rows, centred on their own mean, for each row left out: (..., n)."""
    n, d = x.shape[-2:]
    squared = x.square().sum(-1)
    t, q = squared.sum(-1, keepdim=True), squared.square().sum(-1, keepdim=True)
    if d <= n:
        gram = x.mT @ x
        along = ((x @ gram) * x).sum(-1)
    else:
        gram = x @ x.mT
        along = gram.square().sum(-1)
    f = gram.square().sum((-2, -1)).unsqueeze(-1)
    if not center:
        return t - squared, f - 2 * along + squared.square(), q - squared.square()
    # leaving row i out moves the mean by −x_i/(n−1), and S = XᵀX by −n/(n−1)·x_i x_iᵀ
    w, m = n / (n - 1), 1 / (n - 1)
    pull = (x * (squared.unsqueeze(-1) * x).sum(-2, keepdim=True)).sum(-1)
    # Σ over all j of ‖x_j + m·x_i‖⁴, less that of j = i
    moved = q + 4 * m * pull + 2 * m**2 * squared * t + 4 * m**2 * along + n * m**4 * squared.square()
    return (
        t - w * squared,
        f - 2 * w * along + w**2 * squared.square(),
        moved - (1 + m) ** 4 * squared.square(),
    )


def effective_rank_error(z: Tensor, *, center: bool = False, normalize: bool = True, unbiased: bool = False) -> Tensor:
    """Jackknife standard error of `effective_rank(z, order=2, ...)` of each batch: √((n−1)/n·Σ(Rᵢ − R̄)²), Rᵢ the
    effective rank without row i (Efron & Tibshirani 1993, chapter 11).

    In closed form, at the price of one effective rank: nothing is recomputed for a row. It is about the scatter of the
    estimate, not about its bias (of n isotropic rows the plain R₂ is near nd/(n + d − 1)), and rather too large than too
    small (Efron & Stein 1981).

    Args:
        z: (..., n, d), float64, float32, bfloat16 or float16; computed in float64.
        center, normalize, unbiased: as given to `effective_rank`.

    Returns:
        (...,), float64 for float64 rows, else float32; inf where leaving one row out makes the unbiased estimate infinite.

    Raises:
        ValueError: what `effective_rank` refuses of n − 1 rows, a row that holds NaN or Inf.
    """
    z = checks.floating(z, "z")
    checks.finite_rows(z, "z")
    least = 2 + (0 if not unbiased else 3 if center else 1)
    n = z.shape[-2]
    if n < least:
        raise ValueError(f"z must have at least {least} rows with center={center}, unbiased={unbiased}, got {n}")
    with torch.no_grad(), float64_needed("effective_rank_error", z.device):
        rows = read_rows(z.double(), normalize)
        x = center_rows(rows, center)
        t, f, q = _without(x, center)
        total = rows.square().sum((-2, -1)).unsqueeze(-1)
        zero = is_negligible(t, total.expand_as(t)) | (t <= 0)
        ranks = rank2_from_sums(t, f.clamp(min=0), q, zero, n - 1, center, unbiased).value
        scatter = (ranks - ranks.mean(-1, keepdim=True)).square().sum(-1)
        error = ((n - 1) / n * scatter).sqrt()
        error = torch.where(ranks.isinf().any(-1), torch.inf, error)
        return error.to(z.dtype if z.dtype == torch.float64 else torch.float32)
