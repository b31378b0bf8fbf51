"""Blocks of rows and of their similarities: what the losses' kernels and those of the gradient norms share.

Rows are never normalised in memory: their inverse norms multiply the similarities. Half-precision products are exact, so
they enter `tl.dot` as they are.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.kernels.launch import INTERPRETED, Configuration
from spectral_kernels.kernels.precision import dot_precision, triton_dtype
from spectral_kernels.kernels.rows import WORD, note_rows, round_to_tf32
from spectral_kernels.kernels.statistics import checked_inverse_norm, inverse_norm
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
    """Look for NaN and Inf in a block of anchors, in their positives and in the keys beyond them or the queue; another block
    has met the rest.
    """
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
        if DIAGONAL:
            note_rows(errors + WORD, None, y, None, first, m, n, n, d, 0, y_row)
        else:
            note_rows(errors + 2 * WORD, None, y, None, first, 0, n, n, d, 0, y_row)


@triton.jit
def negatives(
    rows, others, m, n, mask, row_groups, other_groups, mask_row, mask_unit, grouped, DIAGONAL: tl.constexpr
):  # fmt: skip
    """Which others are negatives of which rows: of all rows, since what lies beyond m is not stored."""
    counted = (others < n)[None, :] & (rows >= 0)[:, None]
    if DIAGONAL:
        counted = counted & (rows[:, None] != others[None, :])
    if mask is not None:
        at = rows.to(tl.int64)[:, None] * mask_row + others.to(tl.int64)[None, :] * mask_unit
        inside = (rows < m)[:, None] & (others < n)[None, :]
        counted = counted & (tl.load(mask + at, mask=inside, other=0) == 0)
    if row_groups is not None:
        own = tl.load(row_groups + rows, mask=rows < m, other=0)
        theirs = tl.load(other_groups + others, mask=others < grouped, other=0)
        counted = counted & ((own[:, None] != theirs[None, :]) | (others >= grouped)[None, :])
    return counted


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
def anchor_block(
    x, x_second, p, part, rows, m, d, x_row, x_second_row, p_row,
    TWO: tl.constexpr, CHECKED: tl.constexpr, NATIVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pointers to anchors and their positives, the anchors' first chunk as an operand, and `anchor_products`."""
    x_pointers = row_pointers(x, x_second, part, rows, x_row, x_second_row, TWO)
    if TWO:
        p_pointers = row_pointers(x, x_second, 1 - part, rows, x_row, x_second_row, TWO)
    else:
        p_pointers = row_pointers(p, None, part, rows, p_row, p_row, False)
    x_inverse, p_inverse, positive, xx, pp = anchor_products(
        x_pointers, p_pointers, rows < m, d, CHECKED, ACC, BLOCK_M, BLOCK_K
    )
    x_tile = load_chunk(x_pointers, rows < m, tl.arange(0, BLOCK_K), d, ACC, NATIVE)
    if PRECISION == "tf32":
        x_tile = round_to_tf32(x_tile)
    return x_pointers, p_pointers, x_tile, x_inverse, p_inverse, positive, xx, pp


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


# gradients, by arithmetic: float64, float32 by input precision, and half-precision rows
BACKWARD = {
    "fp64": Configuration({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 64}, num_warps=8),
    "ieee": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 128}, num_warps=4, num_stages=1),
    "tf32": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 128}, num_warps=8),
    "bf16x3": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 128}, num_warps=8),
    "half": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 128}, num_warps=4, num_stages=1),
}
# with groups, which spill in four warps
WIDER = {kind: replace(BACKWARD[kind], num_warps=8) for kind in ("ieee", "half")}


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


@dataclass(frozen=True)
class LeftOut:
    """What is left out of the negatives: a mask (rows, others); labels of the rows, and of others, whose rest has none."""

    mask: Tensor | None = None
    groups: Tensor | None = None
    other_groups: Tensor | None = None

    def others(self, begin: int, end: int) -> "LeftOut":
        """As others of `begin` to `end` see it, which then are the rows."""
        mask = None if self.mask is None else self.mask[:, begin:end].mT
        labelled = None if self.other_groups is None else self.other_groups[begin:end]
        if labelled is None or labelled.shape[0] < end - begin:
            return LeftOut(mask)
        return LeftOut(mask, labelled, self.groups)

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return None if self.mask is None else self.mask.view(torch.uint8), self.groups, self.other_groups

    @property
    def numbers(self) -> tuple[int, int, int]:
        row, column = (0, 0) if self.mask is None else self.mask.stride()
        return row, column, 0 if self.other_groups is None else self.other_groups.shape[0]


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float64:
        return "fp64"
    return precision if dtype == torch.float32 else "half"


def _similarity_precision(precision: str, dtype: torch.dtype, acc: torch.dtype) -> str:
    # features lie along both operands, as tf32's products want it: faster than six of bf16, and as exact
    found = dot_precision(precision, dtype, acc)
    return "tf32x3" if found == "bf16x6" else found


def constants(dtype: torch.dtype, d: int, use: Configuration, precision: str) -> dict[str, object]:
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


# what `aot_calls` covers: features, dtype, precision, with a queue
AOT_CASES = (
    (128, torch.float32, "ieee", False),
    (128, torch.float32, "ieee", True),
    (128, torch.float32, "tf32", False),
    (128, torch.float32, "bf16x3", False),
    (128, torch.float64, "ieee", False),
    # whole rows fit a chunk of features, or not
    (64, torch.bfloat16, "ieee", False),
    (128, torch.bfloat16, "ieee", False),
    (512, torch.bfloat16, "ieee", False),
    (512, torch.float32, "tf32", False),
)
