"""What an environment lacks is told truthfully, and what can run there runs: other platforms, by what torch says of them."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from process_helpers import run_python

import spectral_kernels as sk
from spectral_kernels import info
from spectral_kernels.dispatch import backends

CPU, CUDA, MPS, XPU = (torch.device(kind) for kind in ("cpu", "cuda", "mps", "xpu"))

# every op on a CPU without Triton, the C++ library or torch.distributed, whatever the environment has
WITHOUT = """
import importlib.machinery, sys, warnings

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in ("triton", *BLOCKED):
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
import torch
torch.distributed.is_available = lambda: False
from pathlib import Path
exists = Path.exists
Path.exists = lambda self: self.suffix != ".so" and exists(self)
import spectral_kernels as sk
from spectral_kernels import info
import spectral_kernels.cli
Path.exists = exists
assert "was not built" in sk.dispatch.backends.CPP_ERROR
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    z = torch.randn(64, 8, requires_grad=True)
    for backend in (None, "reference"):
        sk.covariance(z, backend=backend)
        for order in (0, 1, 2, 3):
            sk.effective_rank(z, order=order, backend=backend)
        sk.spectrum(z, backend=backend)
        sk.batch_effective_rank(z, torch.arange(16).reshape(2, 8), backend=backend)
        for method in ("cholesky", "zca", "newton_schulz"):
            sk.whiten(z, method=method, backend=backend).sum().backward()
        sk.greedy_select(z, 4, backend=backend)
        sk.nt_xent(z, z, backend=backend).backward()
        sk.info_nce(z, z, queue=z.detach(), backend=backend).backward()
        sk.info_nce_grad_norms(z, z, backend=backend)
    sk.gradient_band(z, z)
    sk.effective_rank_error(z)
    bank = sk.MemoryBank(64, 8)
    bank.update(torch.arange(64), z)
    assert sum(map(len, sk.GreedyBatchSampler(bank, 8))) == 64
said = [str(one.message) for one in caught if issubclass(one.category, sk.BackendWarning)]
assert len(said) == 1, said
assert "times slower than C++" in said[0] and "was not built" in said[0] and "spectral_kernels.info" in said[0]
report = "\\n".join(info.report(info.collect()))
assert "triton is not installed" not in report and "pip install triton" in report, report
for backend in ("cpp", "triton", "cuda"):
    try:
        sk.spectrum(z, backend=backend)
    except sk.BackendError as error:
        print(error)
    else:
        raise AssertionError(backend)
try:
    import spectral_kernels.distributed
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "blocked", ["()", "('matplotlib', 'sklearn', 'yaml', 'tqdm', 'safetensors')"], ids=["triton", "all"]
)
def test_everything_runs_on_torch_alone(blocked: str) -> None:
    code = WITHOUT.replace("BLOCKED", blocked)
    if blocked != "()":
        code = code.replace("import spectral_kernels.cli\n", "")
    cpp, triton, cuda, distributed = run_python("-c", code).stdout.splitlines()
    assert "backend 'cpp' cannot run spectrum: the C++ library was not built" in cpp
    assert "triton is not installed" in triton and "cuda needs CUDA tensors, got cpu" in cuda
    assert distributed.endswith("needs torch.distributed, which this torch is built without")


def test_a_forced_reference_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CPP_ERROR", "not there")
    monkeypatch.setattr(backends, "_slow_said", False)
    z = torch.randn(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.covariance(z, backend="reference")
        with sk.use_backend("reference"):
            sk.effective_rank(z)
        info.collect()
        # torch's on every backend
        assert backends.choose("spectrum_backward", CPU) == "reference"
    with pytest.warns(backends.BackendWarning, match=r"^covariance .* 2 to 30 times .*: not there\. "):
        sk.covariance(z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.effective_rank(z)


def platform(monkeypatch: pytest.MonkeyPatch, system: str, hip: str | None = None, cuda: str | None = None) -> None:
    """Torch and Python as they describe themselves there."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(backends, "_LINUX", system == "linux")
    monkeypatch.setattr(backends, "_ROCM", backends.why_not_rocm())
    monkeypatch.setattr(backends, "CPP_ERROR", backends._load(Path("nothing"), "C++"))
    monkeypatch.setattr(backends, "CUDA_ERROR", backends._why_no_cuda() or backends._load(Path("nothing"), "CUDA"))
    monkeypatch.setattr(backends, "_slow_said", False)
    monkeypatch.setattr(info, "_BUILD_INFO", Path("nothing"))


def report() -> str:
    return "\n".join(info.report(info.collect()))


def test_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, "linux", hip="7.0")
    with pytest.warns(backends.BackendWarning, match="have not been tried on ROCm"):
        assert backends.choose("covariance", CUDA) == "reference"
    assert backends.choose("covariance", CUDA, "triton") == "triton"
    with pytest.raises(sk.BackendError, match=r"this torch is built for ROCm 7\.0"):
        backends.choose("spectrum", CUDA, "cuda")
    text = report()
    assert "torch is built for ROCm 7.0" in text
    for wrong in ("CPU only", "without CUDA", "no CUDA", "CUDA build", "nvidia-smi"):
        assert wrong not in text


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_macos_and_windows(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, system)
    monkeypatch.setattr(backends, "_TRITON_FOUND", False)
    monkeypatch.setattr(info, "_found", lambda module: module != "triton")
    with pytest.raises(sk.BackendError, match=f"the C\\+\\+ library is built on Linux only, this is {system}"):
        backends.choose("covariance", CPU, "cpp")
    with pytest.raises(sk.BackendError, match=f"it has wheels for Linux, this is {system}"):
        backends.choose("covariance", CPU, "triton")
    with pytest.warns(backends.BackendWarning, match="built on Linux only"):
        assert backends.choose("covariance", CPU) == "reference"
    text = report()
    assert "pip install triton" not in text and "--no-build-isolation" not in text
    assert (system == "win32") == ("CUDA build" in text)


@pytest.mark.parametrize("device", [MPS, XPU, torch.device("privateuseone")], ids=str)
def test_other_devices_run_the_reference(device: torch.device) -> None:
    key = {"mps": "MPS", "xpu": "XPU"}.get(device.type, "PrivateUse1")
    for op in backends.OPS:
        assert backends.choose(op, device) == "reference"
        # one that is made of other ops runs where they do
        keys = (key, "CompositeImplicitAutograd")
        assert any(torch._C._dispatch_has_kernel_for_dispatch_key(f"spectral_kernels::{op}", one) for one in keys)
    for backend in ("cpp", "triton", "cuda"):
        with pytest.raises(sk.BackendError, match=rf"needs (CPU|CUDA) tensors, got {device.type}$"):
            backends.choose("spectrum", device, backend)


def test_a_device_without_float64_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS by what torch says there: conversions to float64 raise a TypeError."""
    double = torch.Tensor.double

    def narrow(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if function is double or any(part is torch.float64 for part in (*arguments, *options.values())):
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
                )
            return function(*arguments, **options)

        return call

    for owner, name in ((torch.Tensor, "to"), (torch.Tensor, "double"), (torch, "rand")):
        monkeypatch.setattr(owner, name, narrow(getattr(owner, name)))
    needed = backends.float64_needed
    # tensors here are the CPU's
    for module in list(sys.modules.values()):
        if getattr(module, "float64_needed", None) is needed:
            monkeypatch.setattr(module, "float64_needed", lambda what, device: needed(what, MPS))
    z = torch.randn(32, 4)
    refused = {
        "spectrum": lambda: sk.spectrum(z),
        "whiten": lambda: sk.whiten(z),
        "greedy_select": lambda: sk.greedy_select(z, 4),
        "drawing among valid rows": lambda: sk.greedy_select(z, 4, valid=torch.ones(32, dtype=torch.bool)),
        "effective_rank_error": lambda: sk.effective_rank_error(z),
        "gradient_band": lambda: sk.gradient_band(z, z),
    }
    with sk.use_backend("reference"):
        for result in (sk.covariance(z), sk.effective_rank(z, order=2), sk.nt_xent(z, z), sk.info_nce(z, z)):
            assert bool(result.isfinite().all())
        for name, run in refused.items():
            with pytest.raises(sk.BackendError, match=f"^{name} computes in float64, which mps devices do not have"):
                run()
    with pytest.raises(TypeError, match="unrelated"), needed("op", MPS):
        raise TypeError("unrelated")
    with pytest.raises(TypeError, match="float64"), needed("op", CPU):
        raise TypeError("float64")


def test_a_module_that_cannot_be_looked_for_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name == "triton_like":
                raise ImportError(name)

    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    assert not backends.found("triton_like") and backends.found("torch")
    monkeypatch.setitem(sys.modules, "triton_like", None)
    assert not backends.found("triton_like")
