"""Rows as kernels read them: strides, pointers, loads, operands of products, and notes of bad ones (errors.py)."""

import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import STRIDE
from spectral_kernels.ops._rows import NORM_FLOOR

FLOOR = tl.constexpr(NORM_FLOOR)
WORD = tl.constexpr(STRIDE)


def dense_rows(z: Tensor) -> Tensor:
    """`z` itself where its last stride is 1, else a contiguous copy."""
    return z if z.stride(-1) == 1 else z.contiguous()


def power_of_two(value: int, low: int = 16) -> int:
    return max(low, 1 << (value - 1).bit_length())


def in_units(*sizes: int) -> tuple[int, ...]:
    """A unit of 16 or 1, and sizes in it.

    Whether strides are multiples of 16 decides how wide a kernel loads rows. It is compiled for either unit and takes the
    sizes as they come; left to itself Triton would compile for each combination of sizes that are, are not, and are 1.
    """
    unit = 16 if all(size % 16 == 0 and size < 2**31 for size in sizes) else 1
    return unit, *(size // unit for size in sizes)


# of rows that are not there
NO_STRIDES = (16, 0, 0)


def batch_strides(z: Tensor) -> tuple[int, ...]:
    """Strides of the batch and the row of (b, n, d): a unit, and both in it; of a pool (N, d) the unit, N and the row's."""
    if z.ndim == 2:
        unit, row = in_units(z.stride(0))
        return unit, len(z), row
    return in_units(z.stride(0) if z.shape[0] > 1 else 0, z.stride(1))


@triton.jit
def row_pointers(z, index, batch, rows, n, z_batch, z_row):
    """Pointers to rows of a batch, `z[batch, rows]`, or of a pool of z_batch rows, `z[index[batch, rows]]`; and which rows are
    there: nobody has looked at an index before.
    """
    if index is None:
        pointers = z + batch * z_batch + rows.to(tl.int64) * z_row
        there = tl.full(rows.shape, True, tl.int1)
    else:
        at = tl.load(index + batch * n + rows, mask=rows < n, other=0)
        pointers = z + at * z_row
        there = (at >= 0) & (at < z_batch)
    return pointers, there


@triton.jit
def load_rows(pointers, there, inside, columns, index, ACC: tl.constexpr):
    """Rows at some columns, 0 outside; NaN, and so a result of NaN, for an index outside the pool."""
    if index is None:
        x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(ACC)
    else:
        x = tl.load(pointers[:, None] + columns[None, :], mask=inside & there[:, None], other=0.0).to(ACC)
        x = tl.where(there[:, None], x, float("nan"))
    return x


@triton.jit
def load_part(
    z, index, scale, batch, rows, columns, limit, n, d, z_batch, z_row, mean,
    NORMALIZE: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Normalised, centred rows below `limit`, at some columns; 0 outside."""
    inside = (rows < limit)[:, None] & (columns < d)[None, :]
    pointers, there = row_pointers(z, index, batch, rows, n, z_batch, z_row)
    x = load_rows(pointers, there, inside, columns, index, ACC)
    if NORMALIZE:
        x *= tl.load(scale + batch * n + rows, mask=rows < limit, other=0.0)[:, None]
    if CENTER:
        x = tl.where(inside, x - mean[None, :], 0.0)
    return x


@triton.jit
def holds_nan(tile):
    """Whether NaN or Inf is anywhere in a tile; sums of products show it of the rows that went into them."""
    return tl.max(tl.max(tl.where(tile - tile == 0, 0, 1), 1), 0) > 0


@triton.jit
def note(words, value):
    """Leave the lowest value in an error word (errors.py)."""
    tl.atomic_min(words, value.to(tl.int64), sem="relaxed")


@triton.jit
def note_rows(words, outside, z, index, batch, begin, end, n, d, z_batch, z_row):
    """Note the first of the rows from `begin` to `end` that holds NaN or Inf or is too long or short for `inverse_norm`, a
    pool's by its place there; in `outside`, if there is an index, the first that is outside the pool. Slow: for rows whose
    products were NaN or Inf.
    """
    none = tl.full([], 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    for first in range(begin, end, 32):
        rows = first + tl.arange(0, 32)
        pointers, there = row_pointers(z, index, batch, rows, n, z_batch, z_row)
        place = batch * 4294967296 + rows.to(tl.int64)
        poison = tl.zeros([32], dtype=tl.float64)
        squares = tl.zeros([32], dtype=tl.float64)
        for column in range(0, d, 32):
            columns = column + tl.arange(0, 32)
            inside = ((rows < end) & there)[:, None] & (columns < d)[None, :]
            x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float64)
            poison += tl.sum(x - x, 1)
            squares += tl.sum(x * x, 1)
        if index is not None:
            note(outside, tl.min(tl.where(there | (rows >= end), none, place), 0))
            place = tl.load(index + batch * n + rows, mask=rows < end, other=0)
        fine = poison == 0
        if z.dtype.element_ty != tl.float64:
            fine &= (squares == 0) | ((squares > 1e-30) & (squares < 1e36))
        note(words, tl.min(tl.where(fine, none, place), 0))


@triton.jit
def round_to_tf32(x):
    """float32 to the nearest of 11 significant bits, ties away from 0. Hopper's products cut off: a bias of 7e-4."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def operand(x, inside, PLAIN: tl.constexpr, PRECISION: tl.constexpr):
    """A tile as `tl.dot` is to get it. PLAIN, as it was loaded, it would be fetched 4 bytes at a time to transpose it."""
    if PRECISION == "tf32":
        x = round_to_tf32(x)
    if PLAIN and (PRECISION == "tf32" or PRECISION == "bf16x3"):
        x = tl.where(inside, x, 0.0)
    return x
