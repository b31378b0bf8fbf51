"""Norms of InfoNCE's gradient on its anchors, flash style: neither similarities nor gradients are stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import words as error_words
from spectral_kernels.kernels.launch import AotCall, Configuration, launch
from spectral_kernels.kernels.precision import dot_precision, split_float
from spectral_kernels.kernels.rows import dense_rows, holds_nan, round_to_tf32
from spectral_kernels.kernels.statistics import inverse_norm
from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops.infonce.blocks_triton import (
    AOT_CASES,
    BACKWARD,
    Rows,
    anchor_block,
    arithmetic,
    constants,
    load_chunk,
    log1p_unit,
    note_block,
    one_minus_exp,
    row_pointers,
    similarities,
)


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
    first_row = x_second if TWO else p
    origin_square = tl.full([], 0.0, dtype=ACC)
    for first in range(0, d, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        value = tl.load(first_row + columns, mask=columns < d, other=0.0).to(ACC)
        origin_square += tl.sum(value * value, 0)
    origin = tl.load(first_row + features, mask=features < d, other=0.0).to(ACC) * inverse_norm(origin_square)
    x_pointers, p_pointers, x_tile, x_inverse, p_inverse, positive, _xx, _pp = anchor_block(
        x, x_second, p, part, rows, m, d, x_row, x_second_row, p_row, TWO, True, NATIVE, ACC, PRECISION, BLOCK_M, BLOCK_K
    )  # fmt: skip
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


NORMS = {
    "fp64": BACKWARD["fp64"],
    "ieee": BACKWARD["ieee"],
    "tf32": BACKWARD["tf32"],
    "bf16x3": BACKWARD["bf16x3"],
    "half": Configuration({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 128}, num_warps=4, num_stages=3),
}
CONFIGURATIONS = {f"norms {kind}": use for kind, use in NORMS.items()}


def _norms(x: Rows, p: Tensor | None, y: Rows, diagonal: bool, temperature: float, precision: str) -> Tensor:
    m, d = x.first.shape
    dtype = x.first.dtype
    acc = accumulation_dtype(dtype)
    use = NORMS[arithmetic(dtype, precision)]
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
            "TWO": x.views == 2, "DIAGONAL": diagonal, **constants(dtype, d, use, precision),
            "WEIGHT_PRECISION": dot_precision(precision, dtype, acc),
        },
        use,
    )  # fmt: skip
    return norms[0] if column_blocks == 1 else norms.sum(0)


def info_nce_grad_norms(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, loss: str, precision: str
) -> Tensor:
    query, key = dense_rows(query), dense_rows(key)
    if loss == "nt_xent":
        views = Rows(query, key)
        return _norms(views, None, views, True, temperature, precision)
    others = key if queue is None else dense_rows(queue)
    return _norms(Rows(query), key, Rows(others), queue is None, temperature, precision)


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover this module's kernels and configurations."""

    def call(d: int, dtype: torch.dtype, precision: str, with_queue: bool) -> None:
        z = torch.empty(4096, d, dtype=dtype, device="meta")
        queue = torch.empty(65536, d, dtype=dtype, device="meta") if with_queue else None
        info_nce_grad_norms(z, z, queue, 0.1, "info_nce", precision)
        if not with_queue:
            info_nce_grad_norms(z, z, None, 0.5, "nt_xent", precision)

    return [lambda case=case: call(*case) for case in AOT_CASES]  # type: ignore[misc]
