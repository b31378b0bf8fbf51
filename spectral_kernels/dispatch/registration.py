"""Registers an op from its reference: schema, fake implementation, backends.

An op is implemented by functions of its name: in `reference.py`, beside it in `triton.py`, in `cuda.py` where csrc has
kernels that beat Triton's, and either as `torch.ops.spectral_kernels_cpp.<name>` or, where C++ has only the parts, in
`cpp.py`. All take the same arguments; the registered op has one more, `backend`, which says which of them runs.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

# whether a mode (fake tensors, a tracer) is on: nothing public tells
from torch._C import _len_torch_dispatch_stack

from spectral_kernels import checks, errors
from spectral_kernels.dispatch import backends

NAMESPACE = "spectral_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# annotation of a reference's argument -> its type in the schema; numbers travel as tensors (`as_tensor`)
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    str: "str",
    float: "Tensor",
    float | Tensor: "Tensor",
}

# where torch's own ops run the reference; ROCm calls itself CUDA
GPU_KEYS = ("CUDA", "MPS", "XPU", "HPU", "PrivateUse1")

_CPP_MESSAGE = re.compile(r"spectral_kernels: ([^\n]*)")

# op name -> what calls it, where that is not its overload
_CALLS: dict[str, Callable[..., Any]] = {}
# op name -> the reference, of the op's own arguments, open to every derivative of torch
PLAIN: dict[str, Callable[..., Any]] = {}


def _schema(name: str, arguments: dict[str, Any], returned: Any) -> str:
    for argument, kind in arguments.items():
        if kind not in _TYPES:
            raise TypeError(f"{name}: argument {argument} is a {kind}, which an op cannot take")
    listed = ", ".join(f"{_TYPES[kind]} {argument}" for argument, kind in arguments.items())
    results = ", ".join("Tensor" for _ in get_args(returned))
    return f"{name}({listed}, str backend) -> {f'({results})' if results else 'Tensor'}"


def _translation(error: RuntimeError) -> Exception:
    """C++ throws runtime_error across the ABI; what it says of an argument is a ValueError here."""
    found = _CPP_MESSAGE.search(str(error))
    return error if found is None else ValueError(found.group(1))


def _translated(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise _translation(error) from None

    return call


def cpp_call(name: str) -> Callable[..., Any]:
    """A C++ operator, for what is no op of its own: the memory bank writes into its arguments."""
    return _translated(getattr(torch.ops.spectral_kernels_cpp, name).default)


def _contiguous(result: Any) -> Any:
    """The strides that the fake implementations promise."""
    return tuple(part.contiguous() for part in result) if isinstance(result, tuple) else result.contiguous()


def as_tensor(value: float | Tensor) -> Tensor:
    """A number as the float64 tensor on the CPU that schemas have for it.

    As a number Dynamo would compile a graph for each of its values; multiplied it is part of the graph.
    """
    if isinstance(value, Tensor):
        return value
    if not torch.compiler.is_compiling():
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def _as_number(value: float | Tensor) -> float:
    """The number of what `as_tensor` made."""
    return value.item() if isinstance(value, Tensor) else value


def _converted(arguments: Sequence[Any], places: tuple[int, ...], convert: Callable[[Any], Any]) -> Sequence[Any]:
    if not places:
        return arguments
    changed = list(arguments)
    for place in places:
        changed[place] = convert(changed[place])
    return changed


def _eager_call(name: str, kernel: Callable[..., Any], cpp: bool, numbers: tuple[int, ...]) -> Callable[..., Any]:
    """Calls an op; its C++, or the kernel of a GPU, at once where there is nothing to differentiate and no mode or transform
    is active.

    The layers in between would do nothing then, but they are Python, and cold: 0.1 ms beside a batch's covariance.
    """
    found = overload(name)
    library: Callable[..., Any] | None = None
    at_once = ("cpp", "triton", "cuda") if cpp else ("triton", "cuda")

    def registered(*arguments: Any) -> Any:
        return found(*_converted(arguments, numbers, as_tensor))

    def call(*arguments: Any) -> Any:
        nonlocal library
        if torch.compiler.is_compiling():
            return registered(*arguments)
        backend = arguments[-1]
        if backend not in at_once or _len_torch_dispatch_stack() or checks.transformed():
            return registered(*arguments)
        grad = torch.is_grad_enabled()
        for value in arguments:
            if isinstance(value, torch.Tensor) and (type(value) is not torch.Tensor or (grad and value.requires_grad)):
                return registered(*arguments)
        if backend != "cpp":
            return kernel(*arguments)
        if library is None:
            library = getattr(torch.ops.spectral_kernels_cpp, name).default._op
        try:
            return library(*arguments[:-1])
        except RuntimeError as error:
            raise _translation(error) from None

    return call


def define(
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    cpp: str = "library",
    triton: bool = True,
    cuda: str = "none",
) -> None:
    """Register an op.

    Args:
        reference: the definition, whose name and annotations are the op's. Of a `float` implementations get the number; of
            a `float | Tensor` the reference may get a tensor, since a traced number has no value. Callers may give either
            as a number.
        fake: shapes and dtypes from the reference's arguments. None: those of the reference itself, which must not branch
            on shapes or values then.
        check: reads the arguments of a CPU call for NaN and Inf, for the reference; kernels look for themselves as they
            read (errors.py).
        cpp: `"library"` (C++ has the whole op), `"composed"` (`cpp.py` has it) or `"reference"` (d x d work that is
            torch's on every backend).
        triton: whether `triton.py` has it; else the reference runs under that name.
        cuda: `"own"` (`cuda.py` has it), `"reference"` (the backward of an op that it has) or `"none"`.
    """
    name, package = reference.__name__, reference.__module__.rpartition(".")[0]
    hints = get_type_hints(reference)
    returned = hints.pop("return")
    LIBRARY.define(_schema(name, hints, returned))
    kinds = list(hints.values())
    numbers = tuple(place for place, kind in enumerate(kinds) if kind in (float, float | Tensor))
    known = tuple(place for place in numbers if kinds[place] is float)
    backends.OPS[name] = ("reference", "cpp", "triton", *(() if cuda == "none" else ("cuda",)))
    owners = {"cpp": cpp != "reference", "triton": triton, "cuda": cuda != "reference"}
    kernels = {"reference": False, **owners}
    shared = tuple(backend for backend, own in owners.items() if not own)
    if shared:
        backends.SHARED[name] = shared
    loaded: dict[str, Callable[..., Any]] = {}

    def own(backend: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{backend}"), name)
        return function

    def load(backend: str) -> Callable[..., Any]:
        if backend == "cpp" and cpp == "library":
            return _translated(getattr(torch.ops.spectral_kernels_cpp, name))
        if backend == "cpp" and cpp == "composed":
            return _translated(own("cpp"))
        if backend == "triton" and triton:
            return errors.noting(name, own("triton"))
        if backend == "cuda" and cuda == "own":
            return errors.noting(name, _translated(own("cuda")))
        return reference

    def kernel(*arguments: Any) -> Any:
        *inputs, backend = _converted(arguments, numbers, _as_number)
        function = loaded.get(backend)
        if function is None:
            function = loaded.setdefault(backend, load(backend))
        if check is not None and not kernels[backend]:
            check(*inputs)
        with backends.float64_needed(name, inputs[0].device):
            return _contiguous(without_autocast(function, inputs))

    def plain(*arguments: Any) -> Any:
        *inputs, _backend = _converted(arguments, known, _as_number)
        if check is not None:
            check(*inputs)
        return without_autocast(reference, inputs)

    def shapes(*arguments: Any) -> Any:
        return fake(*arguments[:-1]) if fake is not None else _contiguous(reference(*arguments[:-1]))

    PLAIN[name] = plain
    for key in ("CPU", *GPU_KEYS):
        LIBRARY.impl(name, kernel, key)
    _CALLS[name] = _eager_call(name, kernel, cpp == "library", numbers)
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=LIBRARY)


def without_autocast(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Autocast would turn the accumulating products inside into bf16."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*inputs)
    return function(*inputs)


def composed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register an op that is made of other ops, under the name of the function that it decorates, less a leading underscore.

    The schema comes from the annotations: tensors, bools, whole numbers and text, and last `backend: str`, which the function
    hands to the ops inside. A number is a Tensor (`as_tensor`). Shapes, derivatives of any order and the transforms of
    torch.func are those of its parts.
    """
    name = function.__name__.removeprefix("_")
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    backends.OPS[name] = ("reference", "cpp", "triton")
    return overload(name)


def overload(name: str) -> Callable[..., Any]:
    """The registered op itself."""
    found: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found


def op(name: str) -> Callable[..., Any]:
    """What calls the registered op with all its arguments, `backend` last."""
    return _CALLS.get(name) or overload(name)
