"""What the Triton kernels share: launching and recording, loads of rows, row statistics and tangents.

Every launch goes through `launch`, so that `bench/aot.py` can record, with meta tensors and no GPU, what each op would
compile. Kernels are bare `@triton.jit` with configurations from static tables; under TRITON_INTERPRET=1 the same code
runs on CPU tensors.

Float scalars reach a kernel as float32: a float64 quantity is passed as a pair (`split_float`) or worked out inside.
"""

import functools
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import STRIDE
from spectral_kernels.ops import _launch
from spectral_kernels.ops._rows import NORM_FLOOR, accumulation_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

FLOOR = tl.constexpr(NORM_FLOOR)
WORD = tl.constexpr(STRIDE)

# programs that fill a large GPU twice; fixed, so that results do not depend on the device
FULL_GRID = 264

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Configuration:
    """A launch configuration: constants of the kernel, warps and pipeline stages."""

    constants: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        return self.constants[name]


@dataclass(frozen=True)
class Record:
    """What one launch would compile: the arguments of `triton.compiler.ASTSource` and its options."""

    kernel: Any
    configuration: Configuration
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]


_records: list[Record] | None = None


@contextmanager
def recording() -> Iterator[list[Record]]:
    """Collect launches instead of making them; tensors may then be on the meta device."""
    global _records
    previous, _records = _records, []
    try:
        yield _records
    finally:
        _records = previous


@functools.cache
def _binder(kernel: Any) -> Callable[..., Any]:
    """What Triton itself asks for the types of arguments, and for what it is to know of their values."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    compiled = triton.JITFunction(kernel.fn, **kernel.kwargs) if INTERPRETED else kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder: Callable[..., Any] = create_function_from_signature(compiled.signature, compiled.params, backend)
    return binder


def _record(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], configuration: Configuration) -> Record:
    from triton.backends.compiler import BaseBackend

    bound, found, _ = _binder(kernel)(*arguments, **constants)
    signature: dict[str, str] = {}
    fixed = dict(constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, (name, (kind, known)) in enumerate(zip(bound, found, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            fixed[name] = bound[name]
        elif known:
            attributes[(position,)] = BaseBackend.parse_attr(known)
    return Record(kernel, configuration, signature, fixed, attributes)


def launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], use: Configuration
) -> None:
    """Run `kernel` on a one-dimensional grid, on the device of its first argument; or record it."""
    if _records is not None:
        _records.append(_record(kernel, arguments, {**use.constants, **constants}, use))
    elif INTERPRETED:
        _launch.through_triton(kernel, programs, arguments, constants, use)
    else:
        _launch.launch(kernel, programs, arguments, constants, use)


AotCall = Callable[[], object]


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
    """Products of bf16 that make xᵀx: see `add_square` in covariance/triton.py. `plain`: x holds the rows as they are."""
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


def part_slots(splits: int) -> int:
    """Slots of the tree of `add_parts`: the parts of every level, the last one's result included."""
    slots = splits
    while splits > 1:
        splits = -(-splits // GROUP.value)
        slots += splits
    return slots


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _stays_ours(memory: Tensor) -> bool:
    """Whether memory is nobody else's for as long as we hold it: not so in the pool of a CUDA graph, whose owner hands it
    out again. torch.compile's graphs put into theirs what a warm-up makes, though nothing is being captured then.
    """
    if torch.cuda.get_allocator_backend() != "native":
        return False  # it would not tell
    address = memory.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment["segment_pool_id"]) == (0, 0)
    return False


def counters(like: Tensor, count: int) -> Tensor:
    """`count` int32 zeros on a tensor's device, for kernels that leave them so.

    One buffer per stream, on which kernels do not overlap; a CUDA graph may be replayed on any and gets its own.
    """
    if like.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (like.device, torch.cuda.current_stream(like.device).cuda_stream)
    held = _counters.get(key)
    if held is None or held.numel() < count:
        held = torch.zeros(max(count, 4096), dtype=torch.int32, device=like.device)
        if _stays_ours(held):
            _counters[key] = held
    return held


def power_of_two(value: int, low: int = 16) -> int:
    return max(low, 1 << (value - 1).bit_length())


def dense_rows(z: Tensor) -> Tensor:
    """`z` itself where its last stride is 1, else a contiguous copy."""
    return z if z.stride(-1) == 1 else z.contiguous()


def split_rows(length: int, block: int, others: int, longest: int) -> tuple[int, int]:
    """(splits, chunk): how a loop over `length` is divided, chunks counted in blocks, `others` programs besides."""
    wanted = max(-(-length // longest), min(-(-FULL_GRID // others), length // (4 * block)), 1)
    chunk = -(-length // (wanted * block))
    return -(-length // (chunk * block)), chunk


@triton.jit
def arrive(counter, count):
    """Whether this program is the last of `count` to arrive; it then sees what the others stored before they arrived.

    The counter is 0 again after the last. None waits for another: programs may run one after the other.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


# parts that one program adds up
GROUP = tl.constexpr(8)


@triton.jit
def add_parts(
    alive, acc, vector, parts, vectors, counters, base, split, splits, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums over programs of tiles `acc` (BLOCK, BLOCK) and vectors (VECTOR,), and whether this program holds them.

    A tree: the last of a group of programs adds up what the group stored, in a fixed order, and goes on for it. parts and
    vectors have `part_slots(splits)` slots from `base` on, and so have counters, which are 0 before and after. The levels
    are a loop, not unrolled: the code is the same for every number of parts, and so compiled once.
    """
    member = split
    left = splits
    square = tl.arange(0, BLOCK)
    line = tl.arange(0, VECTOR)
    place = square[:, None] * BLOCK + square[None, :]
    while left > 1:
        group = member // GROUP
        if alive:
            at = (base + member).to(tl.int64)
            tl.store(parts + at * BLOCK * BLOCK + place, acc)
            tl.store(vectors + at * VECTOR + line, vector)
            first = group * GROUP
            size = tl.minimum(left - first, GROUP)
            alive = arrive(counters + base + left + group, size)
            if alive:
                acc = tl.zeros_like(acc)
                vector = tl.zeros_like(vector)
                for other in range(0, size):
                    at = (base + first + other).to(tl.int64)
                    acc += tl.load(parts + at * BLOCK * BLOCK + place, cache_modifier=".cg")
                    vector += tl.load(vectors + at * VECTOR + line, cache_modifier=".cg")
        base += left
        member = group
        left = (left + GROUP - 1) // GROUP
    return alive, acc, vector


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


@triton.jit
def tangent(gradient, unit, along, squares):
    """(g − u(u·g))/‖z‖ from u = z/‖z‖, `along` = u·g and `squares` = ‖z‖²."""
    return (gradient - unit * along[:, None]) * inverse_norm(squares)[:, None]


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


# stages and blocks are the largest that do not spill (bench/aot.py)
ROW_STATISTICS = {
    torch.float32: Configuration({"BLOCK_N": 64, "BLOCK_D": 128}, num_warps=4),
    torch.float64: Configuration({"BLOCK_N": 32, "BLOCK_D": 128}, num_warps=8),
}
TANGENT = {
    torch.float32: Configuration({"BLOCK_N": 32, "BLOCK_D": 128}, num_warps=4, num_stages=1),
    torch.float64: Configuration({"BLOCK_N": 8, "BLOCK_D": 128}, num_warps=8, num_stages=1),
}
# by arithmetic and columns
APPLY = {
    ("ieee", 32): Configuration({"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": 32}, num_warps=4, num_stages=1),
    ("ieee", 128): Configuration({"BLOCK_N": 32, "BLOCK_D": 128, "BLOCK_K": 16}, num_warps=8, num_stages=1),
    ("tensor", 32): Configuration({"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": 32}, num_warps=4),
    ("tensor", 128): Configuration({"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 32}, num_warps=8),
    ("fp64", 32): Configuration({"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 32}, num_warps=4),
    ("fp64", 128): Configuration({"BLOCK_N": 32, "BLOCK_D": 128, "BLOCK_K": 32}, num_warps=8, num_stages=1),
}
CONFIGURATIONS = {
    **{f"row_statistics {dtype}": use for dtype, use in ROW_STATISTICS.items()},
    **{f"tangent {dtype}": use for dtype, use in TANGENT.items()},
    **{f"apply {key}": use for key, use in APPLY.items()},
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
    """Calls whose launches cover this module's kernels and configurations."""

    def call(dtype: torch.dtype) -> None:
        z = torch.empty(4, 256, 512, dtype=dtype, device="meta")
        acc = accumulation_dtype(dtype)
        statistics = row_statistics(z, None, True, True, acc)
        read_rows_backward(z.to(acc), z, True, statistics)
        scatter_rows_backward(z.to(acc), z[0], torch.empty(4, 256, dtype=torch.int64, device="meta"), True)
        narrow = z[..., :32]
        apply(narrow, torch.empty(4, 32, 32, dtype=acc, device="meta"), statistics)

    return [lambda dtype=dtype: call(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]  # type: ignore[misc]
