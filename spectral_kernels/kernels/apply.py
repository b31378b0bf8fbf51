"""Rows times a matrix, and what the gradients of ops add to it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.kernels.launch import AotCall, Configuration, launch
from spectral_kernels.kernels.precision import arithmetic, dot_precision, triton_dtype
from spectral_kernels.kernels.rows import NO_STRIDES, batch_strides, in_units, load_part, round_to_tf32, row_pointers
from spectral_kernels.kernels.statistics import Statistics, column_mean, inverse_norm, row_statistics, tangent
from spectral_kernels.ops._rows import accumulation_dtype


@triton.jit(
    do_not_specialize=[
        "n", "row_blocks", "mean_splits", "mean_count", "count", "z_batch", "z_row",
        "second_batch", "second_row",
    ]
)  # fmt: skip
def apply_kernel(
    z, index, scale, sums, matrix, second, second_mean, second_matrix, weights, squares, out,
    n_unit, n, d, row_blocks, column_blocks, mean_splits, mean_count, count,
    z_unit, z_batch, z_row, second_unit, second_batch, second_row,
    GRAM: tl.constexpr, NORMALIZE: tl.constexpr, CENTER: tl.constexpr, TRANSPOSE: tl.constexpr,
    SYMMETRIZE: tl.constexpr, SECOND: tl.constexpr, RANK: tl.constexpr, QUARTIC: tl.constexpr, TANGENT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows times a matrix: x W / count, a block of rows and columns.

    W is matrix, its transpose, or (SYMMETRIZE) their sum. GRAM: matrix (n, n) times rows. SECOND adds 2 y V / n for a second
    pair of rows (centred, not normalised) and matrix. RANK makes it the gradient of order-2 rank, with `weights`
    (b, 4) = its derivatives: 2 w₁ x + 4 w₂ (x W) + 4 w₃ ‖x‖² x. TANGENT (d <= BLOCK_D) goes through the normalisation.
    """
    n *= n_unit
    z_batch = z_batch.to(tl.int64) * (z_unit if index is None else 1)
    z_row *= z_unit
    second_batch = second_batch.to(tl.int64) * second_unit
    second_row *= second_unit
    pid = tl.program_id(0)
    column_block = pid % column_blocks
    row_block = pid // column_blocks % row_blocks
    batch = (pid // column_blocks // row_blocks).to(tl.int64)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    mean = tl.zeros([BLOCK_K], dtype=ACC)
    column_center = tl.zeros([BLOCK_D], dtype=ACC)
    if CENTER:
        column_center = column_mean(sums, batch, columns, mean_count, d, mean_splits)
    if GRAM:
        for first in range(0, n, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)
            at = matrix + (batch * n + rows.to(tl.int64))[:, None] * n + inner[None, :]
            a = tl.load(at, mask=(rows < n)[:, None] & (inner < n)[None, :], other=0.0)
            b = load_part(
                z, index, scale, batch, inner, columns, n, n, d, z_batch, z_row, column_center, NORMALIZE, CENTER, ACC
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for first in range(0, d, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)
            inside = (inner < d)[:, None] & (columns < d)[None, :]
            base = matrix + batch * d * d
            row_major = base + inner.to(tl.int64)[:, None] * d + columns[None, :]
            column_major = base + columns.to(tl.int64)[None, :] * d + inner[:, None]
            w = tl.load(column_major if TRANSPOSE else row_major, mask=inside, other=0.0)
            if SYMMETRIZE:
                w += tl.load(column_major, mask=inside, other=0.0)
            if CENTER:
                mean = column_mean(sums, batch, inner, mean_count, d, mean_splits)
            a = load_part(z, index, scale, batch, rows, inner, n, n, d, z_batch, z_row, mean, NORMALIZE, CENTER, ACC)
            if PRECISION == "tf32":
                a = round_to_tf32(a)
                w = round_to_tf32(w)
            acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC)
    acc = acc / count
    if SECOND:
        more = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
        for first in range(0, d, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)
            inside = (inner < d)[:, None] & (columns < d)[None, :]
            at = second_matrix + batch * d * d + inner.to(tl.int64)[:, None] * d + columns[None, :]
            w = tl.load(at, mask=inside, other=0.0)
            mean = column_mean(second_mean, batch, inner, 1, d, 1)
            a = load_part(
                second, None, scale, batch, rows, inner, n, n, d, second_batch, second_row, mean, False, True, ACC
            )
            more = tl.dot(a, w, more, input_precision=PRECISION, out_dtype=ACC)
        acc += 2.0 * more / n
    if RANK:
        x = load_part(
            z, index, scale, batch, rows, columns, n, n, d, z_batch, z_row, column_center, NORMALIZE, CENTER, ACC
        )
        acc = 4.0 * tl.load(weights + batch * 4 + 2) * acc + 2.0 * tl.load(weights + batch * 4 + 1) * x
        if QUARTIC:
            length = tl.load(squares + batch * n + rows, mask=rows < n, other=0.0)
            acc += 4.0 * tl.load(weights + batch * 4 + 3) * length[:, None] * x
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    if TANGENT:
        pointers, _there = row_pointers(z, None, batch, rows, n, z_batch, z_row)
        x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(ACC)
        length = tl.sum(x * x, 1)
        unit = x * inverse_norm(length)[:, None]
        acc = tangent(acc, unit, tl.sum(unit * acc, 1), length)
    at = out + (batch * n + rows.to(tl.int64))[:, None] * d + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


# by arithmetic and columns
APPLY = {
    ("ieee", 32): Configuration({"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": 32}, num_warps=4, num_stages=1),
    ("ieee", 128): Configuration({"BLOCK_N": 32, "BLOCK_D": 128, "BLOCK_K": 16}, num_warps=8, num_stages=1),
    ("tensor", 32): Configuration({"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": 32}, num_warps=4),
    ("tensor", 128): Configuration({"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 32}, num_warps=8),
    ("fp64", 32): Configuration({"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 32}, num_warps=4),
    ("fp64", 128): Configuration({"BLOCK_N": 32, "BLOCK_D": 128, "BLOCK_K": 32}, num_warps=8, num_stages=1),
}
CONFIGURATIONS = {f"apply {key}": use for key, use in APPLY.items()}


def whole_rows(d: int) -> bool:
    """Whether a program of `apply` sees whole rows."""
    return d <= 128


def apply(
    z: Tensor, matrix: Tensor, statistics: Statistics, *, index: Tensor | None = None, count: int = 1,
    dtype: torch.dtype | None = None, precision: str = "ieee", transpose: bool = False, symmetrize: bool = False,
    gram: bool = False, second: tuple[Tensor, Tensor, Tensor] | None = None, weights: Tensor | None = None,
    squares: Tensor | None = None, tangent: bool = False,
) -> Tensor:  # fmt: skip
    """Rows of z (b, n, d), normalised and centred as `statistics` has it, times a matrix: see `apply_kernel`.

    Args:
        index: (b, n) names rows of a pool z (N, d).
        dtype: of the result; None is that of the matrix.
        second: (rows (b, n, d), their mean (b, d), matrix (b, d, d)).
        weights: (b, 4), makes the result the gradient of order-2 rank; squares (b, n) for its last term.
        tangent: go through the normalisation; needs `whole_rows(d)`.
    """
    b, n = z.shape[:2] if index is None else index.shape
    d = z.shape[-1]
    acc = matrix.dtype
    use = APPLY[arithmetic(precision, z.dtype, acc), 32 if d <= 32 else 128]
    blocks = (-(-n // use["BLOCK_N"]), -(-d // use["BLOCK_D"]))
    out = z.new_empty(b, n, d, dtype=dtype or acc)
    other, other_mean, other_matrix = second if second is not None else (None, None, None)
    launch(
        apply_kernel,
        b * blocks[0] * blocks[1],
        (
            z, index, statistics.scale, statistics.sums, matrix, other, other_mean, other_matrix, weights, squares, out,
            *(in_units(n) if gram else (1, n)), d, *blocks, statistics.splits, statistics.count, count, *batch_strides(z),
            *(batch_strides(other) if other is not None else NO_STRIDES),
        ),
        {
            "GRAM": gram, "NORMALIZE": statistics.scale is not None, "CENTER": statistics.sums is not None,
            "TRANSPOSE": transpose, "SYMMETRIZE": symmetrize, "SECOND": second is not None,
            "RANK": weights is not None, "QUARTIC": squares is not None, "TANGENT": tangent,
            "ACC": triton_dtype(acc), "PRECISION": dot_precision(precision, z.dtype, acc),
        },
        use,
    )  # fmt: skip
    return out


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover the configurations that no op's calls reach."""

    def call(dtype: torch.dtype) -> None:
        z = torch.empty(4, 256, 32, dtype=dtype, device="meta")
        acc = accumulation_dtype(dtype)
        apply(z, torch.empty(4, 32, 32, dtype=acc, device="meta"), row_statistics(z, None, True, True, acc))

    return [lambda dtype=dtype: call(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]  # type: ignore[misc]
