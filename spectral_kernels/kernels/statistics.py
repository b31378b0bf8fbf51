"""Statistics of rows (inverse norms, column sums), and gradients through them."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.kernels.launch import AotCall, Configuration, launch
from spectral_kernels.kernels.precision import triton_dtype
from spectral_kernels.kernels.rows import batch_strides, load_rows, row_pointers
from spectral_kernels.kernels.sums import split_rows
from spectral_kernels.ops._rows import accumulation_dtype


@triton.jit
def column_mean(sums, batch, columns, count, d, splits):
    """Mean of columns from partial sums (b, splits, d) of `count` rows, always added in the same order."""
    part = tl.arange(0, 16)
    total = tl.zeros([columns.shape[0]], dtype=sums.dtype.element_ty)
    for first in range(0, splits, 16):
        at = first + part
        inside = (at < splits)[:, None] & (columns < d)[None, :]
        total += tl.sum(
            tl.load(sums + (batch * splits + at[:, None]) * d + columns[None, :], mask=inside, other=0.0), 0
        )
    return total / count


@triton.jit
def inverse_norm(squares):
    """1/‖z‖ from ‖z‖², 0 of a zero row."""
    # no division by 0, which the interpreter would warn of; a subnormal number would be a float64 to Triton 3.6
    least: tl.constexpr = 1e-37 if squares.dtype == tl.float32 else 1e-300
    return tl.where(squares > 0, 1.0 / tl.sqrt(tl.maximum(squares, least)), 0.0)


@triton.jit
def checked_inverse_norm(squares):
    """The same, or NaN, which is noted in the end, where float32 does not hold the squares: for forward passes."""
    inverse = inverse_norm(squares)
    if squares.dtype == tl.float32:
        inverse = tl.where((squares == 0) | ((squares > 1e-30) & (squares < 1e36)), inverse, float("nan"))
    return inverse


@triton.jit
def tangent(gradient, unit, along, squares):
    """(g − u(u·g))/‖z‖ from u = z/‖z‖, `along` = u·g and `squares` = ‖z‖²."""
    return (gradient - unit * along[:, None]) * inverse_norm(squares)[:, None]


@triton.jit(do_not_specialize=["n", "splits", "chunk", "z_batch", "z_row"])
def row_statistics_kernel(
    z, index, scale, sums, n, d, splits, chunk, z_unit, z_batch, z_row,
    NORMALIZE: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1/‖z‖ of each row to `scale` (b, n), and sums of the (normalised) rows of each chunk to `sums` (b, splits, d)."""
    z_batch = z_batch.to(tl.int64) * (z_unit if index is None else 1)
    z_row *= z_unit
    chunk *= BLOCK_N
    # divisions in 32 bits, then offsets in 64
    pid = tl.program_id(0)
    begin = (pid % splits) * chunk
    batch = (pid // splits).to(tl.int64)
    end = tl.minimum(begin + chunk, n)
    if NORMALIZE:
        for first in range(begin, end, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            pointers, there = row_pointers(z, index, batch, rows, n, z_batch, z_row)
            squares = tl.zeros([BLOCK_N], dtype=ACC)
            for column in range(0, d, BLOCK_D):
                columns = column + tl.arange(0, BLOCK_D)
                inside = (rows < end)[:, None] & (columns < d)[None, :]
                x = load_rows(pointers, there, inside, columns, index, ACC)
                squares += tl.sum(x * x, 1)
            tl.store(scale + batch * n + rows, checked_inverse_norm(squares), mask=rows < end)
        # the scales are read again below, by other threads
        tl.debug_barrier()
    if SUMS:
        for column in range(0, d, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            total = tl.zeros([BLOCK_D], dtype=ACC)
            for first in range(begin, end, BLOCK_N):
                rows = first + tl.arange(0, BLOCK_N)
                pointers, there = row_pointers(z, index, batch, rows, n, z_batch, z_row)
                inside = (rows < end)[:, None] & (columns < d)[None, :]
                x = load_rows(pointers, there, inside, columns, index, ACC)
                if NORMALIZE:
                    x *= tl.load(scale + batch * n + rows, mask=rows < end, other=0.0)[:, None]
                total += tl.sum(x, 0)
            tl.store(sums + pid.to(tl.int64) * d + columns, total, mask=columns < d)


@triton.jit
def load_gradient(dx, order, offsets, batch, rows, columns, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradient on rows: `dx[batch, rows]`, or the sum of the rows of `dx` that `order` and `offsets` assign to each."""
    if order is None:
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        at = dx + (batch * n + rows.to(tl.int64))[:, None] * d + columns[None, :]
        total = tl.load(at, mask=inside, other=0.0)
    else:
        begin = tl.load(offsets + rows, mask=rows < n, other=0)
        count = tl.load(offsets + rows + 1, mask=rows < n, other=0) - begin
        total = tl.zeros([BLOCK_N, BLOCK_D], dtype=dx.dtype.element_ty)
        for occurrence in range(0, tl.max(count, 0).to(tl.int32)):
            # clamped, not masked: Triton 3.6 does not compile a masked load here
            source = tl.load(order + tl.maximum(begin + tl.minimum(occurrence, count - 1), 0))
            inside = (occurrence < count[:, None]) & (columns < d)[None, :]
            total += tl.load(dx + source[:, None] * d + columns[None, :], mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["n", "row_blocks", "splits", "count", "z_batch", "z_row"])
def tangent_kernel(
    dx, order, offsets, z, sums, out, n, d, row_blocks, splits, count, z_unit, z_batch, z_row,
    NORMALIZE: tl.constexpr, CENTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient on z from the gradient on its centred, normalised rows; 0 on zero rows."""
    z_batch = z_batch.to(tl.int64) * z_unit
    z_row *= z_unit
    pid = tl.program_id(0)
    batch = (pid // row_blocks).to(tl.int64)
    rows = (pid % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pointers, _there = row_pointers(z, None, batch, rows, n, z_batch, z_row)
    along = tl.zeros([BLOCK_N], dtype=dx.dtype.element_ty)
    squares = tl.zeros([BLOCK_N], dtype=dx.dtype.element_ty)
    if NORMALIZE:
        for column in range(0, d, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside = (rows < n)[:, None] & (columns < d)[None, :]
            x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(dx.dtype.element_ty)
            g = load_gradient(dx, order, offsets, batch, rows, columns, n, d, BLOCK_N, BLOCK_D)
            if CENTER:
                g -= column_mean(sums, batch, columns, count, d, splits)[None, :]
            squares += tl.sum(x * x, 1)
            along += tl.sum(x * g, 1)
    inverse = inverse_norm(squares)
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        g = load_gradient(dx, order, offsets, batch, rows, columns, n, d, BLOCK_N, BLOCK_D)
        if CENTER:
            g -= column_mean(sums, batch, columns, count, d, splits)[None, :]
        if NORMALIZE:
            x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(dx.dtype.element_ty)
            g = tangent(g, x * inverse[:, None], along * inverse, squares)
        at = out + (batch * n + rows.to(tl.int64))[:, None] * d + columns[None, :]
        tl.store(at, g.to(out.dtype.element_ty), mask=inside)


# stages and blocks are the largest that do not spill (bench/aot.py)
ROW_STATISTICS = {
    torch.float32: Configuration({"BLOCK_N": 64, "BLOCK_D": 128}, num_warps=4),
    torch.float64: Configuration({"BLOCK_N": 32, "BLOCK_D": 128}, num_warps=8),
}
TANGENT = {
    torch.float32: Configuration({"BLOCK_N": 32, "BLOCK_D": 128}, num_warps=4, num_stages=1),
    torch.float64: Configuration({"BLOCK_N": 8, "BLOCK_D": 128}, num_warps=8, num_stages=1),
}
CONFIGURATIONS = {
    **{f"row_statistics {dtype}": use for dtype, use in ROW_STATISTICS.items()},
    **{f"tangent {dtype}": use for dtype, use in TANGENT.items()},
}


@dataclass(frozen=True)
class Statistics:
    """Inverse norms (b, n) and partial column sums (b, splits, d), where wanted."""

    scale: Tensor | None = None
    sums: Tensor | None = None
    splits: int = 1
    # what the sums are divided by
    count: int = 1

    def mean(self) -> Tensor | None:
        return None if self.sums is None else self.sums.sum(1) / self.count


def row_statistics(z: Tensor, index: Tensor | None, normalize: bool, sums: bool, acc: torch.dtype) -> Statistics:
    """Statistics of the rows of z (b, n, d), or of the rows of z (N, d) that index (b, n) names: one launch, or none."""
    if not normalize and not sums:
        return Statistics()
    b, n = z.shape[:2] if index is None else index.shape
    d = z.shape[-1]
    use = ROW_STATISTICS[acc]
    splits, chunk = split_rows(n, use["BLOCK_N"], b, max(4 * use["BLOCK_N"], -(-n // 64)))
    scale = z.new_empty(b, n, dtype=acc) if normalize else None
    totals = z.new_empty(b, splits, d, dtype=acc) if sums else None
    launch(
        row_statistics_kernel,
        b * splits,
        (z, index, scale, totals, n, d, splits, chunk, *batch_strides(z)),
        {"NORMALIZE": normalize, "SUMS": sums, "ACC": triton_dtype(acc)},
        use,
    )
    return Statistics(scale, totals, splits, n)


def read_rows_backward(dx: Tensor, z: Tensor, normalize: bool, sums: Statistics) -> Tensor:
    """Gradient on z (b, n, d) from dx (b, n, d) in the accumulation dtype, less its mean where `sums` has sums."""
    b, n, d = z.shape
    use = TANGENT[dx.dtype]
    out = z.new_empty(z.shape)
    blocks = -(-n // use["BLOCK_N"])
    launch(
        tangent_kernel,
        b * blocks,
        (dx, None, None, z, sums.sums, out, n, d, blocks, sums.splits, sums.count, *batch_strides(z)),
        {"NORMALIZE": normalize, "CENTER": sums.sums is not None},
        use,
    )
    return out


def scatter_rows_backward(dx: Tensor, pool: Tensor, indices: Tensor, normalize: bool) -> Tensor:
    """Gradient on pool (N, d) from the gradients dx (c, b, d) on its rows `indices` (c, b).

    Each row of the pool adds up its occurrences in their order: deterministic, without atomics.
    """
    rows, d = pool.shape
    ordered, order = indices.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(rows + 1, device=pool.device))
    use = TANGENT[dx.dtype]
    out = pool.new_empty(pool.shape)
    blocks = -(-rows // use["BLOCK_N"])
    launch(
        tangent_kernel,
        blocks,
        (dx, order, offsets, pool, None, out, rows, d, blocks, 1, 1, *batch_strides(pool)),
        {"NORMALIZE": normalize, "CENTER": False},
        use,
    )
    return out


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover this module's kernels and configurations."""

    def call(dtype: torch.dtype) -> None:
        z = torch.empty(4, 256, 512, dtype=dtype, device="meta")
        acc = accumulation_dtype(dtype)
        statistics = row_statistics(z, None, True, True, acc)
        read_rows_backward(z.to(acc), z, True, statistics)
        scatter_rows_backward(z.to(acc), z[0], torch.empty(4, 256, dtype=torch.int64, device="meta"), True)

    return [lambda dtype=dtype: call(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]  # type: ignore[misc]
