"""Argument checks: one clear error that names the argument and the value."""

import math
import operator
import reprlib
import warnings
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# which transforms are active, and what they wrap: nothing public tells
from torch._C import _functorch
from torch.autograd import forward_ad

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# made once: `int | torch.SymInt` would be put together at each call
_INTEGERS = (int, torch.SymInt)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_enabled = True


def set_checks(enabled: bool) -> None:
    """Turn the search for NaN and Inf rows on or off in every backend (on at import).

    On a GPU what is found is raised by a later call, or by `check`. Shapes, dtypes and ranges are checked always: they
    cost nothing.
    """
    global _enabled
    _enabled = bool(enabled)
    cpp = torch.ops.spectral_kernels_cpp
    if hasattr(cpp, "set_checks"):
        cpp.set_checks(_enabled)


def tensor(value: Any, name: str) -> Tensor:
    """A tensor as it is; a numpy or DLPack array as one that shares its memory, read-only or not: nothing here writes to it."""
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__array_interface__"):
        if hasattr(value, "__dlpack__"):
            taken: Tensor = torch.utils.dlpack.from_dlpack(value)
            return taken
        raise ValueError(f"{name} must be a tensor or an array, got {type(value).__name__}")
    if not value.dtype.isnative or any(stride < 0 for stride in value.strides):
        value = value.astype(value.dtype.newbyteorder("="), order="C")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(value)
    except TypeError:
        raise ValueError(f"{name} must be float64, float32 or float16, got an array of {value.dtype}") from None


def floating(z: Tensor, name: str, ndim: int | None = None) -> Tensor:
    """A floating tensor (..., n, d), n and d at least 1, or an array of that kind; exactly `ndim` dimensions where given."""
    z = tensor(z, name)
    if z.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {z.layout}")
    if z.dtype not in FLOATING:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {z.dtype}")
    if ndim is not None and z.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(z.shape)}")
    shape = z.shape
    if len(shape) < 2:
        raise ValueError(f"{name} must have shape (..., n, d), got shape {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"{name} is empty: shape {tuple(shape)}")
    return z


def same_features(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    """`b` fits `a`: same feature size d, dtype and device."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{b_name} has d = {b.shape[-1]}, but {a_name} has d = {a.shape[-1]}")
    if a.dtype != b.dtype:
        raise ValueError(f"{b_name} is {b.dtype}, but {a_name} is {a.dtype}")
    if a.device != b.device:
        raise ValueError(f"{b_name} is on {b.device}, but {a_name} is on {a.device}")


def row_indices(indices: Tensor | Sequence[int], name: str, rows: int, ndim: int) -> Tensor:
    """An int64 tensor of `ndim` dimensions with values in [0, rows), from whole numbers in a tensor, array or list."""
    if not isinstance(indices, Tensor):
        try:
            indices = torch.as_tensor(indices) if isinstance(indices, list | tuple) else tensor(indices, name)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} must be whole numbers of one shape, got {type(indices).__name__}") from None
    if indices.numel() == 0 or indices.ndim != ndim:
        raise ValueError(f"{name} must be non-empty with {ndim} dimensions, got shape {tuple(indices.shape)}")
    if indices.dtype != torch.int64:
        if indices.dtype not in _WHOLE:
            raise ValueError(f"{name} must be whole numbers, got {indices.dtype}")
        indices = indices.long()
    # reading values is a sync on CUDA and a graph break under compile; there the kernels look
    if readable(indices):
        inside(indices, name, rows)
    return indices


def inside(indices: Tensor, name: str, rows: int) -> None:
    """Raise for an index outside [0, rows); waits for a GPU."""
    low, high = (int(value) for value in torch.aminmax(indices))
    if low < 0 or high >= rows:
        raise ValueError(f"{name} must lie in [0, {rows}), got {low if low < 0 else high}")


def enough_left(counts: Tensor | None, needed: int) -> None:
    """Raise if a mask that leaves so many rows of each pool leaves too few of one; waits for a GPU."""
    if counts is not None and (least := int(counts.min())) < needed:
        raise ValueError(f"valid leaves {least} rows, but {needed} are to be picked")


def integer(value: int, name: str, low: int, high: int | None = None) -> int:
    """A whole number of at least `low` (at most `high`), numpy's included."""
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    if is_bool or not (isinstance(value, _INTEGERS) or hasattr(value, "__index__")):
        raise ValueError(f"{name} must be an integer, got {shortened(value)}")
    if not isinstance(value, _INTEGERS):
        try:
            value = operator.index(value)
        except (TypeError, RuntimeError):  # the latter of a tensor that holds no values
            raise ValueError(f"{name} must be an integer, got {shortened(value)}") from None
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {span}, got {shortened(value)}")
    return value


def number(value: float, name: str, what: str, allowed: Callable[[float], bool]) -> float:
    """A number, numpy's included, that is `allowed`, as a float; `what` says which numbers are."""
    if isinstance(value, bool) or not isinstance(value, Real) or not allowed(value):
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return float(value)


def positive(value: float, name: str) -> float:
    """A finite number above 0."""
    return number(value, name, "a finite number above 0", lambda x: 0 < x < math.inf)


def finite(value: float, name: str) -> float:
    """A finite number."""
    return number(value, name, "a finite number", lambda x: -math.inf < x < math.inf)


def share(value: float, name: str) -> float:
    """A number from 0 to 1."""
    return number(value, name, "between 0 and 1", lambda x: 0 <= x <= 1)


def one_of(value: str, name: str, choices: Collection[str]) -> str:
    """One of the names in `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without a wait: on the CPU, outside `torch.compile` and `torch.func.vmap`."""
    return not traced(tensor) and tensor.device.type == "cpu"


def traced(tensor: Tensor) -> bool:
    """Whether the values are nowhere yet: `torch.compile`, `torch.func.vmap`."""
    if torch.compiler.is_compiling():
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def finite_rows(z: Tensor, name: str) -> None:
    """Raise for the first row of a CPU tensor (..., n, d) that holds NaN or Inf.

    CUDA tensors are not looked at: reading the answer would stall the stream. Their kernels note it (errors.py).
    """
    if not _enabled or not readable(z):
        return
    finite = torch.isfinite(z).all(-1)
    if not bool(finite.all()):
        bad_row(~finite, name)


def bad_row(bad: Tensor, name: str) -> None:
    """Raise for the first True of a mask (..., n) of bad rows."""
    batches = bad.reshape(-1, bad.shape[-1])
    batch, row = batches.nonzero()[0].tolist()
    where = f"batch {batch} row {row}" if len(batches) > 1 else f"row {row}"
    raise ValueError(f"{name} {where} holds NaN or Inf")


def finite_pool_rows(pool: Tensor, indices: Tensor) -> None:
    """Raise for an index outside pool (N, d) and for the first row among `indices` that holds NaN or Inf, on the CPU."""
    if not readable(indices) or not readable(pool):
        return
    inside(indices, "indices", len(pool))
    if not _enabled:
        return
    rows = indices.unique()
    finite = torch.isfinite(pool[rows]).all(-1)
    if not bool(finite.all()):
        raise ValueError(f"pool row {int(rows[~finite][0])} holds NaN or Inf")


def enabled() -> bool:
    """Whether NaN and Inf rows are looked for."""
    return _enabled


def shortened(value: Any) -> str:
    """A value for a line of text, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)
    except ValueError:  # a number in it has too many digits
        return f"a {type(value).__name__} of numbers with thousands of digits"
