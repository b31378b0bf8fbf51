"""Window: the range of effective rank that a batch is chosen from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_kernels.ops._selection import check_window
from spectral_kernels.ops.pool import pool_select


class _Edges(NamedTuple):
    lo: float
    hi: float


class EffectiveRankWindow(_Edges):
    """Range (lo, hi) of effective rank (docs/theory.md §5): a pair, wherever a `window` is taken.

    Of its draws `pool_select` takes one inside, whatever the policy, and failing that the nearest.

    Raises:
        ValueError: not finite, or not 0 <= lo <= hi.
    """

    __slots__ = ()

    def __new__(cls, lo: float, hi: float) -> "EffectiveRankWindow":
        check_window((lo, hi))
        if math.isinf(hi):
            raise ValueError(f"window must be finite, got {(lo, hi)!r}")
        return super().__new__(cls, float(lo), float(hi))

    @classmethod
    def around_random(
        cls,
        pool: Tensor,
        batch_size: int,
        low: float,
        high: float,
        *,
        draws: int = 64,
        order: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> "EffectiveRankWindow":
        """Window in shares of what random batches have: `low` to `high` times their median
        effective rank.

        Args:
            pool: (N, d) embeddings, such as a memory bank's; zero rows do not count.
            batch_size: rows per batch.
            low, high: shares, 1 is the median; 0 <= low <= high.
            draws: random batches looked at.
            order: of the effective rank.
            generator: of any device; None uses torch's global one.

        Raises:
            ValueError: bad shares, only zero rows, or what `pool_select` raises.
        """
        check_window((low, high))
        ranks = pool_select(pool, batch_size, draws=draws, order=order, generator=generator).effective_rank
        median = float(ranks.median())
        if not median > 0:
            raise ValueError("pool has nothing to calibrate a window on: random batches hold only zero rows")
        return cls(low * median, high * median)
