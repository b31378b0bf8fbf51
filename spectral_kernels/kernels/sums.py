"""Sums over many programs, in a fixed order: how a loop is divided among them, and who adds up the parts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# programs that fill a large GPU twice; fixed, so that results do not depend on the device
FULL_GRID = 264


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
