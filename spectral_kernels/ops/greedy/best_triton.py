"""What a step of greedy selection maximises, and which row it takes: of all rows, or of those drawn for it."""

import triton
import triton.language as tl

from spectral_kernels.ops.greedy.pool_triton import FREE_SEEN, keys_of, row_of
from spectral_kernels.ops.greedy.reference import RIDGE, TIE, TIE_FLOOR

TIE_SHARE = tl.constexpr(TIE)
TIE_LEAST = tl.constexpr(TIE_FLOOR)
DELTA = tl.constexpr(RIDGE)


@triton.jit
def score_of(overlap, square, t, frobenius, LOGDET: tl.constexpr, NORMALIZE: tl.constexpr):
    """What a step maximises, from overlap = Σ (x_j·u)² and square = ‖x_j‖²."""
    if LOGDET:
        score = tl.maximum(square / DELTA - overlap, 0.0)
    elif NORMALIZE:
        score = -overlap
    else:
        after = frobenius + 2.0 * overlap + square * square
        score = (t + square) * (t + square) / tl.where(after > 0, after, 1.0)
    return score


@triton.jit
def within_tie(value, best):
    return value >= best - TIE_SHARE * tl.abs(best) - TIE_LEAST


@triton.jit
def best_of_all(overlaps, squares, free, n, seed, bits, t, frobenius, LOGDET, NORMALIZE, BLOCK: tl.constexpr):
    """Of the free rows whose score ties with the best of all that of the lowest key; n if no row is free and seen."""
    best = tl.full([], float("-inf"), dtype=tl.float64)
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        usable = tl.load(free + rows, mask=rows < n, other=0) == FREE_SEEN
        overlap = tl.load(overlaps + rows, mask=rows < n, other=0.0)
        square = tl.load(squares + rows, mask=rows < n, other=1.0)
        value = score_of(overlap, square, t, frobenius, LOGDET, NORMALIZE)
        best = tl.maximum(best, tl.max(tl.where(usable, value, float("-inf")), 0))
    none = tl.full([], 1, dtype=tl.int64) << bits
    key = none
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        usable = tl.load(free + rows, mask=rows < n, other=0) == FREE_SEEN
        overlap = tl.load(overlaps + rows, mask=rows < n, other=0.0)
        square = tl.load(squares + rows, mask=rows < n, other=1.0)
        value = score_of(overlap, square, t, frobenius, LOGDET, NORMALIZE)
        ties = usable & within_tie(value, best)
        if tl.max(tl.where(ties, 1, 0), 0) > 0:
            key = tl.minimum(key, tl.min(tl.where(ties, keys_of(rows, seed, bits), none), 0))
    return tl.where(key < none, row_of(key, seed, bits), n).to(tl.int64)


@triton.jit
def best_of_draws(
    drawn, m, x, vectors, squares, free, scores, step, n, d, t, frobenius, LOGDET, NORMALIZE,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """First drawn row, free and seen, whose score ties with the best of the draws; n if there is none."""
    best = tl.full([], float("-inf"), dtype=tl.float64)
    for first in range(0, m, BLOCK_M):
        at = first + tl.arange(0, BLOCK_M)
        rows = tl.load(drawn + at, mask=at < m, other=-1)
        inside = (rows >= 0) & (rows < n)
        overlap = tl.zeros([BLOCK_M], dtype=tl.float64)
        for first_pick in range(0, step, BLOCK_S):
            picks = first_pick + tl.arange(0, BLOCK_S)
            product = tl.zeros([BLOCK_M, BLOCK_S], dtype=tl.float64)
            for first_column in range(0, d, BLOCK_K):
                columns = first_column + tl.arange(0, BLOCK_K)
                a = tl.load(
                    x + rows[:, None] * d + columns[None, :],
                    mask=inside[:, None] & (columns < d)[None, :],
                    other=0.0,
                )
                u = tl.load(
                    vectors + picks[:, None] * d + columns[None, :],
                    mask=(picks < step)[:, None] & (columns < d)[None, :],
                    other=0.0,
                )
                product = tl.dot(a.to(tl.float64), tl.trans(u), product, input_precision="ieee", out_dtype=tl.float64)
            overlap += tl.sum(product * product, 1)
        usable = tl.load(free + rows, mask=inside, other=0) == FREE_SEEN
        square = tl.load(squares + rows, mask=inside, other=1.0)
        value = tl.where(usable, score_of(overlap, square, t, frobenius, LOGDET, NORMALIZE), float("-inf"))
        tl.store(scores + at, value, mask=at < m)
        best = tl.maximum(best, tl.max(value, 0))
    tl.debug_barrier()
    place = m
    for first in range(0, m, BLOCK_M):
        at = first + tl.arange(0, BLOCK_M)
        value = tl.load(scores + at, mask=at < m, other=float("-inf"))
        usable = (value > float("-inf")) & within_tie(value, best)
        place = tl.minimum(place, tl.min(tl.where(usable, at, m), 0))
    row = tl.load(drawn + tl.minimum(place, m - 1))
    return tl.where(place < m, row, n).to(tl.int64)
