"""The way to a GPU's driver, told without one: no answer is waited for, and compiled kernels are launched as Triton would."""

from typing import Any

import pytest
import torch
from launch_helpers import CALLS, meta
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_kernels.kernels import launch
from spectral_kernels.kernels.launch import Configuration, recording
from spectral_kernels.kernels.precision import split_float
from spectral_kernels.ops.whitening import triton as whitening

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "linalg_eigh", "item")


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU: where it reads a value, or copies to the CPU."""

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indexed = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        to_cpu = name in ("_to_copy", "copy_") and torch.device((kwargs or {}).get("device") or "meta").type == "cpu"
        if any(name.startswith(wait) for wait in WAITS) or indexed or to_cpu:
            raise AssertionError(f"{function} waits for the GPU")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_no_op_waits(name: str) -> None:
    with recording(), NoWaiting():
        CALLS[name](2, 300, 128)
        CALLS[name](2, 100, 256)


def test_whitening_waits_only_where_it_must() -> None:
    """Methods that look at their result, and a shrinkage that rounding could take away."""
    with recording(), NoWaiting():
        whitening.whiten(meta(1, 4096, 128), "cholesky", 1e-4, True)
        for method, shrinkage in (("cholesky", 0.0), ("zca", 1e-4)):
            with pytest.raises(AssertionError, match="waits"):
                whitening.whiten(meta(1, 4096, 128), method, shrinkage, True)


def test_float32_pairs() -> None:
    for value in (0.1, 1 / 3, -2.5, 0.0, 1e-3, 7e37):
        high, low = split_float(value)
        assert high == float(torch.tensor(value, dtype=torch.float64).float())
        assert high + low == value
    assert split_float(1e300) == (float("inf"), 0.0)
    assert split_float(float("-inf")) == (float("-inf"), 0.0)


class Compiled:
    """Stands for Triton's compiled kernel."""

    function, packed_metadata = 17, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.launches.append(arguments)


class Parameter:
    def __init__(self, looked_at: bool) -> None:
        self.do_not_specialize = not looked_at


class Kernel:
    """Stands for a `triton.JITFunction` of (x, y, n, d, factor, BLOCK, FLAG), which looks at d."""

    arg_names = ("x", "y", "n", "d", "factor", "BLOCK", "FLAG")
    params = tuple(Parameter(name == "d") for name in arg_names)

    def __init__(self) -> None:
        self.pre_run_hooks: list[Any] = []
        self.compiled: list[Compiled] = []
        self.through_triton = 0

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Compiled:
            assert constants == {"BLOCK": 64, "FLAG": constants["FLAG"], "num_warps": 4, "num_stages": 2}
            self.through_triton += 1
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


USE = Configuration({"BLOCK": 64})


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "current_device", lambda: -1)
    monkeypatch.setattr(launch, "current_stream", lambda device: 99)
    monkeypatch.setattr(launch, "_held", {})
    monkeypatch.setattr(launch, "_plans", {})
    return Kernel()


def run(kernel: Kernel, x: Tensor, y: Tensor | None, n: int = 5, d: int = 32, flag: bool = True) -> None:
    launch.launch_directly(kernel, 7, (x, y, n, d, 0.5), {"FLAG": flag}, USE)


def test_a_second_launch_goes_past_triton(kernel: Kernel) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    run(kernel, x, y, n=5)
    run(kernel, x, y, n=6)
    run(kernel, x, y, n=16)
    assert kernel.through_triton == 1
    given = (7, 1, 1, 99, 17, (4, 1, 0), None, None, None, x.data_ptr(), y.data_ptr())
    assert kernel.compiled[0].launches == [(*given, n, 32, 0.5, 64, True) for n in (6, 16)]


def test_what_triton_tells_apart_is_told_apart(kernel: Kernel) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    calls = (
        lambda: run(kernel, x, y),
        lambda: run(kernel, x, y, d=33),
        lambda: run(kernel, x, y, d=1),
        lambda: run(kernel, x, None),
        lambda: run(kernel, x.double(), y),
        lambda: run(kernel, x, y, flag=False),
    )
    for count, call in enumerate(calls, 1):
        call()
        assert kernel.through_triton == count
    for call in calls:
        call()
    assert kernel.through_triton == len(calls)
    assert all(len(compiled.launches) == 1 for compiled in kernel.compiled)


def test_what_is_not_told_apart_goes_through_triton(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    run(kernel, x, x)
    run(kernel, x[1:], x)
    run(kernel, x, x, n=2**31)
    kernel.pre_run_hooks.append(print)
    run(kernel, x, x)
    kernel.pre_run_hooks.clear()
    launch.knobs.runtime.launch_enter_hook.add(print)
    try:
        run(kernel, x, x)
    finally:
        launch.knobs.runtime.launch_enter_hook.remove(print)
    monkeypatch.setattr(launch, "DIRECT", False)
    run(kernel, x, x)
    assert kernel.through_triton == 6
    assert not any(compiled.launches for compiled in kernel.compiled)


def test_an_unknown_compiled_kernel_is_not_held(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Compiled, "packed_metadata")
    x = torch.zeros(64)
    run(kernel, x, x)
    run(kernel, x, x)
    assert kernel.through_triton == 2
