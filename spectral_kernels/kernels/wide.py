"""Second moments of more than 128 features on tensor cores.

One pass writes the rows, normalised and less a pivot, as sums of bf16 (two parts keep 16 bits, three 24), and their column
sums; a second multiplies tiles on and below the diagonal, a chunk of rows a program; a third adds the chunks, centres and
mirrors. The parts take as much memory as float32 rows, half as much again where there are three.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import words as error_words
from spectral_kernels.kernels.launch import INTERPRETED, AotCall, Configuration, launch
from spectral_kernels.kernels.rows import batch_strides, holds_nan, note_rows, power_of_two
from spectral_kernels.kernels.statistics import checked_inverse_norm, inverse_norm

# rows of the mean that is taken away first
PIVOT_ROWS = 32
# programs that write parts, each a sum of columns
WRITERS = 264
# rows that share a chunk: few enough for several chunks to fill the chip, enough to be worth a tile written and read
CHUNK = 4096


@triton.jit(do_not_specialize=["n", "z_batch", "z_row"])
def pivot_kernel(
    z, pivot, n, d, z_unit, z_batch, z_row, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Mean of the first ROWS (normalised) rows of each batch: `pivot` (b, d)."""
    z_batch = z_batch.to(tl.int64) * z_unit
    z_row *= z_unit
    batch = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(0, tl.minimum(n, ROWS)):
        x = tl.load(z + batch * z_batch + row * z_row + columns, mask=columns < d, other=0.0).to(tl.float32)
        if NORMALIZE:
            x *= inverse_norm(tl.sum(x * x, 0))
        total += x
    tl.store(pivot + batch * d + columns, total / tl.minimum(n, ROWS), mask=columns < d)


@triton.jit(do_not_specialize=["n", "writers", "z_batch", "z_row"])
def parts_kernel(
    z, pivot, high, middle, low, sums, n, d, writers, z_unit, z_batch, z_row,
    NORMALIZE: tl.constexpr, CENTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows x = high + middle (+ low), (b, n, d) in bf16, and sums of x (b, writers, d)."""
    z_batch = z_batch.to(tl.int64) * z_unit
    z_row *= z_unit
    pid = tl.program_id(0)
    writer = pid % writers
    batch = (pid // writers).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    shift = tl.zeros([BLOCK_D], dtype=tl.float32)
    if CENTER:
        shift = tl.load(pivot + batch * d + columns, mask=columns < d, other=0.0)
    for first in range(writer * BLOCK_N, n, writers * BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        x = tl.load(z + batch * z_batch + rows[:, None] * z_row + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        if NORMALIZE:
            x *= checked_inverse_norm(tl.sum(x * x, 1))[:, None]
        if CENTER:
            x = tl.where(inside, x - shift[None, :], 0.0)
            total += tl.sum(x, 0)
        at = (batch * n + rows)[:, None] * d + columns[None, :]
        h = x.to(high.dtype.element_ty)
        tl.store(high + at, h, mask=inside)
        x -= h.to(tl.float32)
        m = x.to(high.dtype.element_ty)
        tl.store(middle + at, m, mask=inside)
        if low is not None:
            tl.store(low + at, (x - m.to(tl.float32)).to(high.dtype.element_ty), mask=inside)
    if CENTER:
        tl.store(sums + (batch * writers + writer) * d + columns, total, mask=columns < d)


@triton.jit
def lower_tile(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column, in units of BLOCK_M and BLOCK_N, of one of the tiles that meet the lower triangle."""
    across: tl.constexpr = BLOCK_M // BLOCK_N
    square = tile // across
    i = ((tl.sqrt(8.0 * square.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > square, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= square, i + 1, i)
    return i, (square - i * (i + 1) // 2) * across + tile % across


@triton.jit
def load_columns(base, at, inside, EVEN: tl.constexpr):
    return tl.load(base + at) if EVEN else tl.load(base + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n", "splits", "tiles", "chunk"])
def products_kernel(
    high, middle, low, out, n, d, splits, tiles, chunk,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """xᵀx of a chunk of rows, a tile a program: `out` (b, splits, tiles, BLOCK_M, BLOCK_N)."""
    pid = tl.program_id(0)
    tile = pid % tiles
    split = pid // tiles % splits
    batch = (pid // tiles // splits).to(tl.int64)
    i, j = lower_tile(tile, BLOCK_M, BLOCK_N)
    left = i * BLOCK_M + tl.arange(0, BLOCK_M)
    right = j * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * chunk
    end = tl.minimum(begin + chunk, n)
    rows = begin + tl.arange(0, BLOCK_K)
    start = (batch * n + rows)[:, None] * d
    at_left = start + left[None, :]
    at_right = start + right[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        inside = (first + tl.arange(0, BLOCK_K) < end)[:, None]
        left_inside = inside & (left < d)[None, :]
        right_inside = inside & (right < d)[None, :]
        h = tl.trans(load_columns(high, at_left, left_inside, EVEN))
        g = load_columns(high, at_right, right_inside, EVEN)
        m = tl.trans(load_columns(middle, at_left, left_inside, EVEN))
        k = load_columns(middle, at_right, right_inside, EVEN)
        # smallest first, from zero: tensor cores cut off, not round, what they add to a large sum
        if low is None:
            part = tl.dot(h, k, input_precision="ieee")
        else:
            part = tl.dot(m, k, input_precision="ieee")
            part = tl.dot(h, load_columns(low, at_right, right_inside, EVEN), part, input_precision="ieee")
            part = tl.dot(tl.trans(load_columns(low, at_left, left_inside, EVEN)), g, part, input_precision="ieee")
            part = tl.dot(h, k, part, input_precision="ieee")
        part = tl.dot(m, g, part, input_precision="ieee")
        acc += tl.dot(h, g, part, input_precision="ieee")
        at_left += BLOCK_K * d
        at_right += BLOCK_K * d
    at = out + pid.to(tl.int64) * BLOCK_M * BLOCK_N
    tl.store(at + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], acc)


@triton.jit(do_not_specialize=["n", "splits", "tiles", "count", "z_batch", "z_row"])
def finish_kernel(
    z, pivot, parts, sums, matrix, mean, errors, n, d, splits, tiles, count, z_unit, z_batch, z_row,
    CENTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Chunks of STRIP rows of a tile added, centred, divided by `count` and mirrored into `matrix` (b, d, d); the `mean`."""
    z_batch = z_batch.to(tl.int64) * z_unit
    z_row *= z_unit
    strips: tl.constexpr = BLOCK_M // STRIP
    pid = tl.program_id(0)
    strip = pid % strips
    tile = pid // strips % tiles
    batch = (pid // strips // tiles).to(tl.int64)
    i, j = lower_tile(tile, BLOCK_M, BLOCK_N)
    inner = strip * STRIP + tl.arange(0, STRIP)
    across = tl.arange(0, BLOCK_N)
    total = tl.zeros([STRIP, BLOCK_N], dtype=tl.float32)
    for split in range(0, splits):
        at = parts + ((batch * splits + split) * tiles + tile) * BLOCK_M * BLOCK_N
        total += tl.load(at + inner[:, None] * BLOCK_N + across[None, :])
    # the diagonal shows what is in a row
    if errors is not None:  # noqa: SIM102 (a constant decides whether there are words)
        if (j * BLOCK_N >= i * BLOCK_M) & holds_nan(total):
            note_rows(errors, errors, z, None, batch, 0, n, n, d, z_batch, z_row)
    row = i * BLOCK_M + inner
    column = j * BLOCK_N + across
    if CENTER:
        by_row = tl.load(sums + batch * d + row, mask=row < d, other=0.0)
        by_column = tl.load(sums + batch * d + column, mask=column < d, other=0.0)
        total -= by_row[:, None] * by_column[None, :] / n
        if j == 0:
            shift = tl.load(pivot + batch * d + row, mask=row < d, other=0.0)
            tl.store(mean + batch * d + row, shift + by_row / n, mask=row < d)
    inside = (row < d)[:, None] & (column < d)[None, :] & (row[:, None] >= column[None, :])
    value = total / count
    base = matrix + batch * d * d
    tl.store(base + row[:, None] * d + column[None, :], value, mask=inside)
    tl.store(base + column[None, :] * d + row[:, None], value, mask=inside)


PIVOT = Configuration({"ROWS": PIVOT_ROWS}, num_warps=8)
PARTS = Configuration({}, num_warps=8, num_stages=1)
PRODUCTS = Configuration({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3)
FINISH = Configuration({"BLOCK_M": 128, "BLOCK_N": 64, "STRIP": 16}, num_warps=4, num_stages=1)
CONFIGURATIONS = {"wide pivot": PIVOT, "wide parts": PARTS, "wide products": PRODUCTS, "wide finish": FINISH}
# elements that a program of the first passes holds, and so the most columns
HELD = 8192
# fewer rows are not worth five launches
FEWEST = 1024


def suits(z: Tensor, precision: str, acc: torch.dtype) -> bool:
    """Whether moments of z (b, n, d) are made here: products of bf16, rows that fit a program, and many of them."""
    tensor_cores = acc == torch.float32 and precision in ("ieee", "bf16x3")
    return tensor_cores and z.shape[-2] >= FEWEST and 128 < z.shape[-1] <= HELD


def moments(z: Tensor, center: bool, normalize: bool, precision: str, count: int) -> tuple[Tensor, Tensor | None]:
    """XᵀX / count (b, d, d) of normalised, centred rows z (b, n, d), and their mean (b, d) where centred."""
    b, n, d = z.shape
    block_d = power_of_two(d)
    block_n = HELD // block_d
    three = precision == "ieee" and z.dtype == torch.float32
    # the interpreter multiplies the bits of bf16
    part = torch.float32 if INTERPRETED else torch.bfloat16
    high, middle = z.new_empty(b, n, d, dtype=part), z.new_empty(b, n, d, dtype=part)
    low = z.new_empty(b, n, d, dtype=part) if three else None
    writers = min(WRITERS, -(-n // block_n))
    pivot = sums = None
    if center:
        pivot = z.new_empty(b, d, dtype=torch.float32)
        sums = z.new_empty(b, writers, d, dtype=torch.float32)
        launch(
            pivot_kernel, b, (z, pivot, n, d, *batch_strides(z)), {"NORMALIZE": normalize, "BLOCK_D": block_d}, PIVOT
        )
    launch(
        parts_kernel,
        b * writers,
        (z, pivot, high, middle, low, sums, n, d, writers, *batch_strides(z)),
        {"NORMALIZE": normalize, "CENTER": center, "BLOCK_N": block_n, "BLOCK_D": block_d},
        PARTS,
    )
    side = -(-d // PRODUCTS["BLOCK_M"])
    tiles = side * (side + 1) // 2 * (PRODUCTS["BLOCK_M"] // PRODUCTS["BLOCK_N"])
    block_k = PRODUCTS["BLOCK_K"]
    splits = max(-(-n // CHUNK), min(-(-WRITERS // (b * tiles)), n // (4 * block_k)), 1)
    chunk = block_k * -(-n // (splits * block_k))
    splits = -(-n // chunk)
    parts = z.new_empty(b * splits * tiles, PRODUCTS["BLOCK_M"], PRODUCTS["BLOCK_N"], dtype=torch.float32)
    even = n % chunk == 0 and d % PRODUCTS["BLOCK_M"] == 0
    launch(
        products_kernel,
        b * splits * tiles,
        (high, middle, low, parts, n, d, splits, tiles, chunk),
        {"EVEN": even},
        PRODUCTS,
    )
    total = None if sums is None else sums.sum(1)
    mean = None if pivot is None else torch.empty_like(pivot)
    matrix = z.new_empty(b, d, d, dtype=torch.float32)
    launch(
        finish_kernel,
        b * tiles * (FINISH["BLOCK_M"] // FINISH["STRIP"]),
        (z, pivot, parts, total, matrix, mean, error_words(z), n, d, splits, tiles, count, *batch_strides(z)),
        {"CENTER": center},
        FINISH,
    )
    return matrix, mean


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover this module's kernels and configurations."""

    def call(n: int, d: int, dtype: torch.dtype, plain: bool) -> None:
        moments(torch.empty(1, n, d, dtype=dtype, device="meta"), not plain, not plain, "ieee", n)

    cases = [(16384, d, dtype, False) for d in (160, 512, 2048, HELD) for dtype in (torch.float32, torch.bfloat16)]
    # a chunk that is not full, rows that are taken as they are
    cases += [(5000, 200, torch.float32, False), (16384, 512, torch.float32, True)]
    return [lambda case=case: call(*case) for case in cases]  # type: ignore[misc]
