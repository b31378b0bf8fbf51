"""Products of rows with each other, or with other rows, a tile a program, chunk by chunk.

Norms and mean come from a pass before; of symmetric products there are the tiles on and below the diagonal. The last
programs to finish add the chunks, and make a rank, of which only one number is left.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import words as error_words
from spectral_kernels.kernels.launch import Configuration, launch
from spectral_kernels.kernels.precision import arithmetic, dot_precision, triton_dtype
from spectral_kernels.kernels.rows import NO_STRIDES, WORD, batch_strides, holds_nan, load_part, note_rows, operand
from spectral_kernels.kernels.statistics import Statistics, checked_inverse_norm, column_mean, row_statistics
from spectral_kernels.kernels.sums import add_parts, arrive, counters, part_slots, split_rows
from spectral_kernels.ops._rows import negligible_share
from spectral_kernels.ops.effective_rank.store_rank import store_rank

# rows that one accumulator adds up: float32 sums over more of them lose digits
LONGEST_CHUNK = 4096


@triton.jit
def tile_of(tile, side_tiles, CROSS: tl.constexpr):
    """Row and column of a tile: of all of them (CROSS), or of those on and below the diagonal."""
    if CROSS:
        i = tile // side_tiles
        j = tile % side_tiles
    else:
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        j = tile - i * (i + 1) // 2
    return i, j


@triton.jit
def store_tile(matrix, batch, value, rows, columns, side, CROSS: tl.constexpr):
    """Write a tile, and its mirror image unless CROSS."""
    inside = (rows < side)[:, None] & (columns < side)[None, :]
    if not CROSS:
        inside = inside & (rows[:, None] >= columns[None, :])
    base = matrix + batch * side * side
    row = rows.to(tl.int64)
    column = columns.to(tl.int64)
    tl.store(base + row[:, None] * side + column[None, :], value, mask=inside)
    if not CROSS:
        tl.store(base + column[None, :] * side + row[:, None], value, mask=inside)


@triton.jit
def tile_sums(value, rows, columns):
    """Trace and squared Frobenius norm that a tile on or below the diagonal of a symmetric matrix adds."""
    on = rows[:, None] == columns[None, :]
    weight = tl.where(on, 1.0, tl.where(rows[:, None] > columns[None, :], 2.0, 0.0))
    trace = tl.sum(tl.sum(tl.where(on, value, 0.0), 1), 0)
    return trace, tl.sum(tl.sum(value * value * weight, 1), 0)


@triton.jit(
    do_not_specialize=[
        "n", "mean_splits", "mean_count", "splits", "slots", "chunk", "tiles", "side_tiles", "quartic_count",
        "count", "z_batch", "z_row", "left_batch", "left_row",
    ]
)  # fmt: skip
def tiles_kernel(
    z, index, scale, sums, left, parts, norms, counters, matrix, left_sums, stats, quartics, grad, rank_out, weights,
    errors, n, d, mean_splits, mean_count, splits, slots, chunk, tiles, side_tiles, quartic_count, count,
    z_unit, z_batch, z_row, left_unit, left_batch, left_row,
    GRAM: tl.constexpr, NORMALIZE: tl.constexpr, CENTER: tl.constexpr, CROSS: tl.constexpr, MATRIX: tl.constexpr,
    RANK: tl.constexpr, NEGLIGIBLE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of xᵀx, of xxᵀ (GRAM) or of leftᵀx (CROSS), over a chunk of the other dimension, which `add_parts` adds up.

    MATRIX: divided by `count` to `matrix` (b, side, side). RANK: the last of a batch's tiles makes of `stats` (b, tiles, 3)
    its R₂, as `store_rank`. Norms come in `scale`; without it a GRAM computes those of its rows as it reads them. A CROSS with
    `left_sums` (b, d) writes the column sums of left there.
    """
    FUSED: tl.constexpr = GRAM and NORMALIZE and scale is None
    z_batch = z_batch.to(tl.int64) * (z_unit if index is None else 1)
    z_row *= z_unit
    left_batch = left_batch.to(tl.int64) * left_unit
    left_row *= left_unit
    chunk *= BLOCK_K
    pid = tl.program_id(0)
    split = pid % splits
    tile = pid // splits % tiles
    batch = (pid // splits // tiles).to(tl.int64)
    i, j = tile_of(tile, side_tiles, CROSS)
    a_side = i * BLOCK + tl.arange(0, BLOCK)
    b_side = j * BLOCK + tl.arange(0, BLOCK)
    begin = split * chunk
    acc = tl.zeros([BLOCK, BLOCK], dtype=ACC)
    a_squares = tl.zeros([BLOCK], dtype=ACC)
    b_squares = tl.zeros([BLOCK], dtype=ACC)
    mean_square = tl.full([], 0.0, dtype=ACC)
    if GRAM:
        end = tl.minimum(begin + chunk, d)
        mean = tl.zeros([BLOCK_K], dtype=ACC)
        for first in range(begin, end, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            if CENTER:
                mean = column_mean(sums, batch, columns, mean_count, d, mean_splits)
            a = load_part(
                z, index, scale, batch, a_side, columns, n, n, d, z_batch, z_row, mean, NORMALIZE and not FUSED, CENTER,
                ACC,
            )  # fmt: skip
            b = load_part(
                z, index, scale, batch, b_side, columns, n, n, d, z_batch, z_row, mean, NORMALIZE and not FUSED, CENTER,
                ACC,
            )  # fmt: skip
            if FUSED:
                a_squares += tl.sum(a * a, 1)
                b_squares += tl.sum(b * b, 1)
            a = operand(a, a_side[:, None] < n, False, PRECISION)
            b = operand(b, b_side[:, None] < n, False, PRECISION)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=ACC)
        side = n
    else:
        end = tl.minimum(begin + chunk, n)
        a_mean = tl.zeros([BLOCK], dtype=ACC)
        b_mean = tl.zeros([BLOCK], dtype=ACC)
        if CENTER:
            a_mean = column_mean(sums, batch, a_side, mean_count, d, mean_splits)
            b_mean = column_mean(sums, batch, b_side, mean_count, d, mean_splits)
            mean_square = tl.where(i == j, tl.sum(a_mean * a_mean, 0), 0.0)
        left_rows = tl.zeros([BLOCK_K, BLOCK], dtype=ACC)
        for first in range(begin, end, BLOCK_K):
            rows = first + tl.arange(0, BLOCK_K)
            if CROSS:
                a = load_part(
                    left, None, scale, batch, rows, a_side, end, n, d, left_batch, left_row, a_mean, False, False, ACC
                )
                if left_sums is not None:
                    left_rows += a
            else:
                a = load_part(
                    z, index, scale, batch, rows, a_side, end, n, d, z_batch, z_row, a_mean, NORMALIZE, CENTER, ACC
                )
            b = load_part(
                z, index, scale, batch, rows, b_side, end, n, d, z_batch, z_row, b_mean, NORMALIZE, CENTER, ACC
            )
            a = operand(a, (rows < end)[:, None] & (a_side < d)[None, :], not (NORMALIZE or CENTER), PRECISION)
            b = operand(b, (rows < end)[:, None] & (b_side < d)[None, :], not (NORMALIZE or CENTER), PRECISION)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION, out_dtype=ACC)
        if left_sums is not None:
            a_squares = tl.sum(left_rows, 0)
        side = d
    if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
        if i == j:  # noqa: SIM102 (one after the other: the diagonal shows what is in a row or a column)
            if holds_nan(acc):
                if GRAM:
                    begin = i * BLOCK
                    end = tl.minimum(begin + BLOCK, n)
                note_rows(errors, errors + WORD, z, index, batch, begin, end, n, d, z_batch, z_row)
    both = tl.reshape(tl.join(a_squares, b_squares), [2 * BLOCK])
    base = (((batch * tiles) + tile) * slots).to(tl.int32)
    alive, acc, both = add_parts(split >= 0, acc, both, parts, norms, counters, base, split, splits, BLOCK, 2 * BLOCK)
    a_squares, b_squares = tl.split(tl.reshape(both, [BLOCK, 2]))
    if alive:
        if FUSED:
            acc = acc * checked_inverse_norm(a_squares)[:, None] * checked_inverse_norm(b_squares)[None, :]
        if MATRIX:
            store_tile(matrix, batch, acc / count, a_side, b_side, side, CROSS)
        if left_sums is not None:  # noqa: SIM102 (constants decide whether there are sums)
            if j == 0:
                tl.store(left_sums + batch * d + a_side, a_squares, mask=a_side < d)
        if RANK:
            if GRAM and CENTER:  # noqa: SIM102 (constants decide whether there is a mean)
                if tile == 0:
                    for first in range(0, d, BLOCK_K):
                        mean = column_mean(sums, batch, first + tl.arange(0, BLOCK_K), mean_count, d, mean_splits)
                        mean_square += tl.sum(mean * mean, 0)
            t, f = tile_sums(acc, a_side, b_side)
            at = stats + 3 * (batch * tiles + tile)
            tl.store(at, t)
            tl.store(at + 1, f)
            tl.store(at + 2, mean_square)
            # after those of the tiles
            if arrive(counters + tl.num_programs(0) // splits * slots + batch, tiles):
                t = tl.full([], 0.0, dtype=ACC)
                f = tl.full([], 0.0, dtype=ACC)
                mean_square = tl.full([], 0.0, dtype=ACC)
                for first in range(0, tiles, BLOCK):
                    other = first + tl.arange(0, BLOCK)
                    there = stats + 3 * (batch * tiles + other)
                    t += tl.sum(tl.load(there, mask=other < tiles, other=0.0, cache_modifier=".cg"), 0)
                    f += tl.sum(tl.load(there + 1, mask=other < tiles, other=0.0, cache_modifier=".cg"), 0)
                    mean_square += tl.sum(tl.load(there + 2, mask=other < tiles, other=0.0, cache_modifier=".cg"), 0)
                store_rank(
                    t, f, mean_square, quartics, quartic_count, grad, rank_out, weights, batch, n,
                    CENTER, NEGLIGIBLE, ACC, BLOCK,
                )  # fmt: skip


# by arithmetic and side; stages and blocks are the largest that do not spill (bench/aot.py)
TILES = {
    ("ieee", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4, num_stages=1),
    ("ieee", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8, num_stages=1),
    ("tensor", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4),
    ("tensor", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8),
    ("fp64", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=8, num_stages=1),
}
CONFIGURATIONS = {f"tiles {key}": use for key, use in TILES.items()}


@dataclass(frozen=True)
class RankInputs:
    """Partial Σ‖x‖⁴ (b, parts), which make the rank unbiased, and the gradient on it (b,), which asks for weights (b, 4)."""

    quartics: Tensor | None
    grad: Tensor | None


@dataclass(frozen=True)
class Tiles:
    """What one launch over tiles returns; None: not wanted."""

    matrix: Tensor | None
    rank: Tensor | None
    weights: Tensor | None


def tile_statistics(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, acc: torch.dtype, gram: bool
) -> Statistics:
    """What `tile_products` needs of a pass before: a Gram matrix shows the norms of its rows, but not their mean."""
    return Statistics() if gram and not center else row_statistics(z, index, normalize, center, acc)


def tile_products(
    z: Tensor, index: Tensor | None, statistics: Statistics, normalize: bool, acc: torch.dtype, *,
    precision: str = "ieee", count: int = 1, gram: bool = False, matrix: bool = True, rank: RankInputs | None = None,
    left: Tensor | None = None, left_sums: Tensor | None = None,
) -> Tiles:  # fmt: skip
    """Matrix and order-2 rank, where wanted, of rows z (b, n, d), or of a pool (N, d) with index (b, n)."""
    b, n = z.shape[:2] if index is None else index.shape
    d = z.shape[-1]
    side, length = (n, d) if gram else (d, n)
    kind = arithmetic(precision, z.dtype, acc)
    use = TILES[kind, 64 if side <= 64 or kind == "fp64" else 128]
    block = use["BLOCK"]
    side_tiles = -(-side // block)
    tiles = side_tiles * side_tiles if left is not None else side_tiles * (side_tiles + 1) // 2
    splits, chunk = split_rows(length, use["BLOCK_K"], b * tiles, LONGEST_CHUNK)
    slots = part_slots(splits)
    # one part alone is not stored
    places = b * tiles * slots if splits > 1 else 0
    parts, norms = z.new_empty(places, block, block, dtype=acc), z.new_empty(places, 2 * block, dtype=acc)
    result = z.new_empty(b, side, side, dtype=acc) if matrix else None
    value = weights = quartics = grad = stats = None
    if rank is not None:
        value, stats, quartics, grad = (
            z.new_empty(b, dtype=acc),
            z.new_empty(b, tiles, 3, dtype=acc),
            rank.quartics,
            rank.grad,
        )
        weights = z.new_empty(b, 4, dtype=acc) if grad is not None else None
    launch(
        tiles_kernel,
        b * tiles * splits,
        (
            z, index, statistics.scale, statistics.sums, left, parts, norms,
            counters(z, b * tiles * slots + b), result,
            left_sums, stats, quartics, grad, value, weights, error_words(z) if left is None else None, n, d,
            statistics.splits, statistics.count, splits, slots,
            chunk, tiles, side_tiles, 1 if quartics is None else quartics.shape[1], count, *batch_strides(z),
            *(batch_strides(left) if left is not None else NO_STRIDES),
        ),
        {
            "GRAM": gram, "NORMALIZE": normalize, "CENTER": statistics.sums is not None, "CROSS": left is not None,
            "MATRIX": matrix, "RANK": rank is not None,
            "NEGLIGIBLE": 0.0 if rank is None else negligible_share(acc),
            "ACC": triton_dtype(acc), "PRECISION": dot_precision(precision, z.dtype, acc),
        },
        use,
    )  # fmt: skip
    return Tiles(result, value, weights)


def cross_product(left: Tensor, z: Tensor, mean: Tensor, left_sums: Tensor | None = None) -> Tensor:
    """leftᵀ (z − mean): (b, d, d) from two (b, n, d) and mean (b, d); the column sums of left to `left_sums` (b, d)."""
    result = tile_products(z, None, Statistics(sums=mean), False, mean.dtype, left=left, left_sums=left_sums).matrix
    assert result is not None
    return result
