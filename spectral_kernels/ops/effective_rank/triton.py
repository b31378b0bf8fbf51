"""Order-2 effective rank: the matrix stays in registers, tile by tile, and the last program of a batch makes its sums a rank.

Batches of a pool are gathered by index as they are read. Gradients add up where a row of the pool occurs in many batches,
in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.kernels.apply import apply, whole_rows
from spectral_kernels.kernels.launch import AotCall, Configuration, launch
from spectral_kernels.kernels.precision import triton_dtype
from spectral_kernels.kernels.row_tiles import by_rows, row_products
from spectral_kernels.kernels.rows import batch_strides, dense_rows, load_part
from spectral_kernels.kernels.statistics import (
    Statistics,
    column_mean,
    read_rows_backward,
    row_statistics,
    scatter_rows_backward,
)
from spectral_kernels.kernels.tiles import RankInputs, tile_products, tile_statistics
from spectral_kernels.ops._rows import accumulation_dtype, unit_scale
from spectral_kernels.ops.spectrum.triton import gathered_spectrum


@triton.jit(do_not_specialize=["n", "row_blocks", "mean_splits", "mean_count", "z_batch", "z_row"])
def row_squares_kernel(
    z, scale, sums, squares, quartics, n, d, row_blocks, mean_splits, mean_count, z_unit, z_batch, z_row,
    NORMALIZE: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """‖x‖² of each normalised, centred row to `squares` (b, n), and Σ‖x‖⁴ of a block of rows to `quartics` (b, blocks)."""
    z_batch = z_batch.to(tl.int64) * z_unit
    z_row *= z_unit
    pid = tl.program_id(0)
    batch = (pid // row_blocks).to(tl.int64)
    rows = (pid % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.zeros([BLOCK_N], dtype=ACC)
    mean = tl.zeros([BLOCK_D], dtype=ACC)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        if CENTER:
            mean = column_mean(sums, batch, columns, mean_count, d, mean_splits)
        x = load_part(z, None, scale, batch, rows, columns, n, n, d, z_batch, z_row, mean, NORMALIZE, CENTER, ACC)
        length += tl.sum(x * x, 1)
    tl.store(squares + batch * n + rows, length, mask=rows < n)
    tl.store(quartics + pid, tl.sum(length * length, 0))


SQUARES = {
    torch.float32: Configuration({"BLOCK_N": 32, "BLOCK_D": 128}, num_warps=4, num_stages=1),
    torch.float64: Configuration({"BLOCK_N": 16, "BLOCK_D": 128}, num_warps=4, num_stages=1),
}
CONFIGURATIONS = {f"row_squares {dtype}": use for dtype, use in SQUARES.items()}
# three products of bf16 keep 16 bits of each operand; R₂, an average over them, has float32's error
PRECISION = "bf16x3"


def biased_ranks(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, acc: torch.dtype, gram: bool
) -> Tensor:
    """Order-2 ranks (b,); the matrix, of either side, is never stored."""
    precision = "ieee" if acc == torch.float64 else PRECISION
    use = by_rows(z, precision, acc)
    if not gram and use is not None:
        return row_products(z, index, center, normalize, acc, precision, use, rank=True)[0]
    statistics = tile_statistics(z, index, center, normalize, acc, gram)
    value = tile_products(
        z, index, statistics, normalize, acc, precision=precision, gram=gram, matrix=False, rank=RankInputs(None, None)
    ).rank
    assert value is not None
    return value


def _row_squares(z: Tensor, statistics: Statistics, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    b, n, d = z.shape
    use = SQUARES[acc]
    blocks = -(-n // use["BLOCK_N"])
    squares, quartics = z.new_empty(b, n, dtype=acc), z.new_empty(b, blocks, dtype=acc)
    launch(
        row_squares_kernel,
        b * blocks,
        (
            z, statistics.scale, statistics.sums, squares, quartics, n, d, blocks, statistics.splits, statistics.count,
            *batch_strides(z),
        ),
        {
            "NORMALIZE": statistics.scale is not None, "CENTER": statistics.sums is not None, "ACC": triton_dtype(acc),
        },
        use,
    )  # fmt: skip
    return squares, quartics


def _gram_side(n: int, d: int) -> bool:
    # whole rows fit one tile up to 128 features: the d x d side then needs one pass and no norms before it
    return n < d and not whole_rows(d)


def _forward(z: Tensor, index: Tensor | None, center: bool, normalize: bool, unbiased: bool) -> Tensor:
    acc = accumulation_dtype(z.dtype)
    n, d = z.shape[-2] if index is None else index.shape[1], z.shape[-1]
    if not unbiased:
        return biased_ranks(z, index, center, normalize, acc, _gram_side(n, d))
    statistics = row_statistics(z, index, normalize, center, acc)
    given = RankInputs(_row_squares(z, statistics, acc)[1], None)
    value = tile_products(z, index, statistics, normalize, acc, gram=_gram_side(n, d), matrix=False, rank=given).rank
    assert value is not None
    return value


def _row_gradient(
    grad: Tensor, z: Tensor, index: Tensor | None, center: bool, normalize: bool, unbiased: bool, tangent: bool
) -> tuple[Tensor, Statistics]:
    """Gradient on the normalised rows, in z's dtype and through the normalisation if `tangent`; and their statistics."""
    acc = accumulation_dtype(z.dtype)
    n, d = z.shape[-2] if index is None else index.shape[1], z.shape[-1]
    gram = _gram_side(n, d)
    statistics = row_statistics(z, index, normalize, center, acc)
    squares, quartics = _row_squares(z, statistics, acc) if unbiased else (None, None)
    found = tile_products(z, index, statistics, normalize, acc, gram=gram, rank=RankInputs(quartics, grad.contiguous()))
    assert found.matrix is not None
    dx = apply(
        z, found.matrix, statistics, index=index, gram=gram, weights=found.weights, squares=squares, tangent=tangent,
        dtype=z.dtype if tangent else None,
    )  # fmt: skip
    return dx, statistics


def effective_rank2(z: Tensor, center: bool, normalize: bool, unbiased: bool) -> Tensor:
    return _forward(dense_rows(z if normalize else z * unit_scale(z)), None, center, normalize, unbiased)


def effective_rank2_backward(grad: Tensor, z: Tensor, center: bool, normalize: bool, unbiased: bool) -> Tensor:
    # no squares of raw rows beyond float32
    dtype, scale = z.dtype, None if normalize else unit_scale(z)
    z = dense_rows(z if scale is None else z * scale)
    # ‖x‖² x has a mean: only then does centring take something out
    centered = center and unbiased
    tangent = normalize and whole_rows(z.shape[-1]) and not centered
    dx, _ = _row_gradient(grad, z, None, center, normalize, unbiased, tangent)
    if tangent:
        return dx
    statistics = row_statistics(dx, None, False, centered, dx.dtype)
    dz = read_rows_backward(dx, z, normalize, statistics)
    return dz if scale is None else (dz * scale).to(dtype)


def batch_effective_rank2(pool: Tensor, indices: Tensor, center: bool, normalize: bool) -> Tensor:
    return _forward(
        dense_rows(pool if normalize else pool * unit_scale(pool)), indices.contiguous(), center, normalize, False
    )


def batch_effective_rank2_backward(
    grad: Tensor, pool: Tensor, indices: Tensor, center: bool, normalize: bool
) -> Tensor:
    dtype, scale = pool.dtype, None if normalize else unit_scale(pool)
    pool, indices = dense_rows(pool if scale is None else pool * scale), indices.contiguous()
    dx, _ = _row_gradient(grad, pool, indices, center, normalize, False, False)
    dpool = scatter_rows_backward(dx, pool, indices, normalize)
    return dpool if scale is None else (dpool * scale).to(dtype)


def batch_spectrum(pool: Tensor, indices: Tensor, center: bool, normalize: bool) -> Tensor:
    return gathered_spectrum(dense_rows(pool), indices.contiguous(), center, normalize)


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover this module's kernels and configurations."""

    def call(n: int, d: int, dtype: torch.dtype, unbiased: bool) -> None:
        z = torch.empty(1, n, d, dtype=dtype, device="meta")
        grad = torch.empty(1, dtype=accumulation_dtype(dtype), device="meta")
        effective_rank2(z, True, True, unbiased)
        effective_rank2_backward(grad, z, True, True, unbiased)

    def batch(b: int, d: int, dtype: torch.dtype) -> None:
        pool = torch.empty(4096, d, dtype=dtype, device="meta")
        indices = torch.empty(64, b, dtype=torch.int64, device="meta")
        grad = torch.empty(64, dtype=accumulation_dtype(dtype), device="meta")
        batch_effective_rank2(pool, indices, False, True)
        batch_effective_rank2_backward(grad, pool, indices, False, True)

    def gram(dtype: torch.dtype) -> None:
        for rows in (48, 256):
            z = torch.empty(8, rows, 512, dtype=dtype, device="meta")
            for center in (False, True):
                biased_ranks(z, None, center, True, accumulation_dtype(dtype), gram=True)

    return [
        lambda: call(65536, 128, torch.float32, False),
        lambda: call(4096, 512, torch.float32, True),
        lambda: call(4096, 512, torch.float64, True),
        lambda: call(256, 512, torch.bfloat16, False),
        lambda: batch(256, 128, torch.float32),
        lambda: batch(256, 128, torch.bfloat16),
        lambda: batch(256, 1024, torch.float32),
        lambda: batch(256, 1024, torch.float64),
        *(lambda dtype=dtype: gram(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    ]
