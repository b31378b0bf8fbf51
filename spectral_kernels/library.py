"""Registers an op once: schema, fake implementation, backends, derivatives.

An op `name` of a room `ops/<room>/` is implemented by functions of that very name: `reference.py`, `triton.py`, `cuda.py`
where csrc has kernels that beat Triton's, and either `torch.ops.spectral_kernels_cpp.<name>` or, where C++ has only the
parts, `cpp.py`. All take the schema's arguments without the last one, `backend`, which says which of them runs.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# whether a mode (fake tensors, a tracer) is on: nothing public tells
from torch._C import _len_torch_dispatch_stack

from spectral_kernels import backends, checks, errors

NAMESPACE = "spectral_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_NUMBERS = ("Tensor temperature", "Tensor shrinkage")

# where torch's own ops run the reference; ROCm calls itself CUDA
GPU_KEYS = ("CUDA", "MPS", "XPU", "HPU", "PrivateUse1")

_CPP_MESSAGE = re.compile(r"spectral_kernels: ([^\n]*)")

# op name -> what calls it, where that is not its overload
_CALLS: dict[str, Callable[..., Any]] = {}
# op name -> the reference, of the op's own arguments, open to every derivative of torch
_PLAIN: dict[str, Callable[..., Any]] = {}


def _module_function(room: str, module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"spectral_kernels.ops.{room}.{module}"), name)
    return function


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
    schema: str,
    *,
    room: str,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    cpp: str = "library",
    triton: bool = True,
    cuda: str = "none",
) -> None:
    """Register an op.

    Args:
        schema: without the trailing `str backend`, which is added here. A `Tensor temperature` or
            `Tensor shrinkage` is a number (`as_tensor`): implementations get it as such, callers may give it so.
        room: folder under `ops/`.
        fake: shapes and dtypes from the schema's arguments (without `backend`).
        check: reads the arguments of a CPU call for NaN and Inf, for the reference; kernels look for themselves as they
            read (errors.py).
        cpp: `"library"` (C++ has the whole op), `"composed"` (`cpp.py` has it) or `"reference"` (d x d work that is
            torch's on every backend).
        triton: whether `triton.py` has it; else the reference runs under that name.
        cuda: `"own"` (`cuda.py` has it), `"reference"` (the backward of an op that it has) or `"none"`.
    """
    name, rest = schema.split("(", 1)
    arguments, returns = rest.rsplit(") ->", 1)
    LIBRARY.define(f"{name}({arguments}, str backend) ->{returns}")
    items = arguments.split(", ")
    numbers = tuple(place for place, item in enumerate(items) if item in _NUMBERS)
    known = tuple(place for place in numbers if items[place] != "Tensor temperature")
    backends.OPS[name] = ("reference", "cpp", "triton", *(() if cuda == "none" else ("cuda",)))
    owners = {"cpp": cpp != "reference", "triton": triton, "cuda": cuda != "reference"}
    kernels = {"reference": False, **owners}
    shared = tuple(backend for backend, own in owners.items() if not own)
    if shared:
        backends.SHARED[name] = shared
    loaded: dict[str, Callable[..., Any]] = {}

    def load(backend: str) -> Callable[..., Any]:
        if backend == "cpp" and cpp == "library":
            return _translated(getattr(torch.ops.spectral_kernels_cpp, name))
        if backend == "cpp" and cpp == "composed":
            return _translated(_module_function(room, "cpp", name))
        if backend == "triton" and triton:
            return errors.noting(name, _module_function(room, "triton", name))
        if backend == "cuda" and cuda == "own":
            return errors.noting(name, _translated(_module_function(room, "cuda", name)))
        return _module_function(room, "reference", name)

    def kernel(*arguments: Any) -> Any:
        *inputs, backend = _converted(arguments, numbers, _as_number)
        function = loaded.get(backend)
        if function is None:
            function = loaded.setdefault(backend, load(backend))
        if check is not None and not kernels[backend]:
            check(*inputs)
        with backends.float64_needed(name, inputs[0].device):
            return _contiguous(_without_autocast(function, inputs))

    def plain(*arguments: Any) -> Any:
        # a temperature stays a tensor: traced, its value is not known
        *inputs, _backend = _converted(arguments, known, _as_number)
        if check is not None:
            check(*inputs)
        return _without_autocast(_module_function(room, "reference", name), inputs)

    _PLAIN[name] = plain
    for key in ("CPU", *GPU_KEYS):
        LIBRARY.impl(name, kernel, key)
    if cpp == "library" or triton or cuda == "own":
        _CALLS[name] = _eager_call(name, kernel, cpp == "library", numbers)
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *inputs: fake(*inputs[:-1]), lib=LIBRARY)


def _without_autocast(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Autocast would turn the accumulating products inside into bf16."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*inputs)
    return function(*inputs)


class _Existing(torch.autograd.Function):
    """The identity, which raises where a derivative comes back as NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if checks.readable(grad) and bool(grad.isnan().any()):
            raise RuntimeError(f"{ctx.name} has no second derivative here: torch has none where eigenvalues repeat")
        return grad, None


def differentiate(
    name: str,
    *,
    tensors: int = 1,
    keep: Callable[..., tuple[Tensor | None, ...]] = lambda inputs, outputs: (),
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> None:
    """Register the derivatives of an op; only its first output has one.

    First derivatives in reverse mode are `backward`'s. All others (second and higher ones, forward mode, the transforms of
    torch.func) are those of the reference, which is plain PyTorch, whatever the backend.

    Args:
        tensors: how many of the op's first arguments are tensors; these may have gradients.
        keep: from all arguments and the outputs (a tuple) to what the backward needs besides the tensors.
        backward: `backward(grad, tensors, kept, options, wanted)`, options being the other arguments, to a gradient or None
            for each tensor. None: the op's result has no gradient, outside transforms.
    """
    registered = overload(name)
    plain = _PLAIN[name]

    def below(keyset: Any, inputs: Sequence[Any]) -> Any:
        # as torch.library.register_autograd gets there, which has no forward mode; nothing public does
        with torch._C._AutoDispatchBelowAutograd():
            return registered.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)  # type: ignore[attr-defined]

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            result = below(keyset, inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            # numbers among the options are tensors, a few bytes without a gradient
            ctx.options = inputs[tensors:]
            ctx.save_for_backward(*inputs[:tensors], *keep(inputs, outputs))
            ctx.mark_non_differentiable(*outputs[1:])
            return result

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            inputs, kept = ctx.saved_tensors[:tensors], ctx.saved_tensors[tensors:]
            wanted = ctx.needs_input_grad[1 : 1 + tensors]
            # create_graph=True: whoever differentiates this gradient needs plain operations
            found = _plain_backward if torch.is_grad_enabled() else backward
            assert found is not None
            gradients = found(grad, inputs, kept, ctx.options, wanted)
            return (None, *gradients, *[None] * len(ctx.options))

    def _plain_backward(
        grad: Tensor, inputs: Sequence[Any], _: Any, options: Sequence[Any], wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        places = [place for place, want in enumerate(wanted) if want]

        def first_output(*differentiated: Tensor) -> Tensor:
            arguments = list(inputs)
            for place, tensor in zip(places, differentiated, strict=True):
                arguments[place] = tensor
            result = plain(*arguments, *options)
            output: Tensor = result[0] if isinstance(result, tuple) else result
            return output

        differentiated = (_Existing.apply(inputs[place], name) for place in places)  # type: ignore[no-untyped-call]
        pull = torch.func.vjp(first_output, *differentiated)[1]
        gradients = dict(zip(places, pull(grad), strict=True))
        return tuple(gradients.get(place) for place in range(tensors))

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if checks.transformed():
            return plain(*inputs)
        if (
            backward is not None
            and torch.is_grad_enabled()
            and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        ):
            return Derivative.apply(keyset, *inputs)  # type: ignore[no-untyped-call]
        return below(keyset, inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


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
