"""Second moments and their gradients.

Up to 128 features one program reads whole rows: it normalises them, takes a pivot (the mean of its batch's first rows) away
so that centring cancels no digits, and adds up xᵀx and the column sums of a chunk of rows; a second kernel, on the whole
chip, adds the chunks. Above, a moment is made by wide.py, all else of tiles on and below the diagonal that are added up
chunk by chunk, with norms and mean from a pass before; the last programs to finish add the chunks, and so does a rank, of
which only one number is left. Sums are taken in a fixed order and both triangles written from one: results are symmetric
to the bit and the same in every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import words as error_words
from spectral_kernels.ops._rows import accumulation_dtype, negligible_share
from spectral_kernels.ops._triton import (
    NO_STRIDES,
    WORD,
    AotCall,
    Configuration,
    Statistics,
    add_parts,
    apply,
    arithmetic,
    arrive,
    batch_strides,
    bf16_products,
    checked_inverse_norm,
    column_mean,
    counters,
    dense_rows,
    dot_precision,
    holds_nan,
    launch,
    load_part,
    load_rows,
    note_rows,
    operand,
    part_slots,
    power_of_two,
    read_rows_backward,
    row_pointers,
    row_statistics,
    split_rows,
    triton_dtype,
    whole_rows,
)
from spectral_kernels.ops.covariance import wide

# rows that one accumulator adds up: float32 sums over more of them lose digits
LONGEST_CHUNK = 4096
# rows of whose chunks a program makes one, at the least: each costs a tile written and read
SHORTEST_CHUNK = 64
# multiprocessors of a large GPU; fixed, so that results do not depend on the device
ONE_EACH = 132


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


@triton.jit
def store_rank(
    t, f, mean_square, quartics, quartic_count, grad, value, weights, batch, n,
    CENTER: tl.constexpr, NEGLIGIBLE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R₂ of a batch from t = tr M and f = ‖M‖² of its undivided matrix, unbiased where Σ‖x‖⁴ comes in `quartics`.

    With `grad` (b,) also `weights` (b, 4), the gradient on the sums, as `rank2_from_sums` in reference.py.
    """
    # n as a float of the accumulation dtype: n⁴ passes 2³¹
    size = tl.full([], 0.0, dtype=ACC) + n
    q = tl.full([], 0.0, dtype=ACC)
    a = size / size
    b = size - size
    c = size - size
    if quartics is not None:
        for first in range(0, quartic_count, BLOCK):
            part = first + tl.arange(0, BLOCK)
            q += tl.sum(tl.load(quartics + batch * quartic_count + part, mask=part < quartic_count, other=0.0), 0)
        if CENTER:
            common = (size - 1) / (size * (size - 2) * (size - 3))
            a = common * (size - 1) * (size - 2)
            b = common
            c = -common * size * (size - 1)
        else:
            a = size / (size - 1)
            c = -a
    total = t
    if CENTER:
        total = t + size * mean_square
    zero = (t <= NEGLIGIBLE * total) | (total == 0)
    e = a * f + b * t * t + c * q
    positive = (e > 0) & (zero == 0)
    safe = tl.where(positive, e, 1.0)
    by_e = tl.where(positive, -(t / safe) * (t / safe), 0.0)
    by_t = tl.where(positive, 2.0 * t / safe, 0.0) + 2.0 * b * t * by_e
    # NaN of NaN rows
    unbounded = tl.where(e == e, float("inf"), e)
    tl.store(value + batch, tl.where(positive, t * (t / safe), tl.where(zero, 0.0, unbounded)))
    if grad is not None:
        g = tl.load(grad + batch)
        tl.store(weights + batch * 4 + 0, t)
        tl.store(weights + batch * 4 + 1, g * by_t)
        tl.store(weights + batch * 4 + 2, g * a * by_e)
        tl.store(weights + batch * 4 + 3, g * c * by_e)


@triton.jit
def add_square(acc, cross, x, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr):
    """xᵀx added to `acc`, but for terms (c + cᵀ) whose c is added to `cross`; PRODUCTS 0: to `acc` alone.

    float32 rows as sums of bf16, on tensor cores: x = h + m + l to 8, 16 or 24 bits (PRODUCTS 1, 2, 4).
    """
    if PRODUCTS == 0:
        acc = tl.dot(tl.trans(x), x, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    else:
        h = x.to(tl.bfloat16)
        h_rows = tl.trans(h)
        if PRODUCTS >= 2:
            rest = x - h.to(tl.float32)
            m = rest.to(tl.bfloat16)
            cross = tl.dot(h_rows, m, cross)
        if PRODUCTS == 4:
            low = (rest - m.to(tl.float32)).to(tl.bfloat16)
            cross = tl.dot(h_rows, low, cross)
            # tensor cores cut off, not round, what they add to a large sum: large terms meet in a small one first
            part = tl.dot(tl.trans(m), m)
            acc += tl.dot(h_rows, h, part)
        else:
            acc = tl.dot(h_rows, h, acc)
    return acc, cross


@triton.jit(do_not_specialize=["n", "splits", "slots", "chunk", "count", "z_batch", "z_row"])
def row_tiles_kernel(
    z, index, parts, pivots, column_sums, counters, matrix, mean_out, rank_out, errors, n, d, splits, slots,
    chunk, count, z_unit, z_batch, z_row,
    NORMALIZE: tl.constexpr, CENTER: tl.constexpr, MATRIX: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr,
    NEGLIGIBLE: tl.constexpr, ACC: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """xᵀx of whole rows (d <= BLOCK) about a pivot, a chunk a program.

    MATRIX: the programs of a batch add up their chunks, which centred and divided by `count` go to `matrix` (b, d, d), with
    their mean. RANK: R₂ goes to `rank_out` (b,). Neither: chunks are left in `parts` (b, splits, BLOCK, BLOCK).
    """
    z_batch = z_batch.to(tl.int64) * (z_unit if index is None else 1)
    z_row *= z_unit
    chunk *= BLOCK_K
    # divisions in 32 bits, then offsets in 64
    pid = tl.program_id(0)
    split = pid % splits
    batch = (pid // splits).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    begin = split * chunk
    end = tl.minimum(begin + chunk, n)
    pivot = tl.zeros([BLOCK], dtype=ACC)
    if CENTER:
        rows = tl.arange(0, BLOCK_K)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        pointers, there = row_pointers(z, index, batch, rows, n, z_batch, z_row)
        x = load_rows(pointers, there, inside, columns, index, ACC)
        if NORMALIZE:
            x *= checked_inverse_norm(tl.sum(x * x, 1))[:, None]
        pivot = tl.sum(x, 0) / tl.minimum(n, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK], dtype=ACC)
    cross = tl.zeros([BLOCK, BLOCK], dtype=ACC)
    # each thread adds up its own rows: FOLD of them are in a tile
    sums = tl.zeros([BLOCK_K // FOLD, BLOCK], dtype=ACC)
    for first in range(begin, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        inside = (rows < end)[:, None] & (columns < d)[None, :]
        pointers, there = row_pointers(z, index, batch, rows, n, z_batch, z_row)
        x = load_rows(pointers, there, inside, columns, index, ACC)
        if NORMALIZE:
            x *= checked_inverse_norm(tl.sum(x * x, 1))[:, None]
        if CENTER:
            x = tl.where(inside, x - pivot[None, :], 0.0)
            sums += tl.sum(tl.reshape(x, [FOLD, BLOCK_K // FOLD, BLOCK]), 0)
        x = operand(x, inside, not (NORMALIZE or CENTER), PRECISION)
        acc, cross = add_square(acc, cross, x, PRODUCTS, PRECISION)
    if PRODUCTS >= 2:
        acc += cross + tl.trans(cross)
    total = tl.sum(sums, 0)
    if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
        if holds_nan(acc):
            note_rows(errors, errors + WORD, z, index, batch, begin, end, n, d, z_batch, z_row)
    if MATRIX or RANK:
        alive = split >= 0
        if SPLIT:
            base = (batch * slots).to(tl.int32)
            alive, acc, total = add_parts(
                alive, acc, total, parts, column_sums, counters, base, split, splits, BLOCK, BLOCK
            )
        if alive:
            mean_square = tl.full([], 0.0, dtype=ACC)
            if CENTER:
                shift = total / n
                # shift·total, through shared memory: a row vector as a column
                acc -= tl.trans(tl.broadcast_to(shift[None, :], [BLOCK, BLOCK])) * total[None, :]
                mean = pivot + shift
                mean_square = tl.sum(mean * mean, 0)
                if MATRIX:
                    tl.store(mean_out + batch * d + columns, mean, mask=columns < d)
            if RANK:
                t, f = tile_sums(acc, columns, columns)
                store_rank(t, f, mean_square, None, 0, None, rank_out, None, batch, n, CENTER, NEGLIGIBLE, ACC, 1)
            if MATRIX:
                store_tile(matrix, batch, acc / count, columns, columns, d, False)
    else:
        at = batch * splits + split
        tl.store(parts + at * BLOCK * BLOCK + columns[:, None] * BLOCK + columns[None, :], acc)
        if CENTER:
            tl.store(column_sums + at * BLOCK + columns, total)
            if split == 0:
                tl.store(pivots + batch * BLOCK + columns, pivot)


@triton.jit(do_not_specialize=["n", "splits", "count"])
def finish_rows_kernel(
    parts, pivots, column_sums, matrix, mean_out, n, d, splits, count,
    CENTER: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add the chunks of WIDTH entries of `row_tiles_kernel`'s tile; write the matrix divided by `count`, and the mean."""
    strips: tl.constexpr = BLOCK * BLOCK // WIDTH
    pid = tl.program_id(0)
    strip = pid % strips
    batch = (pid // strips).to(tl.int64)
    place = strip * WIDTH + tl.arange(0, WIDTH)
    row = place // BLOCK
    column = place % BLOCK
    ACC: tl.constexpr = parts.dtype.element_ty
    total = tl.zeros([PARTS, WIDTH], dtype=tl.float64)
    by_row = tl.zeros([PARTS, WIDTH], dtype=tl.float64)
    by_column = tl.zeros([PARTS, WIDTH], dtype=tl.float64)
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < splits)[:, None]
        at = (batch * splits + part)[:, None] * BLOCK
        total += tl.load(parts + at * BLOCK + place[None, :], mask=inside, other=0.0).to(tl.float64)
        if CENTER:
            by_row += tl.load(column_sums + at + row[None, :], mask=inside, other=0.0).to(tl.float64)
            by_column += tl.load(column_sums + at + column[None, :], mask=inside, other=0.0).to(tl.float64)
    moment = tl.sum(total, 0)
    if CENTER:
        sums = tl.sum(by_column, 0)
        moment -= tl.sum(by_row, 0) * sums / n
        mean = tl.load(pivots + batch * BLOCK + column).to(tl.float64) + sums / n
        tl.store(mean_out + batch * d + column, mean.to(ACC), mask=(row == 0) & (column < d))
    value = (moment / count).to(ACC)
    inside = (row < d) & (column <= row)
    base = matrix + batch * d * d
    tl.store(base + row * d + column, value, mask=inside)
    tl.store(base + column * d + row, value, mask=inside)


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
    its R₂, as `store_rank`. Norms come in `scale`; without it a GRAM takes those of its rows by the way. A CROSS with
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
ROW_TILES = {
    ("ieee", 16): Configuration({"BLOCK": 16, "BLOCK_K": 64, "FOLD": 2}, num_warps=4, num_stages=3),
    ("ieee", 32): Configuration({"BLOCK": 32, "BLOCK_K": 64, "FOLD": 4}, num_warps=4, num_stages=3),
    ("ieee", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32, "FOLD": 4}, num_warps=4, num_stages=3),
    ("ieee", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32, "FOLD": 4}, num_warps=8, num_stages=3),
    ("tensor", 16): Configuration({"BLOCK": 16, "BLOCK_K": 64, "FOLD": 2}, num_warps=4, num_stages=3),
    ("tensor", 32): Configuration({"BLOCK": 32, "BLOCK_K": 64, "FOLD": 4}, num_warps=4, num_stages=3),
    ("tensor", 64): Configuration({"BLOCK": 64, "BLOCK_K": 64, "FOLD": 8}, num_warps=4, num_stages=3),
    ("tensor", 128): Configuration({"BLOCK": 128, "BLOCK_K": 64, "FOLD": 8}, num_warps=8, num_stages=3),
    ("fp64", 16): Configuration({"BLOCK": 16, "BLOCK_K": 32, "FOLD": 1}, num_warps=4),
    ("fp64", 32): Configuration({"BLOCK": 32, "BLOCK_K": 32, "FOLD": 1}, num_warps=4),
    ("fp64", 64): Configuration({"BLOCK": 64, "BLOCK_K": 16, "FOLD": 1}, num_warps=8, num_stages=1),
}
TILES = {
    ("ieee", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4, num_stages=1),
    ("ieee", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8, num_stages=1),
    ("tensor", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4),
    ("tensor", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8),
    ("fp64", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=8, num_stages=1),
}
FINISH = {
    block: Configuration({"BLOCK": block, "WIDTH": 64, "PARTS": 16}, num_warps=4, num_stages=1)
    for block in (16, 32, 64, 128)
}
CONFIGURATIONS = {
    **{f"row_tiles {key}": use for key, use in ROW_TILES.items()},
    **{f"tiles {key}": use for key, use in TILES.items()},
    **{f"finish {key}": use for key, use in FINISH.items()},
}


@dataclass(frozen=True)
class Moments:
    """The matrix (b, side, side), its mean (b, d) where the kernel took it, and the statistics of the rows, if a pass did."""

    matrix: Tensor
    mean: Tensor | None
    statistics: Statistics


def moments(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, *, acc: torch.dtype, precision: str = "ieee",
    count: int = 1, gram: bool = False, one_launch: bool = False,
) -> Moments:  # fmt: skip
    """XᵀX / count, or XXᵀ / count (gram), of normalised, centred rows: z (b, n, d), or a pool (N, d) with index (b, n).

    `one_launch`: where whole rows are read, the programs themselves add up their chunks.
    """
    if not gram and _by_rows(z, precision, acc) is not None:
        return _moments_by_rows(z, index, center, normalize, acc, precision, count, one_launch)
    if not gram and index is None and wide.suits(z, precision, acc):
        return Moments(*wide.moments(z, center, normalize, precision, count), Statistics())
    statistics = Statistics() if _fused(gram, center) else row_statistics(z, index, normalize, center, acc)
    matrix = _tiles(z, index, statistics, normalize, acc, precision, count, gram, matrix=True, rank=None).matrix
    assert matrix is not None
    return Moments(matrix, None, statistics)


def ranks(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, *, acc: torch.dtype, gram: bool
) -> Tensor:  # fmt: skip
    """Order-2 ranks (b,), biased; the matrix, of either side, is never stored."""
    precision = "ieee" if acc == torch.float64 else RANK_PRECISION
    if not gram and _by_rows(z, precision, acc) is not None:
        return _ranks_by_rows(z, index, center, normalize, acc, precision)
    statistics = Statistics() if _fused(gram, center) else row_statistics(z, index, normalize, center, acc)
    value = _tiles(
        z, index, statistics, normalize, acc, precision, 1, gram, matrix=False, rank=RankInputs(None, None)
    ).rank
    assert value is not None
    return value


@dataclass(frozen=True)
class RankInputs:
    """Partial Σ‖x‖⁴ (b, parts), which make the rank unbiased, and the gradient on it (b,), which asks for weights (b, 4)."""

    quartics: Tensor | None
    grad: Tensor | None


@dataclass(frozen=True)
class Tiles:
    """Of one launch over tiles, what was asked for."""

    matrix: Tensor | None
    rank: Tensor | None
    weights: Tensor | None


# three products of bf16 keep 16 bits of each operand; R₂, an average over them, has float32's error
RANK_PRECISION = "bf16x3"


def tiles_and_rank(
    z: Tensor, index: Tensor | None, statistics: Statistics, normalize: bool, acc: torch.dtype, gram: bool,
    matrix: bool, rank: RankInputs,
) -> Tiles:  # fmt: skip
    """Matrix and order-2 rank of rows whose statistics are there."""
    return _tiles(z, index, statistics, normalize, acc, "ieee", 1, gram, matrix=matrix, rank=rank)


def _fused(gram: bool, center: bool) -> bool:
    # a Gram matrix shows the norms of its rows, but not the mean of the normalised ones
    return gram and not center


def _by_rows(z: Tensor, precision: str, acc: torch.dtype) -> Configuration | None:
    """The configuration that reads whole rows, where d allows it."""
    return ROW_TILES.get((arithmetic(precision, z.dtype, acc), power_of_two(z.shape[-1])))


def _tiles(
    z: Tensor, index: Tensor | None, statistics: Statistics, normalize: bool, acc: torch.dtype, precision: str,
    count: int, gram: bool, *, matrix: bool, rank: RankInputs | None, left: Tensor | None = None,
    left_sums: Tensor | None = None,
) -> Tiles:  # fmt: skip
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


def _row_chunks(n: int, block: int, batches: int) -> tuple[int, int]:
    """(splits, blocks in each) of the rows of a batch: a program a multiprocessor, all of its registers being taken."""
    wanted = max(-(-n // LONGEST_CHUNK), min(-(-ONE_EACH // batches), n // SHORTEST_CHUNK), 1)
    chunk = -(-n // (wanted * block))
    return -(-n // (chunk * block)), chunk


def _moments_by_rows(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, acc: torch.dtype, precision: str, count: int,
    one_launch: bool,
) -> Moments:  # fmt: skip
    b, n = z.shape[:2] if index is None else index.shape
    d = z.shape[-1]
    use = _by_rows(z, precision, acc)
    assert use is not None
    block = use["BLOCK"]
    splits, chunk = _row_chunks(n, use["BLOCK_K"], b)
    once = one_launch or splits == 1
    slots, split = (part_slots(splits), splits > 1) if once else (splits, False)
    result = z.new_empty(b, d, d, dtype=acc)
    mean = z.new_empty(b, d, dtype=acc) if center else None
    parts = column_sums = pivots = None
    if splits > 1:
        parts = z.new_empty(b, slots, block, block, dtype=acc)
        column_sums = z.new_empty(b, slots, block, dtype=acc)
        pivots = z.new_empty(b, block, dtype=acc)
    launch(
        row_tiles_kernel,
        b * splits,
        (
            z, index, parts, pivots, column_sums, counters(z, b * slots) if split else None,
            result if once else None, mean if once else None, None, error_words(z), n, d, splits, slots, chunk, count,
            *batch_strides(z),
        ),
        {
            "NORMALIZE": normalize, "CENTER": center, "MATRIX": once, "RANK": False, "SPLIT": split, "NEGLIGIBLE": 0.0,
            "ACC": triton_dtype(acc), "PRODUCTS": bf16_products(precision, z.dtype, acc, not (normalize or center)),
            "PRECISION": dot_precision(precision, z.dtype, acc),
        },
        use,
    )  # fmt: skip
    if not once:
        finish = FINISH[block]
        launch(
            finish_rows_kernel,
            b * (block * block // finish["WIDTH"]),
            (parts, pivots, column_sums, result, mean, n, d, splits, count),
            {"CENTER": center},
            finish,
        )
    return Moments(result, mean, Statistics())


def _ranks_by_rows(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, acc: torch.dtype, precision: str
) -> Tensor:
    b, n = z.shape[:2] if index is None else index.shape
    use = _by_rows(z, precision, acc)
    assert use is not None
    block = use["BLOCK"]
    splits, chunk = _row_chunks(n, use["BLOCK_K"], b)
    slots, split = part_slots(splits), splits > 1
    parts = column_sums = count = None
    if split:
        parts = z.new_empty(b * slots, block, block, dtype=acc)
        column_sums = z.new_empty(b * slots, block, dtype=acc)
        count = counters(z, b * slots)
    value = z.new_empty(b, dtype=acc)
    launch(
        row_tiles_kernel,
        b * splits,
        (
            z, index, parts, None, column_sums, count, None, None, value, error_words(z), n, z.shape[-1], splits, slots,
            chunk, 1, *batch_strides(z),
        ),
        {
            "NORMALIZE": normalize, "CENTER": center, "MATRIX": False, "RANK": True, "SPLIT": split,
            "NEGLIGIBLE": negligible_share(acc), "ACC": triton_dtype(acc),
            "PRODUCTS": bf16_products(precision, z.dtype, acc, not (normalize or center)),
            "PRECISION": dot_precision(precision, z.dtype, acc),
        },
        use,
    )  # fmt: skip
    return value


def cross_product(left: Tensor, z: Tensor, mean: Tensor, left_sums: Tensor | None = None) -> Tensor:
    """leftᵀ (z − mean): (b, d, d) from two (b, n, d) and mean (b, d); the column sums of left to `left_sums` (b, d)."""
    statistics = Statistics(sums=mean)
    result = _tiles(
        z, None, statistics, False, mean.dtype, "ieee", 1, False, matrix=True, rank=None, left=left, left_sums=left_sums
    ).matrix
    assert result is not None
    return result


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
    """Calls whose launches cover this module's kernels and configurations."""

    def call(n: int, d: int, dtype: torch.dtype, plain: bool, precision: str) -> None:
        z = torch.empty(2, n, d, dtype=dtype, device="meta")
        matrix = covariance(z, not plain, not plain, 0, precision)
        covariance_backward(matrix, z, not plain, not plain, 0, precision)

    def gram(dtype: torch.dtype) -> None:
        for rows in (48, 256):
            z = torch.empty(8, rows, 512, dtype=dtype, device="meta")
            for center in (False, True):
                ranks(z, None, center, True, acc=accumulation_dtype(dtype), gram=True)

    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    cases = [(65536, d, dtype, False, "ieee") for d in (16, 32, 64, 128, 512) for dtype in dtypes]
    # rows that are neither normalised nor centred go to the products as they are loaded: other code, other registers
    cases += [(65536, d, dtype, True, "ieee") for d in (128, 512) for dtype in dtypes]
    cases += [(65536, d, torch.float32, plain, name)
              for d in (128, 512) for plain in (False, True) for name in ("tf32", "bf16x3")]  # fmt: skip
    # one chunk of rows: finished in one launch
    cases += [(256, d, dtype, False, "ieee") for d in (128, 2048) for dtype in dtypes]
    calls: list[AotCall] = [lambda case=case: call(*case) for case in cases]  # type: ignore[misc]
    return calls + [lambda dtype=dtype: gram(dtype) for dtype in dtypes]
