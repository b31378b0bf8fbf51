"""InfoNCE and NT-Xent, flash style: similarities live a tile at a time, B x B is never stored.

Forward: a program owns a block of anchors, runs over all others with an online log-sum-exp, and finishes loss and lse.
Backward: a program owns a block of rows (and of features), recomputes the similarities and adds up the weighted others;
u·du, which the normalisation needs, follows from the similarities themselves. Rows are never normalised in memory: their
inverse norms multiply the similarities. Half-precision products are exact, so they enter `tl.dot` as they are.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import words as error_words
from spectral_kernels.kernels.launch import INTERPRETED, AotCall, Configuration, launch
from spectral_kernels.kernels.precision import dot_precision, split_float, triton_dtype
from spectral_kernels.kernels.rows import WORD, dense_rows, holds_nan, note_rows, round_to_tf32
from spectral_kernels.kernels.statistics import checked_inverse_norm, inverse_norm, tangent
from spectral_kernels.ops._rows import accumulation_dtype


@triton.jit
def row_pointers(first, second, part, rows, first_row, second_row, TWO: tl.constexpr):
    """Pointers to rows of a half: of `first`, or where TWO of `second` for part 1."""
    if TWO:
        pointers = tl.where(part == 0, first, second) + rows.to(tl.int64) * tl.where(part == 0, first_row, second_row)
    else:
        pointers = first + rows.to(tl.int64) * first_row
    return pointers


@triton.jit
def note_block(
    errors, x, x_second, p, y, part, block, m, n, d, x_row, x_second_row, p_row, y_row,
    TWO: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Look for NaN and Inf in a block of anchors, in their positives and in the queue; another block has met the rest."""
    begin = block * BLOCK_M
    end = tl.minimum(begin + BLOCK_M, m)
    first = tl.full([], 0, dtype=tl.int64)
    if TWO:
        rows = tl.where(part == 0, x, x_second)
        stride = tl.where(part == 0, x_row, x_second_row)
        note_rows(errors + WORD * part, None, rows, None, first, begin, end, m, d, 0, stride)
    else:
        note_rows(errors, None, x, None, first, begin, end, m, d, 0, x_row)
        note_rows(errors + WORD, None, p, None, first, begin, end, m, d, 0, p_row)
        if not DIAGONAL:
            note_rows(errors + 2 * WORD, None, y, None, first, 0, n, n, d, 0, y_row)


@triton.jit
def load_chunk(pointers, inside, columns, d, ACC: tl.constexpr, NATIVE: tl.constexpr):
    x = tl.load(pointers[:, None] + columns[None, :], mask=inside[:, None] & (columns < d)[None, :], other=0.0)
    return x if NATIVE else x.to(ACC)


@triton.jit
def anchor_products(
    x_pointers,
    p_pointers,
    inside,
    d,
    CHECKED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """1/‖x‖, 1/‖p‖ and cosine of paired rows, ‖x‖² and ‖p‖²."""
    xx = tl.zeros([ROWS], dtype=ACC)
    pp = tl.zeros([ROWS], dtype=ACC)
    xp = tl.zeros([ROWS], dtype=ACC)
    for first in range(0, d, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        x = load_chunk(x_pointers, inside, columns, d, ACC, False)
        p = load_chunk(p_pointers, inside, columns, d, ACC, False)
        xx += tl.sum(x * x, 1)
        pp += tl.sum(p * p, 1)
        xp += tl.sum(x * p, 1)
    x_inverse = checked_inverse_norm(xx) if CHECKED else inverse_norm(xx)
    p_inverse = checked_inverse_norm(pp) if CHECKED else inverse_norm(pp)
    return x_inverse, p_inverse, xp * x_inverse * p_inverse, xx, pp


@triton.jit
def similarities(
    x_pointers, x_inside, x_inverse, x_tile, y_pointers, y_inside, d,
    CHECKED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr, ONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Cosines of two blocks of rows, 1/‖y‖, and the block of y where it is whole rows (ONE)."""
    cosines = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    if ONE:
        y = load_chunk(y_pointers, y_inside, tl.arange(0, BLOCK_K), d, ACC, NATIVE)
        yy = tl.sum(y.to(ACC) * y.to(ACC), 1)
        right = round_to_tf32(y) if PRECISION == "tf32" else y
        cosines = tl.dot(x_tile, tl.trans(right), cosines, input_precision=PRECISION, out_dtype=ACC)
    else:
        y = x_tile
        yy = tl.zeros([BLOCK_N], dtype=ACC)
        for first in range(0, d, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            a = load_chunk(x_pointers, x_inside, columns, d, ACC, NATIVE)
            b = load_chunk(y_pointers, y_inside, columns, d, ACC, NATIVE)
            yy += tl.sum(b.to(ACC) * b.to(ACC), 1)
            if PRECISION == "tf32":
                a = round_to_tf32(a)
                b = round_to_tf32(b)
            cosines = tl.dot(a, tl.trans(b), cosines, input_precision=PRECISION, out_dtype=ACC)
    y_inverse = checked_inverse_norm(yy) if CHECKED else inverse_norm(yy)
    return cosines * x_inverse[:, None] * y_inverse[None, :], y_inverse, y


@triton.jit
def log1p_unit(e, TERMS: tl.constexpr):
    """ln(1 + e) for e in [0, 1], to relative rounding: 2 artanh(e / (2 + e))."""
    t = e / (2.0 + e)
    square = t * t
    total = tl.zeros_like(t)
    for k in tl.static_range(TERMS):
        total = total * square + 1.0 / (2 * (TERMS - k) - 1)
    return 2.0 * t * total


@triton.jit
def one_minus_exp(x, TERMS: tl.constexpr):
    """1 − exp(−x) for x >= 0, to relative rounding."""
    total = tl.zeros_like(x) + 1.0
    for k in tl.static_range(TERMS - 1):
        total = 1.0 - total * x / (TERMS - k)
    return tl.where(x < 0.5, x * total, 1.0 - tl.exp(-x))


@triton.jit(do_not_specialize=["m", "n", "row_blocks"])
def loss_kernel(
    x, x_second, p, y, y_second, loss, lse, errors, m, n, row_blocks, d,
    x_row, x_second_row, p_row, y_row, y_second_row, temperature, temperature_rest,
    TWO: tl.constexpr, DIAGONAL: tl.constexpr, ONE: tl.constexpr, NATIVE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss and log-partition of the anchors x (m, d) with positives p (m, d) and others y (n, d).

    TWO: x and y are two views each, one after the other, and the positives are the other view's. DIAGONAL: row i of y, in
    either view, is no negative of row i of x.
    """
    pid = tl.program_id(0)
    part = pid // row_blocks
    rows = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    tau = tl.full([], 0.0, dtype=ACC) + temperature + temperature_rest
    x_pointers = row_pointers(x, x_second, part, rows, x_row, x_second_row, TWO)
    if TWO:
        p_pointers = row_pointers(x, x_second, 1 - part, rows, x_row, x_second_row, TWO)
    else:
        p_pointers = row_pointers(p, None, part, rows, p_row, p_row, False)
    x_inverse, _p_inverse, positive, _xx, _pp = anchor_products(
        x_pointers, p_pointers, inside, d, True, ACC, BLOCK_M, BLOCK_K
    )
    x_tile = load_chunk(x_pointers, inside, tl.arange(0, BLOCK_K), d, ACC, NATIVE)
    if PRECISION == "tf32":
        x_tile = round_to_tf32(x_tile)
    top = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    for other_part in range(0, 2 if TWO else 1):
        for first in range(0, n, BLOCK_N):
            others = first + tl.arange(0, BLOCK_N)
            y_pointers = row_pointers(y, y_second, other_part, others, y_row, y_second_row, TWO)
            cosines, _y_inverse, _y = similarities(
                x_pointers, inside, x_inverse, x_tile, y_pointers, others < n, d,
                True, ACC, PRECISION, NATIVE, ONE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            counted = (others < n)[None, :] & (rows >= 0)[:, None]
            if DIAGONAL:
                counted = counted & (rows[:, None] != others[None, :])
            logits = tl.where(counted, cosines / tau, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            # a row may not have met a negative yet: -inf less -inf is NaN
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            top = higher
    positive = positive / tau
    odds = top + tl.log(total) - positive
    value = tl.maximum(odds, 0.0) + log1p_unit(tl.exp(-tl.abs(odds)), TERMS)
    if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
        if holds_nan(value[:, None]):
            note_block(errors, x, x_second, p, y, part, pid % row_blocks, m, n, d, x_row, x_second_row, p_row, y_row,
                       TWO, DIAGONAL, BLOCK_M)  # fmt: skip
    tl.store(loss + part * m + rows, value, mask=inside)
    tl.store(lse + part * m + rows, positive + value, mask=inside)


@triton.jit(do_not_specialize=["m", "n", "row_blocks"])
def gradient_kernel(
    x, x_second, p, y, y_second, grad, loss, lse, dx, dx_second, dp, m, n, row_blocks, column_blocks, d,
    x_row, x_second_row, p_row, y_row, y_second_row, temperature, temperature_rest,
    TWO: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, POSITIVE: tl.constexpr, DIAGONAL: tl.constexpr,
    ONE: tl.constexpr, NATIVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_PRECISION: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient on rows x (m, d) from their similarities with y (n, d), through the normalisation.

    BY_ROW: the rows x are anchors; BY_COLUMN: the rows y are. POSITIVE: x and p attract. TWO and DIAGONAL as above. To `dp`
    goes the gradient on p, rows that meet no negatives.
    """
    pid = tl.program_id(0)
    features = (pid % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = pid // column_blocks // row_blocks
    rows = (pid // column_blocks % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    tau = tl.full([], 0.0, dtype=ACC) + temperature + temperature_rest
    x_pointers = row_pointers(x, x_second, part, rows, x_row, x_second_row, TWO)
    if TWO:
        p_pointers = row_pointers(x, x_second, 1 - part, rows, x_row, x_second_row, TWO)
    else:
        p_pointers = row_pointers(p, None, part, rows, p_row, p_row, False)
    x_inverse, p_inverse, positive, xx, pp = anchor_products(
        x_pointers, p_pointers, inside, d, False, ACC, BLOCK_M, BLOCK_K
    )
    x_tile = load_chunk(x_pointers, inside, tl.arange(0, BLOCK_K), d, ACC, NATIVE)
    if PRECISION == "tf32":
        x_tile = round_to_tf32(x_tile)
    pulled = tl.zeros([BLOCK_M], dtype=ACC)
    row_scale = tl.zeros([BLOCK_M], dtype=ACC)
    row_lse = tl.zeros([BLOCK_M], dtype=ACC)
    at = part * m + rows
    if BY_ROW:
        row_scale = tl.load(grad + at, mask=inside, other=0.0) / tau
        row_lse = tl.load(lse + at, mask=inside, other=0.0)
    if POSITIVE:
        own = tl.load(grad + at, mask=inside, other=0.0) / tau
        pulled = own * one_minus_exp(tl.load(loss + at, mask=inside, other=0.0), TERMS)
        if TWO:
            at = (1 - part) * m + rows
            own = tl.load(grad + at, mask=inside, other=0.0) / tau
            pulled += own * one_minus_exp(tl.load(loss + at, mask=inside, other=0.0), TERMS)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    along = tl.zeros([BLOCK_M], dtype=ACC)
    for other_part in range(0, 2 if TWO else 1):
        for first in range(0, n, BLOCK_N):
            others = first + tl.arange(0, BLOCK_N)
            y_inside = others < n
            y_pointers = row_pointers(y, y_second, other_part, others, y_row, y_second_row, TWO)
            cosines, y_inverse, y_tile = similarities(
                x_pointers, inside, x_inverse, x_tile, y_pointers, y_inside, d,
                False, ACC, PRECISION, NATIVE, ONE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            # of all rows x: what lies beyond m is not stored
            counted = y_inside[None, :] & (rows >= 0)[:, None]
            if DIAGONAL:
                counted = counted & (rows[:, None] != others[None, :])
            logits = tl.where(counted, cosines / tau, float("-inf"))
            weights = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            if BY_ROW:
                weights += row_scale[:, None] * tl.exp(logits - row_lse[:, None])
            if BY_COLUMN:
                other_at = other_part * n + others
                scale = tl.load(grad + other_at, mask=y_inside, other=0.0) / tau
                weights += scale[None, :] * tl.exp(logits - tl.load(lse + other_at, mask=y_inside, other=0.0)[None, :])
            along += tl.sum(weights * cosines, 1)
            if ONE and BLOCK_K == BLOCK_D:  # noqa: SIM108 (a constant decides: only one side is compiled)
                pushed = y_tile.to(ACC)
            else:
                pushed = load_chunk(y_pointers, y_inside, features, d, ACC, False)
            weights *= y_inverse[None, :]
            if WEIGHT_PRECISION == "tf32":
                weights = round_to_tf32(weights)
                pushed = round_to_tf32(pushed)
            gradient = tl.dot(weights, pushed, gradient, input_precision=WEIGHT_PRECISION, out_dtype=ACC)
    if POSITIVE:
        partner = load_chunk(p_pointers, inside, features, d, ACC, False)
        gradient -= (pulled * p_inverse)[:, None] * partner
        along -= pulled * positive
    unit = load_chunk(x_pointers, inside, features, d, ACC, False) * x_inverse[:, None]
    gradient = tangent(gradient, unit, along, xx)
    out = row_pointers(dx, dx_second, part, rows, d, d, TWO)
    stored = inside[:, None] & (features < d)[None, :]
    tl.store(out[:, None] + features[None, :], gradient.to(dx.dtype.element_ty), mask=stored)
    if dp is not None:
        own = load_chunk(p_pointers, inside, features, d, ACC, False) * p_inverse[:, None]
        pull = tangent(-pulled[:, None] * unit, own, -pulled * positive, pp)
        at = dp + rows.to(tl.int64)[:, None] * d + features[None, :]
        tl.store(at, pull.to(dp.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["m", "n", "row_blocks"])
def norms_kernel(
    x, x_second, p, y, y_second, norms, errors, m, n, row_blocks, column_blocks, d,
    x_row, x_second_row, p_row, y_row, y_second_row, temperature, temperature_rest,
    TWO: tl.constexpr, DIAGONAL: tl.constexpr, ONE: tl.constexpr, NATIVE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHT_PRECISION: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Squared norm that a block of features has of the gradient on the normalised anchors: `norms` (column_blocks, rows).

    The gradient is (mass/τ)(Σ softmax_j v_j − v₊) over the negatives: an average that is taken online, as the log-sum-exp
    is. Rows count from one of them, `origin`: their differences are what is left of them in a collapsed batch.
    """
    pid = tl.program_id(0)
    column_block = pid % column_blocks
    features = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    part = pid // column_blocks // row_blocks
    rows = (pid // column_blocks % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    tau = tl.full([], 0.0, dtype=ACC) + temperature + temperature_rest
    x_pointers = row_pointers(x, x_second, part, rows, x_row, x_second_row, TWO)
    if TWO:
        p_pointers = row_pointers(x, x_second, 1 - part, rows, x_row, x_second_row, TWO)
        first_row = x_second
    else:
        p_pointers = row_pointers(p, None, part, rows, p_row, p_row, False)
        first_row = p
    origin_square = tl.full([], 0.0, dtype=ACC)
    for first in range(0, d, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        value = tl.load(first_row + columns, mask=columns < d, other=0.0).to(ACC)
        origin_square += tl.sum(value * value, 0)
    origin = tl.load(first_row + features, mask=features < d, other=0.0).to(ACC) * inverse_norm(origin_square)
    x_inverse, p_inverse, positive, _xx, _pp = anchor_products(
        x_pointers, p_pointers, inside, d, True, ACC, BLOCK_M, BLOCK_K
    )
    x_tile = load_chunk(x_pointers, inside, tl.arange(0, BLOCK_K), d, ACC, NATIVE)
    if PRECISION == "tf32":
        x_tile = round_to_tf32(x_tile)
    top = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    average = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    for other_part in range(0, 2 if TWO else 1):
        for first in range(0, n, BLOCK_N):
            others = first + tl.arange(0, BLOCK_N)
            y_pointers = row_pointers(y, y_second, other_part, others, y_row, y_second_row, TWO)
            cosines, y_inverse, y_tile = similarities(
                x_pointers, inside, x_inverse, x_tile, y_pointers, others < n, d,
                True, ACC, PRECISION, NATIVE, ONE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            counted = (others < n)[None, :] & (rows >= 0)[:, None]
            if DIAGONAL:
                counted = counted & (rows[:, None] != others[None, :])
            logits = tl.where(counted, cosines / tau, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(logits - shift[:, None])
            kept = tl.exp(top - shift)
            total = total * kept + tl.sum(weights, 1)
            average *= kept[:, None]
            top = higher
            if ONE and BLOCK_K == BLOCK_D:
                pushed = y_tile.to(ACC)
            else:
                pushed = load_chunk(y_pointers, others < n, features, d, ACC, False)
            pushed = pushed * y_inverse[:, None] - origin[None, :]
            if NATIVE:
                average = tl.dot(weights.to(tl.bfloat16), pushed.to(tl.bfloat16), average, out_dtype=ACC)
            else:
                if WEIGHT_PRECISION == "tf32":
                    weights = round_to_tf32(weights)
                    pushed = round_to_tf32(pushed)
                average = tl.dot(weights, pushed, average, input_precision=WEIGHT_PRECISION, out_dtype=ACC)
    odds = top + tl.log(total) - positive / tau
    value = tl.maximum(odds, 0.0) + log1p_unit(tl.exp(-tl.abs(odds)), TERMS)
    scale = one_minus_exp(value, TERMS) / tau
    own = load_chunk(p_pointers, inside, features, d, ACC, False) * p_inverse[:, None] - origin[None, :]
    difference = (average / total[:, None] - own) * scale[:, None]
    if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
        if holds_nan(difference):
            note_block(errors, x, x_second, p, y, part, pid // column_blocks % row_blocks, m, n, d,
                       x_row, x_second_row, p_row, y_row, TWO, DIAGONAL, BLOCK_M)  # fmt: skip
    at = column_block * (2 * m if TWO else m) + part * m + rows
    tl.store(norms + at, tl.sum(difference * difference, 1), mask=inside)


# by arithmetic: float64, float32 by input precision, and half-precision rows
FORWARD = {
    "fp64": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8),
    "ieee": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4),
    "tf32": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4),
    "bf16x3": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4),
    "half": Configuration({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=4),
}
BACKWARD = {
    "fp64": Configuration({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 64}, num_warps=8),
    "ieee": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 128}, num_warps=4, num_stages=1),
    "tf32": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 128}, num_warps=8),
    "bf16x3": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 128}, num_warps=8),
    "half": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 128}, num_warps=4, num_stages=1),
}
NORMS = {
    "fp64": BACKWARD["fp64"],
    "ieee": BACKWARD["ieee"],
    "tf32": BACKWARD["tf32"],
    "bf16x3": BACKWARD["bf16x3"],
    "half": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 128}, num_warps=4, num_stages=3),
}
CONFIGURATIONS = {
    **{f"loss {kind}": use for kind, use in FORWARD.items()},
    **{f"gradient {kind}": use for kind, use in BACKWARD.items()},
    **{f"norms {kind}": use for kind, use in NORMS.items()},
}


@dataclass(frozen=True)
class Rows:
    """Rows (m, d): one tensor, or the m rows of each of two views."""

    first: Tensor
    second: Tensor | None = None

    @property
    def views(self) -> int:
        return 1 if self.second is None else 2

    @property
    def strides(self) -> tuple[int, int]:
        return self.first.stride(0), 0 if self.second is None else self.second.stride(0)


def _arithmetic(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float64:
        return "fp64"
    return precision if dtype == torch.float32 else "half"


def _similarity_precision(precision: str, dtype: torch.dtype, acc: torch.dtype) -> str:
    # features lie along both operands, as tf32's products want it: faster than six of bf16, and as exact
    found = dot_precision(precision, dtype, acc)
    return "tf32x3" if found == "bf16x6" else found


def _constants(dtype: torch.dtype, d: int, use: Configuration, precision: str) -> dict[str, object]:
    acc = accumulation_dtype(dtype)
    half = dtype in (torch.bfloat16, torch.float16)
    return {
        "ONE": d <= use["BLOCK_K"],
        # the interpreter multiplies the bits of bf16
        "NATIVE": half and not INTERPRETED,
        "ACC": triton_dtype(acc),
        "PRECISION": "ieee" if half else _similarity_precision(precision, dtype, acc),
        "TERMS": 18 if acc == torch.float64 else 9,
    }


def _loss(
    x: Rows, p: Tensor | None, y: Rows, diagonal: bool, temperature: float, precision: str
) -> tuple[Tensor, Tensor]:
    m, d = x.first.shape
    dtype = x.first.dtype
    use = FORWARD[_arithmetic(dtype, precision)]
    acc = accumulation_dtype(dtype)
    loss, lse = x.first.new_empty(x.views * m, dtype=acc), x.first.new_empty(x.views * m, dtype=acc)
    row_blocks = -(-m // use["BLOCK_M"])
    launch(
        loss_kernel,
        x.views * row_blocks,
        (
            x.first, x.second, p, y.first, y.second, loss, lse, error_words(x.first), m, len(y.first), row_blocks, d,
            *x.strides, 0 if p is None else p.stride(0), *y.strides, *split_float(temperature),
        ),
        {"TWO": x.views == 2, "DIAGONAL": diagonal, **_constants(dtype, d, use, precision)},
        use,
    )  # fmt: skip
    return loss, lse


def _gradient(
    x: Rows, p: Tensor | None, y: Rows, grad: Tensor, loss: Tensor, lse: Tensor, diagonal: bool, temperature: float,
    precision: str, *, by_row: bool, by_column: bool, positive: bool, dp: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    m, d = x.first.shape
    dtype = x.first.dtype
    use = BACKWARD[_arithmetic(dtype, precision)]
    dx = x.first.new_empty(m, d)
    dx_second = None if x.second is None else x.first.new_empty(m, d)
    row_blocks, column_blocks = -(-m // use["BLOCK_M"]), -(-d // use["BLOCK_D"])
    launch(
        gradient_kernel,
        x.views * row_blocks * column_blocks,
        (
            x.first, x.second, p, y.first, y.second, grad, loss, lse, dx, dx_second, dp, m, len(y.first),
            row_blocks, column_blocks, d, *x.strides, 0 if p is None else p.stride(0), *y.strides, *split_float(temperature),
        ),
        {
            "TWO": x.views == 2, "BY_ROW": by_row, "BY_COLUMN": by_column, "POSITIVE": positive, "DIAGONAL": diagonal,
            **_constants(dtype, d, use, precision),
            "WEIGHT_PRECISION": dot_precision(precision, dtype, accumulation_dtype(dtype)),
        },
        use,
    )  # fmt: skip
    return dx, dx_second


def _norms(x: Rows, p: Tensor | None, y: Rows, diagonal: bool, temperature: float, precision: str) -> Tensor:
    m, d = x.first.shape
    dtype = x.first.dtype
    acc = accumulation_dtype(dtype)
    use = NORMS[_arithmetic(dtype, precision)]
    row_blocks, column_blocks = -(-m // use["BLOCK_M"]), -(-d // use["BLOCK_D"])
    norms = x.first.new_empty(column_blocks, x.views * m, dtype=acc)
    launch(
        norms_kernel,
        x.views * row_blocks * column_blocks,
        (
            x.first, x.second, p, y.first, y.second, norms, error_words(x.first), m, len(y.first), row_blocks, column_blocks, d,
            *x.strides, 0 if p is None else p.stride(0), *y.strides, *split_float(temperature),
        ),
        {
            "TWO": x.views == 2, "DIAGONAL": diagonal, **_constants(dtype, d, use, precision),
            "WEIGHT_PRECISION": dot_precision(precision, dtype, acc),
        },
        use,
    )  # fmt: skip
    return norms[0] if column_blocks == 1 else norms.sum(0)


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, precision: str
) -> tuple[Tensor, Tensor]:
    query, key = dense_rows(query), dense_rows(key)
    if queue is None:
        return _loss(Rows(query), key, Rows(key), True, temperature, precision)
    return _loss(Rows(query), key, Rows(dense_rows(queue)), False, temperature, precision)


def info_nce_backward(
    grad: Tensor, query: Tensor, key: Tensor, queue: Tensor | None, loss: Tensor, lse: Tensor, temperature: float,
    precision: str, queue_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, grad = dense_rows(query), dense_rows(key), grad.contiguous()
    given = (grad, loss.contiguous(), lse.contiguous())
    if queue is None:
        dquery, _ = _gradient(
            Rows(query), key, Rows(key), *given, True, temperature, precision,
            by_row=True, by_column=False, positive=True,
        )  # fmt: skip
        dkey, _ = _gradient(
            Rows(key), query, Rows(query), *given, True, temperature, precision,
            by_row=False, by_column=True, positive=True,
        )  # fmt: skip
        return dquery, dkey, query.new_empty(0, query.shape[1])
    queue, dkey = dense_rows(queue), torch.empty_like(key, memory_format=torch.contiguous_format)
    dquery, _ = _gradient(
        Rows(query), key, Rows(queue), *given, False, temperature, precision,
        by_row=True, by_column=False, positive=True, dp=dkey,
    )  # fmt: skip
    if not queue_gradient:
        return dquery, dkey, query.new_empty(0, query.shape[1])
    dqueue, _ = _gradient(
        Rows(queue), queue, Rows(query), *given, False, temperature, precision,
        by_row=False, by_column=True, positive=False,
    )  # fmt: skip
    return dquery, dkey, dqueue


def nt_xent(z0: Tensor, z1: Tensor, temperature: float, precision: str) -> tuple[Tensor, Tensor]:
    views = Rows(dense_rows(z0), dense_rows(z1))
    return _loss(views, None, views, True, temperature, precision)


def info_nce_grad_norms(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, loss: str, precision: str
) -> Tensor:
    query, key = dense_rows(query), dense_rows(key)
    if loss == "nt_xent":
        views = Rows(query, key)
        return _norms(views, None, views, True, temperature, precision)
    others = key if queue is None else dense_rows(queue)
    return _norms(Rows(query), key, Rows(others), queue is None, temperature, precision)


def nt_xent_backward(
    grad: Tensor, z0: Tensor, z1: Tensor, loss: Tensor, lse: Tensor, temperature: float, precision: str
) -> tuple[Tensor, Tensor]:
    views = Rows(dense_rows(z0), dense_rows(z1))
    dz0, dz1 = _gradient(
        views, None, views, grad.contiguous(), loss.contiguous(), lse.contiguous(), True, temperature, precision,
        by_row=True, by_column=True, positive=True,
    )  # fmt: skip
    assert dz1 is not None
    return dz0, dz1


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover this module's kernels and configurations."""

    def call(d: int, dtype: torch.dtype, precision: str, with_queue: bool) -> None:
        z = torch.empty(4096, d, dtype=dtype, device="meta")
        values = torch.empty(4096, dtype=accumulation_dtype(dtype), device="meta")
        queue = torch.empty(65536, d, dtype=dtype, device="meta") if with_queue else None
        info_nce(z, z, queue, 0.1, precision)
        info_nce_backward(values, z, z, queue, values, values, 0.1, precision, with_queue)
        info_nce_grad_norms(z, z, queue, 0.1, "info_nce", precision)
        if not with_queue:
            info_nce_grad_norms(z, z, None, 0.5, "nt_xent", precision)
            both = torch.cat([values, values])
            nt_xent(z, z, 0.5, precision)
            nt_xent_backward(both, z, z, both, both, 0.5, precision)

    return [
        lambda: call(128, torch.float32, "ieee", False),
        lambda: call(128, torch.float32, "ieee", True),
        lambda: call(128, torch.float32, "tf32", False),
        lambda: call(128, torch.float32, "bf16x3", False),
        lambda: call(128, torch.float64, "ieee", False),
        # whole rows fit a chunk of features, or not
        lambda: call(64, torch.bfloat16, "ieee", False),
        lambda: call(128, torch.bfloat16, "ieee", False),
        lambda: call(512, torch.bfloat16, "ieee", False),
        lambda: call(512, torch.float32, "tf32", False),
    ]
