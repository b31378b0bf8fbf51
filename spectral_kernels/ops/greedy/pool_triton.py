"""A pool as the steps of greedy selection see it: its rows read once, which of them are free, and the order of their keys."""

import triton
import triton.language as tl

from spectral_kernels.kernels.launch import Configuration
from spectral_kernels.kernels.rows import FLOOR, WORD, note
from spectral_kernels.ops._selection import KEY_FACTOR, KEY_ROUNDS, KEY_STEP, SEED_BITS
from spectral_kernels.ops.greedy.reference import LONGEST_SQUARE

LONGEST = tl.constexpr(LONGEST_SQUARE)

ROUNDS = tl.constexpr(KEY_ROUNDS)
STEP = tl.constexpr(KEY_STEP)
FACTOR = tl.constexpr(KEY_FACTOR)
# modulo 2³², which no pool exceeds
INVERSE_FACTOR = tl.constexpr(pow(KEY_FACTOR, -1, 1 << 32))
SEED = tl.constexpr(SEED_BITS)

# what `free` holds of a row: 0, taken, masked out or not finite; left but unseen; left and seen
FREE_UNSEEN = tl.constexpr(1)
FREE_SEEN = tl.constexpr(2)


@triton.jit(do_not_specialize=["n", "row_blocks", "z_batch", "z_row"])
def read_pool_kernel(
    pool, valid, rows_out, squares, free, errors, n, d, row_blocks, z_unit, z_batch, z_row,
    NORMALIZE: tl.constexpr, LOGDET: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalised rows in the accumulation dtype, their ‖x‖² (exactly 1 when normalised) and whether they are free."""
    z_batch = z_batch.to(tl.int64) * z_unit
    z_row *= z_unit
    pid = tl.program_id(0)
    batch = (pid // row_blocks).to(tl.int64)
    rows = ((pid % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    pointers = pool + batch * z_batch + rows * z_row
    square = tl.zeros([BLOCK_N], dtype=tl.float64)
    largest = tl.zeros([BLOCK_N], dtype=tl.float64)
    # NaN in a row that holds NaN or Inf, else 0
    poison = tl.zeros([BLOCK_N], dtype=tl.float64)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float64)
        square += tl.sum(x * x, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        poison += tl.sum(x - x, 1)
    # squares of float64 may overflow or vanish: such rows are measured by their largest element
    unit = tl.full([BLOCK_N], 1.0, dtype=tl.float64)
    if NORMALIZE and pool.dtype.element_ty == tl.float64:
        unit = tl.where(largest > 0, largest, 1.0)
        square = tl.zeros([BLOCK_N], dtype=tl.float64)
        for first in range(0, d, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            inside = (rows < n)[:, None] & (columns < d)[None, :]
            x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0) / unit[:, None]
            square += tl.sum(x * x, 1)
    finite = poison == 0
    if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
        if tl.min(tl.where(finite, 1, 0), 0) == 0:
            note(errors, batch * 4294967296 + tl.min(tl.where(finite, n, rows), 0))
    seen = largest > 0
    if NORMALIZE:
        length = tl.where(seen, tl.sqrt(square), 1.0)
        for first in range(0, d, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            inside = (rows < n)[:, None] & (columns < d)[None, :]
            x = tl.load(pointers[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float64)
            at = rows_out + (batch * n + rows)[:, None] * d + columns[None, :]
            tl.store(at, (x / unit[:, None] / length[:, None]).to(rows_out.dtype.element_ty), mask=inside)
        square = tl.where(seen, 1.0, 0.0).to(tl.float64)
        seen = seen & (unit * length > FLOOR)
    state = tl.where(finite, tl.where(seen, FREE_SEEN, FREE_UNSEEN), 0)
    if valid is not None:
        allowed = tl.load(valid + batch * n + rows, mask=rows < n, other=0)
        state = tl.where(allowed != 0, state, 0)
    if LOGDET:
        too_long = (state != 0) & (square > LONGEST)
        if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
            if tl.max(tl.where(too_long, 1, 0), 0) > 0:
                note(errors + 2 * WORD, batch * 4294967296 + tl.min(tl.where(too_long, rows, n), 0))
        state = tl.where(too_long, 0, state)
    tl.store(squares + batch * n + rows, square, mask=rows < n)
    tl.store(free + batch * n + rows, state.to(tl.uint8), mask=rows < n)


@triton.jit
def first_free(listed, count, free, n, BLOCK: tl.constexpr):
    """First of the listed rows that is in the pool, free and seen; n if none is."""
    place = count
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        rows = tl.load(listed + at, mask=at < count, other=-1)
        usable = tl.load(free + rows, mask=(rows >= 0) & (rows < n), other=0) == FREE_SEEN
        place = tl.minimum(place, tl.min(tl.where(usable, at, count), 0))
    row = tl.load(listed + tl.minimum(place, count - 1))
    return tl.where(place < count, row, n).to(tl.int64)


@triton.jit
def keys_of(rows, seed, bits):
    """`row_keys` of a pool whose keys have so many bits; products stay below 2⁶³."""
    mask = (tl.full([], 1, dtype=tl.int64) << bits) - 1
    key = rows.to(tl.int64)
    for step in tl.static_range(ROUNDS):
        key = ((key ^ ((seed >> (STEP * step)) & mask)) * FACTOR) & mask
        key = key ^ (key >> ((bits + 1) // 2))
    return key ^ ((seed >> (SEED - bits)) & mask)


@triton.jit
def row_of(key, seed, bits):
    """The row that has a key."""
    mask = (tl.full([], 1, dtype=tl.int64) << bits) - 1
    row = key ^ ((seed >> (SEED - bits)) & mask)
    for back in tl.static_range(ROUNDS):
        row = row ^ (row >> ((bits + 1) // 2))
        row = ((row * (INVERSE_FACTOR & mask)) & mask) ^ ((seed >> (STEP * (ROUNDS - 1 - back))) & mask)
    return row


@triton.jit
def first_left(free, n, seed, bits, BLOCK: tl.constexpr):
    """The row of the lowest key that is free and seen, failing that the free row of the lowest; n if none is left."""
    none = tl.full([], 1, dtype=tl.int64) << bits
    seen = none
    left = none
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        state = tl.load(free + rows, mask=rows < n, other=0)
        keys = keys_of(rows, seed, bits)
        seen = tl.minimum(seen, tl.min(tl.where(state == FREE_SEEN, keys, none), 0))
        left = tl.minimum(left, tl.min(tl.where(state != 0, keys, none), 0))
    key = tl.where(seen < none, seen, left)
    return tl.where(key < none, row_of(key, seed, bits), n).to(tl.int64)


READ = Configuration({"BLOCK_N": 32, "BLOCK_D": 128}, num_warps=8, num_stages=1)
CONFIGURATIONS = {"read_pool": READ}
