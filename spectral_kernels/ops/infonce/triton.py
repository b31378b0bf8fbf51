"""InfoNCE and NT-Xent, flash style: similarities live a tile at a time, B x B is never stored.

Forward: a program owns a block of anchors, runs over all others with an online log-sum-exp, and finishes loss and lse.
Backward: a program owns a block of rows (and of features), recomputes the similarities and adds up the weighted others;
u·du, which the normalisation needs, follows from the similarities themselves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.dispatch.backends import BackendError
from spectral_kernels.errors import words as error_words
from spectral_kernels.kernels.launch import INTERPRETED, AotCall, Configuration, launch
from spectral_kernels.kernels.precision import dot_precision, split_float
from spectral_kernels.kernels.rows import dense_rows, holds_nan, round_to_tf32
from spectral_kernels.kernels.statistics import tangent
from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops.infonce.blocks_triton import (
    AOT_CASES,
    BACKWARD,
    WIDER,
    LeftOut,
    Rows,
    anchor_block,
    arithmetic,
    constants,
    load_chunk,
    log1p_unit,
    negatives,
    note_block,
    one_minus_exp,
    row_pointers,
    similarities,
)
from spectral_kernels.ops.infonce.grad_norms_triton import info_nce_grad_norms as info_nce_grad_norms


@triton.jit(do_not_specialize=["m", "n", "row_blocks", "grouped"])
def loss_kernel(
    x, x_second, p, y, y_second, loss, lse, errors, mask, groups, other_groups, m, n, row_blocks, d,
    x_row, x_second_row, p_row, y_row, y_second_row, mask_row, mask_unit, grouped, temperature, temperature_rest,
    TWO: tl.constexpr, DIAGONAL: tl.constexpr, ONE: tl.constexpr, NATIVE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loss and log-partition of the anchors x (m, d) with positives p (m, d) and others y (n, d).

    TWO: x and y are two views each, one after the other, and the positives are the other view's. DIAGONAL: row i of y, in
    either view, is no negative of row i of x; nor are those that `mask` (m, n) or the groups of rows, in either view, say.
    """
    pid = tl.program_id(0)
    part = pid // row_blocks
    rows = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    tau = tl.full([], 0.0, dtype=ACC) + temperature + temperature_rest
    x_pointers, _p_pointers, x_tile, x_inverse, _p_inverse, positive, _xx, _pp = anchor_block(
        x, x_second, p, part, rows, m, d, x_row, x_second_row, p_row, TWO, True, NATIVE, ACC, PRECISION, BLOCK_M, BLOCK_K
    )  # fmt: skip
    top = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    spoiled = tl.full([], 0.0, dtype=ACC)
    for other_part in range(0, 2 if TWO else 1):
        for first in range(0, n, BLOCK_N):
            others = first + tl.arange(0, BLOCK_N)
            y_pointers = row_pointers(y, y_second, other_part, others, y_row, y_second_row, TWO)
            cosines, y_inverse, _y = similarities(
                x_pointers, inside, x_inverse, x_tile, y_pointers, others < n, d,
                True, ACC, PRECISION, NATIVE, ONE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            counted = negatives(
                rows, others, m, n, mask, groups, other_groups, mask_row, mask_unit, grouped, DIAGONAL
            )  # fmt: skip
            if mask is not None or groups is not None:
                # what no anchor looks at may be NaN too
                spoiled += tl.sum(y_inverse * 0.0, 0)
            logits = tl.where(counted, cosines / tau, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            # a row may not have met a negative yet: -inf less -inf is NaN
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            top = higher
    positive = positive / tau + spoiled
    if mask is not None or groups is not None:
        # of an anchor without negatives
        total = tl.where(top == float("-inf"), 1.0, total)
    odds = top + tl.log(total) - positive
    value = tl.maximum(odds, 0.0) + log1p_unit(tl.exp(-tl.abs(odds)), TERMS)
    if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
        if holds_nan(value[:, None]):
            note_block(errors, x, x_second, p, y, part, pid % row_blocks, m, n, d, x_row, x_second_row, p_row, y_row,
                       TWO, DIAGONAL, BLOCK_M)  # fmt: skip
    tl.store(loss + part * m + rows, value, mask=inside)
    tl.store(lse + part * m + rows, positive + value, mask=inside)


@triton.jit(do_not_specialize=["m", "n", "row_blocks", "grouped"])
def gradient_kernel(
    x, x_second, p, y, y_second, grad, loss, lse, dx, dx_second, dp, alongs, mask, groups, other_groups,
    m, n, row_blocks, column_blocks, d, x_row, x_second_row, p_row, y_row, y_second_row, mask_row, mask_unit, grouped,
    temperature, temperature_rest,
    TWO: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, POSITIVE: tl.constexpr, DIAGONAL: tl.constexpr,
    ONE: tl.constexpr, NATIVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_PRECISION: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient on rows x (m, d) from their similarities with y (n, d), through the normalisation.

    BY_ROW: the rows x are anchors; BY_COLUMN: the rows y are. POSITIVE: x and p attract. TWO, DIAGONAL and what is left out
    as above. To `dp` goes the gradient on p, rows that meet no negatives, and to `alongs` (m,) how much of the gradient on
    unit rows x lies along them.
    """
    pid = tl.program_id(0)
    features = (pid % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = pid // column_blocks // row_blocks
    rows = (pid // column_blocks % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    tau = tl.full([], 0.0, dtype=ACC) + temperature + temperature_rest
    x_pointers, p_pointers, x_tile, x_inverse, p_inverse, positive, xx, pp = anchor_block(
        x, x_second, p, part, rows, m, d, x_row, x_second_row, p_row, TWO, False, NATIVE, ACC, PRECISION, BLOCK_M, BLOCK_K
    )  # fmt: skip
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
            counted = negatives(
                rows, others, m, n, mask, groups, other_groups, mask_row, mask_unit, grouped, DIAGONAL
            )  # fmt: skip
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
    if alongs is not None:  # noqa: SIM102 (a constant decides)
        if pid % column_blocks == 0:
            tl.store(alongs + part * m + rows, along, mask=inside)
    gradient = tangent(gradient, unit, along, xx)
    out = row_pointers(dx, dx_second, part, rows, d, d, TWO)
    stored = inside[:, None] & (features < d)[None, :]
    tl.store(out[:, None] + features[None, :], gradient.to(dx.dtype.element_ty), mask=stored)
    if dp is not None:
        own = load_chunk(p_pointers, inside, features, d, ACC, False) * p_inverse[:, None]
        pull = tangent(-pulled[:, None] * unit, own, -pulled * positive, pp)
        at = dp + rows.to(tl.int64)[:, None] * d + features[None, :]
        tl.store(at, pull.to(dp.dtype.element_ty), mask=stored)


# by arithmetic: float64, float32 by input precision, and half-precision rows
FORWARD = {
    "fp64": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8),
    "ieee": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4),
    "tf32": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4),
    "bf16x3": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4),
    "half": Configuration({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=4),
}
CONFIGURATIONS = {
    **{f"loss {kind}": use for kind, use in FORWARD.items()},
    **{f"gradient {kind}": use for kind, use in BACKWARD.items()},
    **{f"gradient with groups {kind}": use for kind, use in WIDER.items()},
}


def _loss(
    x: Rows, p: Tensor | None, y: Rows, left_out: LeftOut, diagonal: bool, temperature: float, precision: str
) -> tuple[Tensor, Tensor]:
    m, d = x.first.shape
    dtype = x.first.dtype
    use = FORWARD[arithmetic(dtype, precision)]
    acc = accumulation_dtype(dtype)
    loss, lse = x.first.new_empty(x.views * m, dtype=acc), x.first.new_empty(x.views * m, dtype=acc)
    row_blocks = -(-m // use["BLOCK_M"])
    launch(
        loss_kernel,
        x.views * row_blocks,
        (
            x.first, x.second, p, y.first, y.second, loss, lse, error_words(x.first), *left_out.pointers,
            m, len(y.first), row_blocks, d, *x.strides, 0 if p is None else p.stride(0), *y.strides, *left_out.numbers,
            *split_float(temperature),
        ),
        {"TWO": x.views == 2, "DIAGONAL": diagonal, **constants(dtype, d, use, precision)},
        use,
    )  # fmt: skip
    return loss, lse


def _gradient(
    x: Rows, p: Tensor | None, y: Rows, grad: Tensor, loss: Tensor, lse: Tensor, left_out: LeftOut, diagonal: bool,
    temperature: float, precision: str, *, by_row: bool, by_column: bool, positive: bool, dp: Tensor | None = None,
    along: Tensor | None = None, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    m, d = x.first.shape
    dtype = x.first.dtype
    kind = arithmetic(dtype, precision)
    use = BACKWARD[kind] if left_out.groups is None else WIDER.get(kind, BACKWARD[kind])
    dx = x.first.new_empty(m, d) if dx is None else dx
    dx_second = None if x.second is None else x.first.new_empty(m, d)
    row_blocks, column_blocks = -(-m // use["BLOCK_M"]), -(-d // use["BLOCK_D"])
    launch(
        gradient_kernel,
        x.views * row_blocks * column_blocks,
        (
            x.first, x.second, p, y.first, y.second, grad, loss, lse, dx, dx_second, dp,
            None if along is None or len(along) == 0 else along, *left_out.pointers, m, len(y.first), row_blocks,
            column_blocks, d, *x.strides, 0 if p is None else p.stride(0), *y.strides, *left_out.numbers,
            *split_float(temperature),
        ),
        {
            "TWO": x.views == 2, "BY_ROW": by_row, "BY_COLUMN": by_column, "POSITIVE": positive, "DIAGONAL": diagonal,
            **constants(dtype, d, use, precision),
            "WEIGHT_PRECISION": dot_precision(precision, dtype, accumulation_dtype(dtype)),
        },
        use,
    )  # fmt: skip
    return dx, dx_second


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, mask: Tensor | None, groups: Tensor | None,
    queue_groups: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, key = dense_rows(query), dense_rows(key)
    left_out = _left_out(query, mask, groups, groups if queue is None else queue_groups)
    if queue is None:
        return _loss(Rows(query), key, Rows(key), left_out, True, temperature, precision)
    return _loss(Rows(query), key, Rows(dense_rows(queue)), left_out, False, temperature, precision)


# its compiler ends on the gradient's products of a masked tile: seen with 3.6.0, and no more with 3.9.0
_MASKS_FLOAT64 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def _left_out(z: Tensor, mask: Tensor | None, groups: Tensor | None, other_groups: Tensor | None) -> LeftOut:
    if mask is not None and z.dtype == torch.float64 and not (_MASKS_FLOAT64 or INTERPRETED):
        raise BackendError(
            f"Triton {triton.__version__} does not compile a mask for float64 rows, 3.9 does: float32, or backend='reference'"
        )
    if groups is None or other_groups is None:
        return LeftOut(mask)
    return LeftOut(mask, groups.contiguous(), other_groups.contiguous())


def info_nce_backward(
    grad: Tensor, query: Tensor, key: Tensor, queue: Tensor | None, loss: Tensor, lse: Tensor, temperature: float,
    mask: Tensor | None, groups: Tensor | None, queue_groups: Tensor | None, precision: str, queue_gradient: bool,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, grad = dense_rows(query), dense_rows(key), grad.contiguous()
    given = (grad, loss.contiguous(), lse.contiguous())
    left_out = _left_out(query, mask, groups, groups if queue is None else queue_groups)
    dkey, dqueue = torch.empty_like(key, memory_format=torch.contiguous_format), query.new_empty(0, query.shape[1])
    b = len(query)
    along = loss.new_empty(b if temperature_gradient else 0)
    if queue is None:
        dquery, _ = _gradient(
            Rows(query), key, Rows(key), *given, left_out, True, temperature, precision,
            by_row=True, by_column=False, positive=True, along=along,
        )  # fmt: skip
        _gradient(
            Rows(key[:b]), query, Rows(query), *given, left_out.others(0, b), True, temperature, precision,
            by_row=False, by_column=True, positive=True, dx=dkey[:b],
        )  # fmt: skip
        others, dothers, seen = key[b:], dkey[b:], left_out.others(b, len(key))
    else:
        others = dense_rows(queue)
        dquery, _ = _gradient(
            Rows(query), key, Rows(others), *given, left_out, False, temperature, precision,
            by_row=True, by_column=False, positive=True, dp=dkey, along=along,
        )  # fmt: skip
        if queue_gradient:
            dqueue = query.new_empty(others.shape)
        dothers, seen = dqueue, left_out.others(0, len(others))
    if len(dothers) > 0:
        _gradient(
            Rows(others), others, Rows(query), *given, seen, False, temperature, precision,
            by_row=False, by_column=True, positive=False, dx=dothers,
        )  # fmt: skip
    return dquery, dkey, dqueue, along


def nt_xent(z0: Tensor, z1: Tensor, temperature: float, groups: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    views = Rows(dense_rows(z0), dense_rows(z1))
    return _loss(views, None, views, _left_out(z0, None, groups, groups), True, temperature, precision)


def nt_xent_backward(
    grad: Tensor, z0: Tensor, z1: Tensor, loss: Tensor, lse: Tensor, temperature: float, groups: Tensor | None,
    precision: str, temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    views = Rows(dense_rows(z0), dense_rows(z1))
    along = loss.new_empty(len(loss) if temperature_gradient else 0)
    dz0, dz1 = _gradient(
        views, None, views, grad.contiguous(), loss.contiguous(), lse.contiguous(), _left_out(z0, None, groups, groups), True,
        temperature, precision, by_row=True, by_column=True, positive=True, along=along,
    )  # fmt: skip
    assert dz1 is not None
    return dz0, dz1, along


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover this module's kernels and configurations."""

    def call(d: int, dtype: torch.dtype, precision: str, with_queue: bool, left_out: bool = False) -> None:
        z = torch.empty(4096, d, dtype=dtype, device="meta")
        values = torch.empty(4096, dtype=accumulation_dtype(dtype), device="meta")
        queue = torch.empty(65536, d, dtype=dtype, device="meta") if with_queue else None
        masked = left_out and not with_queue and (_MASKS_FLOAT64 or dtype != torch.float64)
        mask = torch.empty(4096, 4096, dtype=torch.bool, device="meta") if masked else None
        groups = torch.empty(65536 if with_queue else 4096, dtype=torch.int64, device="meta") if left_out else None
        labels = (groups, groups) if with_queue else (None, None)
        info_nce(z, z, queue, 0.1, mask, *labels, precision)
        info_nce_backward(
            values, z, z, queue, values, values, 0.1, mask, *labels, precision, with_queue, left_out
        )  # fmt: skip
        if not with_queue:
            both = torch.cat([values, values])
            nt_xent(z, z, 0.5, groups, precision)
            nt_xent_backward(both, z, z, both, both, 0.5, groups, precision, left_out)

    cases = (*AOT_CASES, *((*case, True) for case in AOT_CASES if case[0] == 128))
    return [lambda case=case: call(*case) for case in cases]  # type: ignore[misc]
