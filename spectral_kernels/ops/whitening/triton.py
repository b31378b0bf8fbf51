"""Whitening: covariance, products with rows, and what takes the gradient to the covariance, by Triton.

The whitening matrix itself, and the gradient of other methods than Cholesky's or beyond 128 features, are torch's in
float64 (reference.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.kernels.apply import apply
from spectral_kernels.kernels.launch import AotCall, Configuration, launch
from spectral_kernels.kernels.moments import moments
from spectral_kernels.kernels.precision import split_float
from spectral_kernels.kernels.rows import dense_rows
from spectral_kernels.kernels.statistics import Statistics
from spectral_kernels.kernels.sums import arrive, counters
from spectral_kernels.kernels.tiles import cross_product, tile_of
from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops.whitening.reference import whitening_matrix, whitening_matrix_backward

# of more features a tile's program would multiply too much on its own
MOST_FEATURES = 128


@triton.jit
def load_tile(matrix, d, batch, rows, columns):
    """A tile of a matrix of (b, d, d), in float64; 0 outside."""
    at = (batch * d + rows)[:, None] * d + columns[None, :]
    return tl.load(matrix + at, mask=(rows < d)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["tiles", "side_tiles"])
def factor_gradient_kernel(dmatrix, matrix, phi, d, tiles, side_tiles, BLOCK: tl.constexpr):
    """Φ = the lower triangle of −dW Wᵀ, its diagonal halved; a tile on or below the diagonal a program."""
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    i, j = tile_of(pid % tiles, side_tiles, False)
    line = tl.arange(0, BLOCK)
    rows = i * BLOCK + line
    columns = j * BLOCK + line
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
    # W is lower triangular
    for k in range(0, j + 1):
        inner = k * BLOCK + line
        a = load_tile(dmatrix, d, batch, rows, inner)
        b = load_tile(matrix, d, batch, columns, inner)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee", out_dtype=tl.float64)
    weight = tl.where(rows[:, None] > columns[None, :], -1.0, tl.where(rows[:, None] == columns[None, :], -0.5, 0.0))
    at = (batch * d + rows)[:, None] * d + columns[None, :]
    tl.store(phi + at, acc * weight, mask=(rows < d)[:, None] & (columns < d)[None, :])


@triton.jit
def congruence(phi, matrix, d, batch, i, j, side_tiles, BLOCK: tl.constexpr):
    """Tile (i, j) of WᵀΦW, both lower triangular."""
    line = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
    for m in range(j, side_tiles):
        part = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
        for k in range(tl.maximum(i, m), side_tiles):
            w = load_tile(matrix, d, batch, k * BLOCK + line, i * BLOCK + line)
            f = load_tile(phi, d, batch, k * BLOCK + line, m * BLOCK + line)
            part = tl.dot(tl.trans(w), f, part, input_precision="ieee", out_dtype=tl.float64)
        w = load_tile(matrix, d, batch, m * BLOCK + line, j * BLOCK + line)
        acc = tl.dot(part, w, acc, input_precision="ieee", out_dtype=tl.float64)
    return acc


@triton.jit(do_not_specialize=["tiles", "side_tiles"])
def covariance_gradient_kernel(
    phi, matrix, covariance, diagonal, counters, out, d, tiles, side_tiles, shrinkage, shrinkage_rest,
    BLOCK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Gradient on the covariance: WᵀΦW made symmetric, through the shrinkage; 0 for a batch without spread.

    A tile on or below the diagonal and its mirror image a program; the last one, which knows the trace, adds it.
    """
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    i, j = tile_of(pid % tiles, side_tiles, False)
    line = tl.arange(0, BLOCK)
    rows = i * BLOCK + line
    columns = j * BLOCK + line
    epsilon = tl.full([], 0.0, dtype=tl.float64) + shrinkage + shrinkage_rest
    side = tl.arange(0, SIDE)
    place = (batch * d + side) * d + side
    spread = tl.sum(tl.load(covariance + place, mask=side < d, other=0.0).to(tl.float64), 0)
    half = congruence(phi, matrix, d, batch, i, j, side_tiles, BLOCK)
    half += tl.trans(congruence(phi, matrix, d, batch, j, i, side_tiles, BLOCK))
    half = tl.where(spread > 0, 0.5 * half, 0.0)
    value = ((1.0 - epsilon) * half).to(out.dtype.element_ty)
    inside = (rows < d)[:, None] & (columns < d)[None, :]
    base = out + batch * d * d
    tl.store(base + rows[:, None] * d + columns[None, :], value, mask=inside)
    if i != j:
        tl.store(base + columns[None, :] * d + rows[:, None], value, mask=inside)
    else:
        on = tl.sum(tl.where(rows[:, None] == columns[None, :], half, 0.0), 1)
        tl.store(diagonal + batch * d + rows, on, mask=rows < d)
    if arrive(counters + batch, tiles):
        on = tl.load(diagonal + batch * d + side, mask=side < d, other=0.0, cache_modifier=".cg")
        on = (1.0 - epsilon) * on + epsilon * tl.sum(on, 0) / d
        tl.store(out + place, on.to(out.dtype.element_ty), mask=side < d)


FACTOR_GRADIENT = Configuration({"BLOCK": 32}, num_warps=4, num_stages=1)
COVARIANCE_GRADIENT = Configuration({"BLOCK": 32, "SIDE": MOST_FEATURES}, num_warps=4, num_stages=1)
CONFIGURATIONS = {"factor_gradient": FACTOR_GRADIENT, "covariance_gradient": COVARIANCE_GRADIENT}


def covariance_of(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Covariance (b, d, d) and mean (b, d), or second moment and 0."""
    found = moments(z, None, center, False, acc=accumulation_dtype(z.dtype), count=z.shape[1], one_launch=True)
    if not center:
        return found.matrix, found.matrix.new_zeros(z.shape[0], z.shape[2])
    mean = found.mean if found.mean is not None else found.statistics.mean()
    assert mean is not None
    return found.matrix, mean


def whitened(z: Tensor, mean: Tensor, matrix: Tensor, center: bool) -> Tensor:
    """(z − mean)Wᵀ."""
    return apply(z, matrix, Statistics(sums=mean if center else None), transpose=True, dtype=z.dtype)


def whiten(z: Tensor, method: str, shrinkage: float, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = dense_rows(z)
    covariance, mean = covariance_of(z, center)
    matrix = whitening_matrix(covariance, method, shrinkage).contiguous()
    return whitened(z, mean, matrix, center), mean, covariance, matrix


def cholesky_backward(dmatrix: Tensor, covariance: Tensor, matrix: Tensor, shrinkage: float) -> Tensor:
    """As `whitening_matrix_backward` of reference.py by Cholesky, in the dtype of the covariance: two launches."""
    b, d = covariance.shape[:2]
    block = FACTOR_GRADIENT["BLOCK"]
    side_tiles = -(-d // block)
    tiles = side_tiles * (side_tiles + 1) // 2
    phi = torch.empty_like(dmatrix, dtype=torch.float64)
    out = torch.empty_like(covariance)
    launch(factor_gradient_kernel, b * tiles, (dmatrix, matrix, phi, d, tiles, side_tiles), {}, FACTOR_GRADIENT)
    launch(
        covariance_gradient_kernel,
        b * tiles,
        (
            phi, matrix, covariance, phi.new_empty(b, d), counters(phi, b), out, d, tiles, side_tiles,
            *split_float(shrinkage),
        ),
        {},
        COVARIANCE_GRADIENT,
    )  # fmt: skip
    return out


def whiten_backward(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    covariance: Tensor,
    matrix: Tensor,
    method: str,
    shrinkage: float,
    center: bool,
    y: Tensor | None = None,
) -> Tensor:
    z, grad = dense_rows(z), dense_rows(grad)
    mean, covariance, matrix = mean.contiguous(), covariance.contiguous(), matrix.contiguous()
    # taking the mean out of grad takes it out of the result: the other term has none
    sums = torch.empty_like(mean) if center else None
    dmatrix = cross_product(grad, z, mean, sums)
    if method == "cholesky" and z.shape[-1] <= MOST_FEATURES:
        dcovariance = cholesky_backward(dmatrix, covariance, matrix, shrinkage)
    else:
        dcovariance = (
            whitening_matrix_backward(dmatrix, covariance, matrix, method, shrinkage).to(mean.dtype).contiguous()
        )
    statistics = Statistics(sums=sums, count=z.shape[1])
    return apply(grad, matrix, statistics, second=(z, mean, dcovariance), dtype=z.dtype)


def aot_calls() -> list[AotCall]:
    """All but the matrix itself, which reads values and so does not run on meta tensors."""

    def call(n: int, d: int, dtype: torch.dtype) -> None:
        z = torch.empty(1, n, d, dtype=dtype, device="meta")
        covariance, mean = covariance_of(z, True)
        whitened(z, mean, covariance, True)
        whiten_backward(z, z, mean, covariance, covariance, "cholesky", 1e-4, True)

    return [
        lambda: call(4096, 64, torch.float32),
        lambda: call(4096, 128, torch.float32),
        lambda: call(512, 128, torch.float32),
        lambda: call(4096, 128, torch.bfloat16),
        lambda: call(4096, 128, torch.float64),
    ]
