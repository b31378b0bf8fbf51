"""Which implementation of an op runs: choosing one, forcing one, and saying why one cannot run.

Every op is registered once (`registration.py`) and carries the backend's name as its last argument. `choose` finds that
name: a forced backend that cannot run raises `BackendError`; nothing falls back silently.
"""

import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")

# op name -> backends that implement it; filled by `define`
OPS: dict[str, tuple[str, ...]] = {}
# op name -> those of them that run the reference's code, because its work is d x d and torch's; filled likewise
SHARED: dict[str, tuple[str, ...]] = {}

_PACKAGE = Path(__file__).parent.parent
_LIBRARY_PATH = _PACKAGE / "_C.so"
_CUDA_LIBRARY_PATH = _PACKAGE / "_C_cuda.so"
_LINUX = sys.platform.startswith("linux")


def found(module: str) -> bool:
    """Whether a module is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # something on the way to it is broken
        return False


_TRITON_FOUND = found("triton")
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Fit:
    """How a call suits a backend: why that cannot run it, and whether it is expected to be the fastest."""

    reason: str | None = None
    faster: bool = True


class BackendError(RuntimeError):
    """A backend that cannot run here was forced, or the device lacks float64; the message says why and what to do."""


class BackendWarning(RuntimeWarning):
    """An op runs on a backend far slower than one that is missing here; given once in a process."""


def _load(path: Path, what: str) -> str | None:
    """Why a library is not loaded; None when it is."""
    if not path.exists():
        if not _LINUX:
            return f"the {what} library is built on Linux only, this is {sys.platform}"
        return f"the {what} library was not built (python -m spectral_kernels.info says why)"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return f"the {what} library does not load under torch {torch.__version__}: {reason}"
    return None


def _why_no_cuda() -> str | None:
    """Why this torch runs no CUDA library; None where it does."""
    if torch.version.hip:
        return f"this torch is built for ROCm {torch.version.hip}, the CUDA library is for NVIDIA's GPUs"
    return None if torch.version.cuda else "this torch is built without CUDA"


CPP_ERROR = _load(_LIBRARY_PATH, "C++")
CUDA_ERROR = _why_no_cuda() or _load(_CUDA_LIBRARY_PATH, "CUDA")


def _check_name(backend: str, argument: str = "backend") -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_FROM_ENVIRONMENT = os.environ.get("SPECTRAL_KERNELS_BACKEND") or None
if _FROM_ENVIRONMENT is not None:
    _check_name(_FROM_ENVIRONMENT, "SPECTRAL_KERNELS_BACKEND")


class _Forced(threading.local):
    """None: nothing forced; "auto": an outer choice lifted."""

    def __init__(self) -> None:
        self.backend: str | None = None


_forced = _Forced()


class use_backend:
    """Force a backend inside a `with` block, in this thread only.

    Args:
        backend: `"reference"`, `"cpp"`, `"triton"` or `"cuda"`; None lifts an outer `use_backend` or environment
            variable.

    Raises:
        ValueError: unknown name. An op that the backend cannot run raises `BackendError` when it is called.
    """

    def __init__(self, backend: str | None) -> None:
        self._backend = None if backend is None else _check_name(backend)

    def __enter__(self) -> None:
        self._outer = _forced.backend
        _forced.backend = "auto" if self._backend is None else self._backend

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _forced.backend = self._outer


def why_unavailable(backend: str, op: str, device_type: str) -> str | None:
    """The reason why `backend` cannot run `op` on a device type (`"cpu"`, `"cuda"`), or None when it can."""
    if backend not in OPS[op]:
        return f"{op} has no {backend} implementation"
    if backend == "cpp":
        return CPP_ERROR if device_type == "cpu" else f"cpp needs CPU tensors, got {device_type}"
    if backend == "triton":
        if device_type not in ("cuda", "cpu"):
            return f"triton needs CUDA tensors, got {device_type}"
        if not _TRITON_FOUND:
            return f"triton is not installed ({how_to_get_triton()})"
        if device_type == "cpu" and not _TRITON_INTERPRETS:
            return "triton on CPU tensors needs TRITON_INTERPRET=1 set before the import"
        return None
    if backend == "cuda":
        if device_type != "cuda":
            return f"cuda needs CUDA tensors, got {device_type}"
        # its kernels finish what Triton's begin
        return CUDA_ERROR or why_unavailable("triton", op, device_type)
    return None


def how_to_get_triton() -> str:
    """What to do where Triton is missing."""
    if not _LINUX:
        return f"it has wheels for Linux, this is {sys.platform}"
    return "ROCm builds of torch bring it" if torch.version.hip else "pip install triton"


def forced_backend(backend: str | None = None) -> str | None:
    """The backend forced by the argument, else by `use_backend`, else by SPECTRAL_KERNELS_BACKEND, else None."""
    if backend is not None:
        return _check_name(backend)
    inner = _forced.backend
    if inner is None:
        return _FROM_ENVIRONMENT
    return None if inner == "auto" else inner


def choose(
    op: str,
    device: torch.device,
    backend: str | None = None,
    *,
    cuda: Callable[[], Fit] = lambda: Fit(),
    warn: bool = True,
) -> str:
    """The backend that runs `op` on `device`.

    Args:
        op: name of a registered op, a key of `OPS`.
        device: where the op's tensors live.
        backend: forces one; None takes `use_backend`, then SPECTRAL_KERNELS_BACKEND, then the best one there is.
        cuda: how this call suits the cuda backend, asked only where that could run.
        warn: give a `BackendWarning`, once in a process, where the reference runs because what is faster is missing.

    Raises:
        ValueError: unknown backend name.
        BackendError: a forced backend cannot run the op here.
    """
    forced = forced_backend(backend)
    if forced is not None:
        reason = why_unavailable(forced, op, device.type)
        if reason is None and forced == "cuda":
            reason = cuda().reason
        if reason is not None:
            raise BackendError(f"backend {forced!r} cannot run {op}: {reason}")
        return forced
    if device.type == "cpu":
        missing = CPP_ERROR
        if missing is None:
            return "cpp" if "cpp" in OPS[op] else "reference"
    elif device.type == "cuda":
        if why_unavailable("cuda", op, "cuda") is None:
            fit = cuda()
            if fit.reason is None and fit.faster:
                return "cuda"
        missing = _ROCM or why_unavailable("triton", op, "cuda")
        if missing is None:
            return "triton"
    else:
        return "reference"
    fast = "cpp" if device.type == "cpu" else "triton"
    if warn and fast not in SHARED.get(op, ()) and not torch.compiler.is_compiling():
        _say_slow(op, device.type, missing)
    return "reference"


def why_not_rocm() -> str | None:
    """Why the Triton kernels are not taken unasked; None but on ROCm, where they may be right, but nobody has seen it."""
    return "the Triton kernels have not been tried on ROCm (backend='triton' does)" if torch.version.hip else None


_ROCM = why_not_rocm()
# measured with AVX-512 on one core of Zen 4: losses and whitening 2 to 3, covariance and ranks 2 to 12, greedy 9 to 29,
# Greedy-64 from 65,536 rows 390
_SLOWER = "2 to 30 times slower than C++, where rows are chosen from a large pool hundreds of times"
_slow_said = False


def _say_slow(op: str, device_type: str, missing: str) -> None:
    global _slow_said
    if _slow_said:
        return
    _slow_said = True
    how = _SLOWER if device_type == "cpu" else "many times slower than Triton's kernels"
    warnings.warn(
        f"{op} and other ops run on plain PyTorch here, {how}: {missing}. `python -m spectral_kernels.info` says how to get "
        f"it; SPECTRAL_KERNELS_BACKEND=reference or backend='reference' says that plain PyTorch is meant",
        BackendWarning,
        stacklevel=4,
    )


@contextmanager
def float64_needed(what: str, device: torch.device) -> Iterator[None]:
    """Raises `BackendError` in the place of what torch says where a device, such as MPS, has no float64."""
    try:
        yield
    except (TypeError, RuntimeError) as error:
        said = str(error).lower()
        if device.type in ("cpu", "cuda") or not any(word in said for word in ("float64", "fp64", "double")):
            raise
        raise BackendError(
            f"{what} computes in float64, which {device.type} devices do not have: move its tensors to the CPU (z.cpu())"
        ) from error
