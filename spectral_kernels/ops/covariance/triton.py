"""Second moments and their gradients.

Up to 128 features one program reads whole rows: it normalises them, takes a pivot (the mean of its batch's first rows) away
so that centring cancels no digits, and adds up xᵀx and the column sums of a chunk of rows. Above, tiles on and below
the diagonal are added up chunk by chunk, with norms and mean from a pass before. A second kernel adds the chunks in
a fixed order, in float64, and writes both triangles: results are symmetric to the bit and the same in every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops._triton import (
    AotCall,
    Configuration,
    Statistics,
    apply,
    arithmetic,
    batch_strides,
    column_mean,
    dense_rows,
    dot_precision,
    inverse_norm,
    launch,
    load_part,
    operand,
    power_of_two,
    read_rows_backward,
    row_pointers,
    row_statistics,
    split_rows,
    triton_dtype,
    whole_rows,
)

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
def store_sums(stats, at, value, rows, columns, mean_square):
    """Trace and squared Frobenius norm that a tile of a symmetric matrix adds, and ‖mean‖²; parts (…, 3)."""
    on = rows[:, None] == columns[None, :]
    weight = tl.where(on, 1.0, tl.where(rows[:, None] > columns[None, :], 2.0, 0.0))
    tl.store(stats + 3 * at, tl.sum(tl.sum(tl.where(on, value, 0.0), 1), 0))
    tl.store(stats + 3 * at + 1, tl.sum(tl.sum(value * value * weight, 1), 0))
    tl.store(stats + 3 * at + 2, mean_square)


@triton.jit
def row_tiles_kernel(
    z, index, parts, pivots, column_sums, matrix, mean_out, stats, n, d, splits, chunk, count, z_batch, z_row,
    NORMALIZE: tl.constexpr, CENTER: tl.constexpr, MATRIX: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """xᵀx of a chunk of whole rows (d <= BLOCK), less the pivot, to `parts` (b, splits, BLOCK, BLOCK).

    Where one chunk is all, the matrix is finished here: centred, divided by `count` to `matrix` (b, d, d) with its mean
    (MATRIX), and its sums to `stats` (b, 3) (RANK).
    """
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
        pointers = row_pointers(z, index, batch, rows, n, z_batch, z_row)
        x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(ACC)
        if NORMALIZE:
            x *= inverse_norm(tl.sum(x * x, 1))[:, None]
        pivot = tl.sum(x, 0) / tl.minimum(n, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK], dtype=ACC)
    total = tl.zeros([BLOCK], dtype=ACC)
    for first in range(begin, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        inside = (rows < end)[:, None] & (columns < d)[None, :]
        pointers = row_pointers(z, index, batch, rows, n, z_batch, z_row)
        x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(ACC)
        if NORMALIZE:
            x *= inverse_norm(tl.sum(x * x, 1))[:, None]
        if CENTER:
            x = tl.where(inside, x - pivot[None, :], 0.0)
            total += tl.sum(x, 0)
        x = operand(x, inside, not (NORMALIZE or CENTER), PRECISION)
        acc = tl.dot(tl.trans(x), x, acc, input_precision=PRECISION, out_dtype=ACC)
    if MATRIX or RANK:
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
            store_sums(stats, batch, acc, columns, columns, mean_square)
        if MATRIX:
            store_tile(matrix, batch, acc / count, columns, columns, d, False)
    else:
        at = batch * splits + split
        tl.store(parts + at * BLOCK * BLOCK + columns[:, None] * BLOCK + columns[None, :], acc)
        if CENTER:
            tl.store(column_sums + at * BLOCK + columns, total)
            if split == 0:
                tl.store(pivots + batch * BLOCK + columns, pivot)


@triton.jit
def tiles_kernel(
    z, index, scale, sums, left, parts, matrix, stats, n, d, mean_splits, mean_count, splits, chunk, tiles, side_tiles, count,
    z_batch, z_row, left_batch, left_row,
    GRAM: tl.constexpr, NORMALIZE: tl.constexpr, CENTER: tl.constexpr, CROSS: tl.constexpr, MATRIX: tl.constexpr,
    RANK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of xᵀx, of xxᵀ (GRAM) or of leftᵀx (CROSS), over a chunk of the other dimension.

    Where one chunk is all it is finished: divided by `count` to `matrix` (b, side, side) (MATRIX), and what it adds to trace
    and Frobenius norm to `stats` (b, tiles, 3) (RANK). Else it goes to `parts` (b, splits, tiles, BLOCK, BLOCK).
    """
    pid = tl.program_id(0)
    split = pid % splits
    tile = pid // splits % tiles
    batch = (pid // splits // tiles).to(tl.int64)
    i, j = tile_of(tile, side_tiles, CROSS)
    a_side = i * BLOCK + tl.arange(0, BLOCK)
    b_side = j * BLOCK + tl.arange(0, BLOCK)
    begin = split * chunk
    acc = tl.zeros([BLOCK, BLOCK], dtype=ACC)
    mean_square = tl.full([], 0.0, dtype=ACC)
    if GRAM:
        end = tl.minimum(begin + chunk, d)
        mean = tl.zeros([BLOCK_K], dtype=ACC)
        for first in range(begin, end, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            if CENTER:
                mean = column_mean(sums, batch, columns, mean_count, d, mean_splits)
                mean_square += tl.sum(mean * mean, 0)
            a = load_part(
                z, index, scale, batch, a_side, columns, n, n, d, z_batch, z_row, mean, NORMALIZE, CENTER, ACC
            )
            b = load_part(
                z, index, scale, batch, b_side, columns, n, n, d, z_batch, z_row, mean, NORMALIZE, CENTER, ACC
            )
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=ACC)
        mean_square = tl.where(tile == 0, mean_square, 0.0)
        side = n
    else:
        end = tl.minimum(begin + chunk, n)
        a_mean = tl.zeros([BLOCK], dtype=ACC)
        b_mean = tl.zeros([BLOCK], dtype=ACC)
        if CENTER:
            a_mean = column_mean(sums, batch, a_side, mean_count, d, mean_splits)
            b_mean = column_mean(sums, batch, b_side, mean_count, d, mean_splits)
            mean_square = tl.where(i == j, tl.sum(a_mean * a_mean, 0), 0.0)
        for first in range(begin, end, BLOCK_K):
            rows = first + tl.arange(0, BLOCK_K)
            if CROSS:
                a = load_part(
                    left, None, scale, batch, rows, a_side, end, n, d, left_batch, left_row, a_mean, False, False, ACC
                )
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
        side = d
    if RANK:
        store_sums(stats, batch * tiles + tile, acc, a_side, b_side, mean_square)
    if MATRIX:
        store_tile(matrix, batch, acc / count, a_side, b_side, side, CROSS)
    if not (MATRIX or RANK):
        square = tl.arange(0, BLOCK)
        at = parts + ((batch * splits + split) * tiles + tile) * BLOCK * BLOCK
        tl.store(at + square[:, None] * BLOCK + square[None, :], acc)


@triton.jit
def finish_tiles_kernel(
    parts, pivots, column_sums, sums, matrix, mean_out, stats, n, side, mean_splits, mean_count,
    splits, tiles, side_tiles, count,
    PIVOT: tl.constexpr, CENTER: tl.constexpr, CROSS: tl.constexpr, MATRIX: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the chunks of a strip of a tile; write the matrix divided by `count`, the mean, and the strip's sums.

    PIVOT: the chunks are about a pivot, and centring is made good here from the column sums.
    """
    strips: tl.constexpr = BLOCK // ROWS
    pid = tl.program_id(0)
    strip = pid % strips
    tile = pid // strips % tiles
    batch = (pid // strips // tiles).to(tl.int64)
    i, j = tile_of(tile, side_tiles, CROSS)
    rows = strip * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    ACC: tl.constexpr = parts.dtype.element_ty
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float64)
    for split in range(0, splits):
        at = parts + ((batch * splits + split) * tiles + tile) * BLOCK * BLOCK
        total += tl.load(at + rows[:, None] * BLOCK + columns[None, :]).to(tl.float64)
    mean_square = tl.full([], 0.0, dtype=ACC)
    here = (i == j) & (strip == 0)
    b_side = j * BLOCK + columns
    if PIVOT:
        by_row = tl.zeros([ROWS], dtype=tl.float64)
        by_column = tl.zeros([BLOCK], dtype=tl.float64)
        for split in range(0, splits):
            at = column_sums + (batch * splits + split) * BLOCK
            by_row += tl.load(at + rows).to(tl.float64)
            by_column += tl.load(at + columns).to(tl.float64)
        total -= by_row[:, None] * by_column[None, :] / n
        mean = (tl.load(pivots + batch * BLOCK + columns).to(tl.float64) + by_column / n).to(ACC)
        if MATRIX:  # noqa: SIM102 (a constant decides whether there is a mean to write)
            if here:
                tl.store(mean_out + batch * side + columns, mean, mask=columns < side)
        mean_square = tl.where(here, tl.sum(mean * mean, 0), 0.0)
    elif CENTER:
        mean = column_mean(sums, batch, b_side, mean_count, side, mean_splits)
        mean_square = tl.where(here, tl.sum(mean * mean, 0), 0.0)
    value = total.to(ACC)
    if RANK:
        store_sums(stats, pid, value, i * BLOCK + rows, b_side, mean_square)
    if MATRIX:
        store_tile(matrix, batch, (total / count).to(ACC), i * BLOCK + rows, b_side, side, CROSS)


# by arithmetic and side; stages and blocks are the largest that do not spill (bench/aot.py)
ROW_TILES = {
    ("ieee", 16): Configuration({"BLOCK": 16, "BLOCK_K": 64}, num_warps=4, num_stages=1),
    ("ieee", 32): Configuration({"BLOCK": 32, "BLOCK_K": 64}, num_warps=4, num_stages=1),
    ("ieee", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4, num_stages=1),
    ("ieee", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8),
    ("tensor", 16): Configuration({"BLOCK": 16, "BLOCK_K": 64}, num_warps=4),
    ("tensor", 32): Configuration({"BLOCK": 32, "BLOCK_K": 64}, num_warps=4),
    ("tensor", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4),
    ("tensor", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8),
    ("fp64", 16): Configuration({"BLOCK": 16, "BLOCK_K": 32}, num_warps=4),
    ("fp64", 32): Configuration({"BLOCK": 32, "BLOCK_K": 32}, num_warps=4),
    ("fp64", 64): Configuration({"BLOCK": 64, "BLOCK_K": 16}, num_warps=8, num_stages=1),
}
TILES = {
    ("ieee", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4, num_stages=1),
    ("ieee", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8, num_stages=1),
    ("tensor", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=4),
    ("tensor", 128): Configuration({"BLOCK": 128, "BLOCK_K": 32}, num_warps=8),
    ("fp64", 64): Configuration({"BLOCK": 64, "BLOCK_K": 32}, num_warps=8, num_stages=1),
}
FINISH = {
    16: Configuration({"BLOCK": 16, "ROWS": 16}, num_warps=1, num_stages=1),
    32: Configuration({"BLOCK": 32, "ROWS": 16}, num_warps=2, num_stages=1),
    64: Configuration({"BLOCK": 64, "ROWS": 16}, num_warps=4, num_stages=1),
    128: Configuration({"BLOCK": 128, "ROWS": 16}, num_warps=4, num_stages=1),
}
CONFIGURATIONS = {
    **{f"row_tiles {key}": use for key, use in ROW_TILES.items()},
    **{f"tiles {key}": use for key, use in TILES.items()},
    **{f"finish {key}": use for key, use in FINISH.items()},
}


@dataclass(frozen=True)
class Moments:
    """What `moments` was asked for: the matrix (b, side, side), the mean (b, d) and parts (b, parts, 3) of
    trace, squared Frobenius norm and ‖mean‖² of the undivided matrix; and the statistics of the rows, if a pass took them.
    """

    matrix: Tensor | None
    mean: Tensor | None
    parts: Tensor | None
    statistics: Statistics


def moments(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, *, acc: torch.dtype, precision: str = "ieee",
    count: int = 1, gram: bool = False, matrix: bool = True, rank: bool = False, by_rows: bool = True,
) -> Moments:  # fmt: skip
    """XᵀX / count, or XXᵀ / count (gram), of normalised, centred rows.

    Args:
        z: (b, n, d), or a pool (N, d) with index (b, n); last stride 1.
        matrix, rank: which results are wanted.
        by_rows: take the one-pass kernel where d allows it; else norms and mean come from a pass before (as the Gram
            side always needs, and gradients).
    """
    b, n = z.shape[:2] if index is None else index.shape
    d = z.shape[-1]
    kind = arithmetic(precision, z.dtype, acc)
    if by_rows and not gram and (kind, power_of_two(d)) in ROW_TILES:
        return _moments_by_rows(z, index, center, normalize, acc, precision, count, matrix, rank)
    statistics = row_statistics(z, index, normalize, center, acc)
    side, length = (n, d) if gram else (d, n)
    use = TILES[kind, 64 if side <= 64 or kind == "fp64" else 128]
    side_tiles = -(-side // use["BLOCK"])
    tiles = side_tiles * (side_tiles + 1) // 2
    splits, chunk = split_rows(length, use["BLOCK_K"], b * tiles, LONGEST_CHUNK)
    once = splits == 1
    result = z.new_empty(b, side, side, dtype=acc) if matrix else None
    stats = z.new_empty(b, tiles, 3, dtype=acc) if once and rank else None
    parts = None if once else z.new_empty(b, splits, tiles, use["BLOCK"], use["BLOCK"], dtype=acc)
    launch(
        tiles_kernel,
        b * tiles * splits,
        (
            z, index, statistics.scale, statistics.sums, None, parts, result if once else None, stats, n, d,
            statistics.splits, statistics.count, splits, chunk, tiles, side_tiles, count, *batch_strides(z), 0, 0,
        ),
        {
            "GRAM": gram, "NORMALIZE": normalize, "CENTER": center, "CROSS": False, "MATRIX": once and matrix,
            "RANK": once and rank, "ACC": triton_dtype(acc), "PRECISION": dot_precision(precision, z.dtype, acc),
        },
        use,
    )  # fmt: skip
    if parts is not None:
        # ‖mean‖² of a Gram matrix is its rows', not its columns'
        stats = _finish(parts, None, statistics, result, None, n, side, count, center and not gram, False, rank)
        if gram and center and stats is not None:
            mean = statistics.mean()
            assert mean is not None
            stats[:, 0, 2] = mean.square().sum(-1)
    return Moments(result, None, stats, statistics)


def _finish(
    parts: Tensor, pivots: tuple[Tensor, Tensor] | None, statistics: Statistics, matrix: Tensor | None,
    mean: Tensor | None, n: int, side: int, count: int, center: bool, cross: bool, rank: bool,
) -> Tensor | None:  # fmt: skip
    b, splits, tiles, block, _ = parts.shape
    use = FINISH[block]
    strips = block // use["ROWS"]
    sums = parts.new_empty(b, tiles * strips, 3) if rank else None
    pivot, column_sums = pivots if pivots is not None else (None, None)
    launch(
        finish_tiles_kernel,
        b * tiles * strips,
        (
            parts, pivot, column_sums, statistics.sums if center else None, matrix, mean, sums, n, side,
            statistics.splits, statistics.count, splits, tiles, -(-side // block), count,
        ),
        {"PIVOT": pivots is not None, "CENTER": center, "CROSS": cross, "MATRIX": matrix is not None, "RANK": rank},
        use,
    )  # fmt: skip
    return sums


def _moments_by_rows(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, acc: torch.dtype, precision: str, count: int,
    matrix: bool, rank: bool,
) -> Moments:  # fmt: skip
    b, n = z.shape[:2] if index is None else index.shape
    d = z.shape[-1]
    use = ROW_TILES[arithmetic(precision, z.dtype, acc), power_of_two(d)]
    block = use["BLOCK"]
    splits, chunk = split_rows(n, use["BLOCK_K"], b, LONGEST_CHUNK)
    once = splits == 1
    result = z.new_empty(b, d, d, dtype=acc) if matrix else None
    mean = z.new_empty(b, d, dtype=acc) if center and matrix else None
    stats = z.new_empty(b, 1, 3, dtype=acc) if once and rank else None
    parts = None if once else z.new_empty(b, splits, 1, block, block, dtype=acc)
    pivots = None
    if center and not once:
        pivots = (z.new_empty(b, block, dtype=acc), z.new_empty(b, splits, block, dtype=acc))
    launch(
        row_tiles_kernel,
        b * splits,
        (
            z, index, parts, *(pivots or (None, None)), result if once else None, mean if once else None, stats, n, d,
            splits, chunk, count, *batch_strides(z),
        ),
        {
            "NORMALIZE": normalize, "CENTER": center, "MATRIX": once and matrix, "RANK": once and rank,
            "ACC": triton_dtype(acc), "PRECISION": dot_precision(precision, z.dtype, acc),
        },
        use,
    )  # fmt: skip
    if parts is not None:
        stats = _finish(parts, pivots, Statistics(), result, mean, n, d, count, center, False, rank)
    return Moments(result, mean, stats, Statistics())


def cross_product(left: Tensor, z: Tensor, mean: Tensor, acc: torch.dtype) -> Tensor:
    """leftᵀ (z − mean): (b, d, d) from two (b, n, d) and mean (b, d)."""
    b, n, d = z.shape
    kind = arithmetic("ieee", z.dtype, acc)
    use = TILES[kind, 64 if d <= 64 or kind == "fp64" else 128]
    side_tiles = -(-d // use["BLOCK"])
    tiles = side_tiles * side_tiles
    splits, chunk = split_rows(n, use["BLOCK_K"], b * tiles, LONGEST_CHUNK)
    result = z.new_empty(b, d, d, dtype=acc)
    once = splits == 1
    parts = None if once else z.new_empty(b, splits, tiles, use["BLOCK"], use["BLOCK"], dtype=acc)
    launch(
        tiles_kernel,
        b * tiles * splits,
        (
            z, None, None, mean, left, parts, result if once else None, None, n, d, 1, 1, splits, chunk, tiles, side_tiles,
            1, *batch_strides(z), *batch_strides(left),
        ),
        {
            "GRAM": False, "NORMALIZE": False, "CENTER": True, "CROSS": True, "MATRIX": once, "RANK": False,
            "ACC": triton_dtype(acc), "PRECISION": dot_precision("ieee", z.dtype, acc),
        },
        use,
    )  # fmt: skip
    if parts is not None:
        _finish(parts, None, Statistics(), result, None, n, d, 1, False, True, False)
    return result


def covariance(z: Tensor, center: bool, normalize: bool, correction: int, precision: str) -> Tensor:
    z = dense_rows(z)
    count = z.shape[1] - correction
    acc = accumulation_dtype(z.dtype)
    matrix = moments(z, None, center, normalize, acc=acc, precision=precision, count=count).matrix
    assert matrix is not None
    return matrix


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
            moments(z, None, True, True, acc=accumulation_dtype(dtype), gram=True, matrix=False, rank=True)

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
