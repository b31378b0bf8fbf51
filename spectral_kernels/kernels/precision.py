"""What kernels compute in: dtypes, precisions, and scalars that float32 does not hold.

Float scalars reach a kernel as float32: a float64 quantity is passed as a pair (`split_float`) or worked out inside.
"""

import math
import struct
from typing import Any

import torch
import triton.language as tl

from spectral_kernels.kernels.launch import INTERPRETED

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def triton_dtype(dtype: torch.dtype) -> Any:
    return _TRITON_DTYPES[dtype]


def dot_precision(precision: str, dtype: torch.dtype, acc: torch.dtype) -> str:
    """`input_precision` of `tl.dot` for rows of `dtype` in kernels that work in `acc`.

    Tensor cores multiply float32 as sums of bf16: rows of half precision, float32 once normalised or centred, as two of
    them (16 bits, three products), float32 itself as three (24 bits, six products). The interpreter multiplies in full
    precision and knows no other name for it.
    """
    if INTERPRETED or acc == torch.float64:
        return "ieee"
    if precision == "ieee":
        return "bf16x6" if dtype == torch.float32 else "bf16x3"
    return precision


def bf16_products(precision: str, dtype: torch.dtype, acc: torch.dtype, plain: bool) -> int:
    """Products of bf16 that make xᵀx: see `add_square` in row_tiles.py. `plain`: x holds the rows as they are."""
    precision = dot_precision(precision, dtype, acc)
    if precision not in ("bf16x3", "bf16x6"):
        return 0
    if plain and dtype == torch.bfloat16:
        return 1
    return 4 if precision == "bf16x6" else 2


def arithmetic(precision: str, dtype: torch.dtype, acc: torch.dtype) -> str:
    """What decides a configuration: "fp64", "ieee" (all bits of float32) or "tensor" (fewer)."""
    if acc == torch.float64:
        return "fp64"
    return "ieee" if precision == "ieee" and dtype == torch.float32 else "tensor"


_FLOAT = struct.Struct("f")


def split_float(value: float) -> tuple[float, float]:
    """A float64 as the sum of two float32, good to 48 bits."""
    try:
        (high,) = _FLOAT.unpack(_FLOAT.pack(value))
    except OverflowError:
        high = math.copysign(math.inf, value)
    return (high, value - high) if math.isfinite(high) else (high, 0.0)
