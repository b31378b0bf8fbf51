"""What a GPU's kernels note of the data that they read, and how it is told: no call waits for a kernel to hear of it.

Each device has a block of words in pinned host memory, one for each argument of each op. A kernel that meets a row with NaN
or Inf leaves the lowest such row there. The next call of any op on that device looks, and `check` waits and looks.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks

# op -> the function that it is part of, and what its words stand for
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "covariance": ("covariance", "z"),
    "spectrum": ("spectrum", "z"),
    "effective_rank2": ("effective_rank", "z"),
    "effective_rank2_backward": ("effective_rank", "z"),
    "batch_effective_rank2": ("batch_effective_rank", "pool", "indices"),
    "batch_effective_rank2_backward": ("batch_effective_rank", "pool", "indices"),
    "batch_spectrum": ("batch_effective_rank", "pool", "indices"),
    "whiten": ("whiten", "z"),
    "greedy_select": ("greedy_select", "pool", "valid", "long"),
    "info_nce": ("info_nce", "query", "key", "queue"),
    "nt_xent": ("nt_xent", "z0", "z1"),
    "info_nce_grad_norms": ("info_nce_grad_norms", "query", "key", "queue"),
}
TOO_LONG = "is too long for the log-determinant: float64 does not resolve what it adds; normalise the rows"
_COMPLAINTS = {
    "indices": "indices batch {batch} holds an index outside the pool",
    "valid": "valid batch {batch} leaves fewer rows than are to be picked",
    "long": "pool {row} " + TOO_LONG,
}

# words of an op, each 16 bytes from the next: Triton then compiles for one alignment
WORDS, STRIDE = 4, 2
# what a word holds when nothing was noted; else batch · 2³² + row
CLEAN = torch.iinfo(torch.int64).max


class _Block:
    """The words of one device."""

    def __init__(self, device: torch.device) -> None:
        size = len(ARGUMENTS) * WORDS * STRIDE
        self.device = device
        # whatever the default device is
        words = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.of_op = dict(zip(ARGUMENTS, words.split(WORDS * STRIDE), strict=True))
        # torch would not write to what was made in inference mode
        self._read = words.numpy()
        self._read[:] = CLEAN
        self._clean = self._read.tobytes()

    def noted(self) -> bool:
        return self._read.tobytes() != self._clean

    def take(self) -> str:
        """What was noted, which is forgotten; waits for the kernels that are still at it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = []
        for (function, *arguments), words in zip(
            ARGUMENTS.values(), self._read.reshape(-1, WORDS, STRIDE), strict=True
        ):
            for argument, value in zip(arguments, words[:, 0].tolist(), strict=False):
                if value != CLEAN:
                    found.append(f"{function}: {_complaint(argument, value)}")
        self._read[:] = CLEAN
        return "; ".join(dict.fromkeys(found))


def _complaint(argument: str, value: int) -> str:
    batch, row = value >> 32, value & 0xFFFFFFFF
    where = f"batch {batch} row {row}" if batch else f"row {row}"
    return _COMPLAINTS.get(argument, f"{argument} {{row}} holds NaN or Inf, or its squares leave float32").format(
        batch=batch, row=where
    )


_blocks: dict[torch.device, _Block] = {}


class _Running(threading.local):
    """The op whose kernels this thread launches."""

    op: str | None = None


_running = _Running()


def words(like: Tensor) -> Tensor | None:
    """Where the kernels of the running op note what is wrong; None where nobody asks."""
    if not checks.enabled():
        return None
    device = like.device
    if device.type == "meta":  # a kernel that is only compiled
        return torch.empty(WORDS * STRIDE, dtype=torch.int64, device=device)
    if _running.op is None:
        return None
    block = _blocks.get(device)
    if block is None:
        # pinned memory cannot be had while a graph is captured
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        # of two threads' the first: kernels may already be told of it
        block = _blocks.setdefault(device, _Block(device))
    return block.of_op.get(_running.op)


def _raise_noted(device: torch.device) -> None:
    block = _blocks.get(device)
    if block is None or not checks.enabled() or not block.noted():
        return
    if device.type == "cuda":
        # to wait, or to leave, would break the capture
        if torch.cuda.is_current_stream_capturing():
            return
        raise ValueError(f"{block.take()} (noted on {device})")
    raise ValueError(block.take())


def noting(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its first argument a tensor, with what an earlier call noted raised before; on the CPU its own too."""

    def call(*arguments: Any) -> Any:
        device = arguments[0].device
        _raise_noted(device)
        outer, _running.op = _running.op, op
        try:
            result = function(*arguments)
        except Exception:
            # of a step between the kernels, such as eigenvalues of NaN: what it comes from says more
            _raise_noted(device)
            raise
        finally:
            _running.op = outer
        if device.type == "cpu":
            _raise_noted(device)
        return result

    return call


def check() -> None:
    """Raise what kernels on GPUs have noted since it was last raised; waits for them.

    On the CPU a call raises for its own rows. On a GPU that would stall the stream: the kernels note the first row that
    holds NaN or Inf, an index outside a pool, a mask that leaves too few rows, a row too long for the log-determinant, in
    pinned memory, and the next call of an op on that GPU raises it if it is there by then. Call `check` where it must not
    be later, such as once a step or before a result is used. Calls inside a CUDA graph, captured or replayed, note too,
    but raise nothing themselves; so do those under `torch.compile` where that makes graphs of them. The backend
    `reference` notes nothing on a GPU. `set_checks(False)` compiles the search out of the kernels.

    Raises:
        ValueError: names the function, the argument and the first row, such as "covariance: z row 17 holds NaN or Inf".
    """
    for block in list(_blocks.values()):
        if block.device.type == "cuda":
            torch.cuda.synchronize(block.device)
        if block.noted():
            raise ValueError(block.take())
