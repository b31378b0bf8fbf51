"""Second moments of whole rows, up to 128 features.

A program normalises its rows, takes a pivot (the mean of its batch's first rows) away so that centring cancels no digits,
and adds up xᵀx and the column sums of a chunk of rows; a second kernel, on the whole chip, adds the chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import words as error_words
from spectral_kernels.kernels.launch import Configuration, launch
from spectral_kernels.kernels.precision import arithmetic, bf16_products, dot_precision, triton_dtype
from spectral_kernels.kernels.rows import (
    WORD,
    batch_strides,
    holds_nan,
    load_rows,
    note_rows,
    operand,
    power_of_two,
    row_pointers,
)
from spectral_kernels.kernels.statistics import checked_inverse_norm
from spectral_kernels.kernels.sums import add_parts, counters, part_slots
from spectral_kernels.kernels.tiles import LONGEST_CHUNK, store_tile, tile_sums
from spectral_kernels.ops._rows import negligible_share
from spectral_kernels.ops.effective_rank.store_rank import store_rank

# rows of whose chunks a program makes one, at the least: each costs a tile written and read
SHORTEST_CHUNK = 64
# multiprocessors of a large GPU; fixed, so that results do not depend on the device
ONE_EACH = 132


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
FINISH = {
    block: Configuration({"BLOCK": block, "WIDTH": 64, "PARTS": 16}, num_warps=4, num_stages=1)
    for block in (16, 32, 64, 128)
}
CONFIGURATIONS = {
    **{f"row_tiles {key}": use for key, use in ROW_TILES.items()},
    **{f"finish {key}": use for key, use in FINISH.items()},
}


def by_rows(z: Tensor, precision: str, acc: torch.dtype) -> Configuration | None:
    """The configuration that reads whole rows, where d allows it."""
    return ROW_TILES.get((arithmetic(precision, z.dtype, acc), power_of_two(z.shape[-1])))


def _row_chunks(n: int, block: int, batches: int) -> tuple[int, int]:
    """(splits, blocks in each) of the rows of a batch: a program a multiprocessor, all of its registers being taken."""
    wanted = max(-(-n // LONGEST_CHUNK), min(-(-ONE_EACH // batches), n // SHORTEST_CHUNK), 1)
    chunk = -(-n // (wanted * block))
    return -(-n // (chunk * block)), chunk


def row_products(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, acc: torch.dtype, precision: str,
    use: Configuration, *, count: int = 1, one_launch: bool = False, rank: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """XᵀX / count (b, d, d) and, where centred, the mean (b, d); or (rank) R₂ (b,), biased, and None.

    `one_launch`: the programs themselves add up their chunks, as they do for a rank.
    """
    b, n = z.shape[:2] if index is None else index.shape
    d = z.shape[-1]
    block = use["BLOCK"]
    splits, chunk = _row_chunks(n, use["BLOCK_K"], b)
    once = rank or one_launch or splits == 1
    slots, split = (part_slots(splits), splits > 1) if once else (splits, False)
    result = z.new_empty((b,) if rank else (b, d, d), dtype=acc)
    mean = z.new_empty(b, d, dtype=acc) if center and not rank else None
    parts = column_sums = pivots = None
    if splits > 1:
        parts = z.new_empty(b, slots, block, block, dtype=acc)
        column_sums = z.new_empty(b, slots, block, dtype=acc)
        pivots = None if once else z.new_empty(b, block, dtype=acc)
    matrix = once and not rank
    launch(
        row_tiles_kernel,
        b * splits,
        (
            z, index, parts, pivots, column_sums, counters(z, b * slots) if split else None,
            result if matrix else None, mean if once else None, result if rank else None, error_words(z), n, d, splits,
            slots, chunk, count, *batch_strides(z),
        ),
        {
            "NORMALIZE": normalize, "CENTER": center, "MATRIX": matrix, "RANK": rank, "SPLIT": split,
            "NEGLIGIBLE": negligible_share(acc) if rank else 0.0, "ACC": triton_dtype(acc),
            "PRODUCTS": bf16_products(precision, z.dtype, acc, not (normalize or center)),
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
    return result, mean
