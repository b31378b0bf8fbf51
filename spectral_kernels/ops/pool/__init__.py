"""Pool selector: the best of several random candidate batches."""

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._selection import (
    Selection,
    check_generator,
    check_window,
    sample_without_replacement,
)
from spectral_kernels.ops.effective_rank import batch_effective_rank

__all__ = ["POLICIES", "Selection", "pool_select"]

POLICIES = {"low": 0.0, "balanced": 0.5, "high": 1.0}


def _quantile(policy: str | float) -> float:
    if isinstance(policy, str):
        return POLICIES[checks.one_of(policy, "policy", POLICIES)]
    what = f"one of {', '.join(POLICIES)} or a quantile in [0, 1]"
    return checks.number(policy, "policy", what, lambda x: 0 <= x <= 1)


def pool_select(
    pool: Tensor,
    batch_size: int,
    *,
    draws: int = 16,
    policy: str | float = "balanced",
    window: tuple[float, float] | None = None,
    order: float = 2.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Selection:
    """Draw several random batches and return one by its effective rank (pool selector, docs/theory.md §5).

    Args:
        pool: (N, d) embeddings, float64, float32, bfloat16 or float16.
        batch_size: rows per batch, at most N, distinct.
        draws: candidate batches.
        policy: `"low"`, `"balanced"` (the median, or with a window the batch closest to its middle), `"high"`, or a
            quantile in [0, 1] of the draws' effective ranks. The paper's P1, P2 and P3 are read as the three names.
        window: (lo, hi) in units of effective rank; draws inside it are preferred, whatever the policy, and
            where none is inside the closest one is taken.
        order: of the effective rank.
        generator: of any device; None uses torch's global one.
        backend: see `use_backend`.

    Returns:
        `Selection`: indices (batch_size,) of the batch chosen, effective_rank and objective (draws,) of every draw.
        Ties go to the first draw.

    Raises:
        ValueError: wrong shape or dtype, batch_size not in [1, N], draws below 1, unknown policy, bad window or
            order, a drawn row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    pool = checks.floating(pool, "pool", ndim=2)
    batch_size = checks.integer(batch_size, "batch_size", 1, pool.shape[0])
    draws = checks.integer(draws, "draws", 1)
    _quantile(policy), check_window(window)
    check_generator(generator)
    indices = sample_without_replacement(pool.shape[0], draws, batch_size, generator, pool)
    return best_draw(pool, indices, policy=policy, window=window, order=order, backend=backend)


def best_draw(
    pool: Tensor,
    indices: Tensor,
    *,
    policy: str | float,
    window: tuple[float, float] | None,
    order: float,
    backend: str | None = None,
) -> Selection:
    """What `pool_select` returns of draws that are given, indices (draws, batch_size) int64."""
    quantile, edges = _quantile(policy), check_window(window)
    ranks = batch_effective_rank(pool.detach(), indices, order=order, backend=backend)
    if edges is not None and policy == "balanced":
        chosen = (ranks - 0.5 * (edges[0] + edges[1])).abs().argmin().reshape(1)
    else:
        chosen = _quantile_of(ranks, quantile, edges)
    return Selection(indices.index_select(0, chosen)[0], ranks, ranks)


def _quantile_of(ranks: Tensor, quantile: float, edges: list[float] | None) -> Tensor:
    """Position (1,) of a quantile among the draws inside the window, or nearest to it."""
    outside = torch.zeros_like(ranks)
    if edges is not None:
        outside = (edges[0] - ranks).clamp_min(0) + (ranks - edges[1]).clamp_min(0)
    kept = outside <= outside.min()
    by_rank = torch.where(kept, ranks, torch.inf).argsort(stable=True)
    return by_rank.gather(0, ((kept.sum() - 1) * quantile).round().long().reshape(1))
