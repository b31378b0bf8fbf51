"""Every launch of a Triton kernel: recorded, interpreted, or past `JITFunction.run` on a GPU.

Recording lets `bench/aot.py` see, with meta tensors and no GPU, what each op would compile. Kernels are bare `@triton.jit`
with configurations from static tables; under TRITON_INTERPRET=1 the same code runs on CPU tensors.

`JITFunction.run` binds, types and hashes every argument anew: tens of microseconds. So the first launch of a variant goes
through Triton, which compiles it; what it returns is held by a key that tells apart all that Triton does, and more, and
later launches of that key call it at once. What the key does not cover (an address that is no multiple of 16, a number
beyond 32 bits, launch hooks) goes through Triton each time.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
import triton
from triton import knobs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# False sends every launch through Triton; ROCm's launcher takes other arguments
DIRECT = torch.version.hip is None
LARGEST = 2**31 - 1
# as torch.cuda's public ones, which also ask whether CUDA is there (a CUDA tensor says so) and make an object of a stream
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass(frozen=True)
class Configuration:
    """A launch configuration: constants of the kernel, warps and pipeline stages."""

    constants: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        return self.constants[name]


AotCall = Callable[[], object]


def launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], use: Configuration
) -> None:
    """Run `kernel` on a one-dimensional grid, on the device of its first argument; or record it."""
    if _records is not None:
        _records.append(_record(kernel, arguments, {**use.constants, **constants}, use))
    elif INTERPRETED:
        through_triton(kernel, programs, arguments, constants, use)
    else:
        launch_directly(kernel, programs, arguments, constants, use)


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


@dataclass(frozen=True, slots=True)
class Plan:
    """A kernel's arguments: so many pointers first, then numbers, of which Triton looks at some."""

    kernel: Any
    pointers: int
    whole: Callable[[tuple[Any, ...]], tuple[int, ...]]
    looked_at: Callable[[tuple[Any, ...]], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Held:
    """A compiled kernel and what its launcher takes; `owners` live as long, so that no id in the key is used again."""

    run: Callable[..., Any]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    owners: tuple[Any, ...]


_plans: dict[int, Plan] = {}
_held: dict[tuple[Any, ...], Held] = {}


def launch_directly(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], use: Configuration
) -> None:
    """On a GPU, past `JITFunction.run` where that is sure to do the same."""
    device = arguments[0].get_device()
    if device != current_device():
        with torch.cuda.device(device):
            through_triton(kernel, programs, arguments, constants, use)
        return
    if not DIRECT or current_stream is None or _watched(kernel):
        through_triton(kernel, programs, arguments, constants, use)
        return
    plan = _plans.get(id(kernel)) or _plan(kernel, arguments)
    addresses: list[int | None] = []
    kinds: list[torch.dtype | None] = []
    bits = 0
    for tensor in arguments[: plan.pointers]:
        if tensor is None:
            addresses.append(None)
            kinds.append(None)
        else:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
            kinds.append(tensor.dtype)
    if bits & 15 or max(plan.whole(arguments)) > LARGEST:
        through_triton(kernel, programs, arguments, constants, use)
        return
    key = (id(kernel), id(use), device, *kinds, *constants.values(), *plan.looked_at(arguments))
    held = _held.get(key)
    if held is None:
        compiled = through_triton(kernel, programs, arguments, constants, use)
        _hold(key, kernel, compiled, arguments, constants, use)
        return
    held.run(
        programs, 1, 1, current_stream(device), held.function, held.metadata, None, None, None,
        *addresses, *arguments[plan.pointers :], *held.constants,
    )  # fmt: skip


def through_triton(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], use: Configuration
) -> Any:
    """As Triton launches; the compiled kernel."""
    return kernel[(programs,)](
        *arguments, **use.constants, **constants, num_warps=use.num_warps, num_stages=use.num_stages
    )


def _watched(kernel: Any) -> bool:
    """Whether launch hooks are set, as a profiler does."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return bool(kernel.pre_run_hooks)


def _several(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    # of one position itemgetter gives no tuple
    return itemgetter(*positions, positions[-1]) if positions else lambda _: ()


def _plan(kernel: Any, arguments: tuple[Any, ...]) -> Plan:
    whole = [place for place, value in enumerate(arguments) if isinstance(value, int)]
    looked_at = [place for place in whole if not kernel.params[place].do_not_specialize]
    return _plans.setdefault(id(kernel), Plan(kernel, whole[0], _several(whole), _several(looked_at)))


def _hold(
    key: tuple[Any, ...],
    kernel: Any,
    compiled: Any,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    use: Configuration,
) -> None:
    """Keep a compiled kernel, if it is what this module takes it for; else Triton goes on launching it."""
    names = kernel.arg_names[len(arguments) :]
    given = {**use.constants, **constants}
    run, function, metadata = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
    if run is None or function is None or metadata is None or set(names) != set(given):
        return
    _held[key] = Held(run, function, metadata, tuple(given[name] for name in names), (kernel, use, compiled))
