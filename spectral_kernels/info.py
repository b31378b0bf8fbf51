"""What is installed, what was built against what, and which backend each op would use.

`python -m spectral_kernels.info` reports what it finds and never raises; `collect` returns it as plain types.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import spectral_kernels
from spectral_kernels.dispatch import backends
from spectral_kernels.dispatch.backends import found as _found

# what the op tests run under, oldest first: the pins of requirements/torch-oldest.txt, torch.txt and torch-newest.txt
TESTED_TORCH = ("2.11.0", "2.13.0", "2.14.1")

_BUILD_INFO = Path(__file__).with_name("_build_info.json")
# what a build writes of each library
_CPP_FIELDS: dict[str, Any] = {"compiler": "unknown", "torch": "unknown", "flags": [], "isa_flags": {}}
_CUDA_FIELDS: dict[str, Any] = {"compiler": "unknown", "torch": "unknown", "architectures": []}
_TRAINING_MODULES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm", "yaml": "PyYAML"}
_VARIABLES = (
    "SPECTRAL_KERNELS_BACKEND",
    "SPECTRAL_KERNELS_CPU_PATH",
    "SPECTRAL_KERNELS_DATA",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)


def _attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or its error as text: a report on a broken set-up must come through."""
    try:
        return function()
    except Exception as error:  # whatever is broken here is what the report is for
        return f"cannot be told ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    return {
        "spectral_kernels": spectral_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tested under torch": ", ".join(TESTED_TORCH),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
    }


def _library() -> dict[str, Any]:
    """How _C.so and _C_cuda.so were built, or why they were not, and whether they are loaded."""
    problem = f"{_BUILD_INFO.name} is not what a build writes"
    build: Any = None
    try:
        build = json.loads(_BUILD_INFO.read_bytes())
    except FileNotFoundError:
        build = {"built": False, "reason": "the package runs from its source folder and was never built"}
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{_BUILD_INFO.name} cannot be read ({type(error).__name__}: {error})"
    cuda = None
    if isinstance(build, dict):
        # a library built before there was a CUDA one does not tell of it
        cuda = build.pop("cuda", {"built": False, "reason": build.get("reason", "the package was built without it")})
    return {
        **_described(build, _CPP_FIELDS, _BUILD_INFO.with_name("_C.so"), problem),
        "loaded": backends.CPP_ERROR is None,
        "error": backends.CPP_ERROR,
        "cuda": {
            **_described(cuda, _CUDA_FIELDS, _BUILD_INFO.with_name("_C_cuda.so"), problem),
            "loaded": backends.CUDA_ERROR is None,
            "error": backends.CUDA_ERROR,
        },
    }


def _described(told: Any, fields: dict[str, Any], library: Path, problem: str) -> dict[str, Any]:
    """What a build told of a library; where that is broken, the problem and whether the library is there."""
    if isinstance(told, dict):
        wanted = fields if told.get("built") is True else {"built": False, "reason": ""}
        if all(isinstance(told.get(name), type(value)) for name, value in wanted.items()):
            return told
    return {**fields, "built": library.exists(), "reason": problem}


def _cpu() -> dict[str, Any]:
    cpu: dict[str, Any] = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    if backends.CPP_ERROR is None:
        operators = torch.ops.spectral_kernels_cpp
        cpu["path"] = _attempt(lambda: operators.cpu_path())
        # more slices than threads, so that a library without OpenMP is seen
        cpu["threads_used"] = _attempt(lambda: operators.parallel_threads(4 * torch.get_num_threads()))
    return cpu


def _gpu() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        # on ROCm the numbers of an sm are made up
        kind = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
        devices.append(f"{properties.name}, {kind}")
    others = [name for name in ("mps", "xpu") if hasattr(torch, name) and getattr(torch, name).is_available()]
    return {"cuda": torch.version.cuda, "rocm": torch.version.hip, "devices": devices, "others": others}


def _op(name: str, device_type: str) -> dict[str, Any]:
    """Backends of an op on a device type, and the one it would use now."""
    reasons = {backend: backends.why_unavailable(backend, name, device_type) for backend in backends.BACKENDS}
    try:
        used: str | None = backends.choose(name, torch.device(device_type), warn=False)
        problem = None
    except backends.BackendError as error:
        used, problem = None, str(error)
    return {
        "uses": used,
        "problem": problem,
        "available": [backend for backend, reason in reasons.items() if reason is None],
        "unavailable": {backend: reason for backend, reason in reasons.items() if reason is not None},
    }


def _ops() -> dict[str, Any]:
    """By op, then device type; a backward runs on the backend of its forward and is not listed apart."""
    names = sorted(name for name in backends.OPS if not name.endswith("_backward"))
    return {name: {device: _op(name, device) for device in ("cpu", "cuda")} for name in names}


def _training() -> dict[str, bool]:
    """Package of the `train` extra -> whether it is installed."""
    return {package: _found(name) for name, package in _TRAINING_MODULES.items()}


def collect() -> dict[str, Any]:
    """Everything that the report says.

    Returns:
        Plain types under versions, library, cpu, gpu, environment, ops and training. A section that cannot be
        told is a text that says why.
    """
    sections = {
        "versions": _versions,
        "library": _library,
        "cpu": _cpu,
        "gpu": _gpu,
        "environment": lambda: {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "ops": _ops,
        "training": _training,
    }
    return {name: _attempt(section) for name, section in sections.items()}


# --- the report ---------------------------------------------------------------------------------------------


def _section_libraries(library: dict[str, Any]) -> Iterator[str]:
    yield from _section_library(library)
    yield ""
    yield "CUDA library (backend cuda)"
    yield from _section_library(library["cuda"], cuda=True)


def _section_library(library: dict[str, Any], *, cuda: bool = False) -> Iterator[str]:
    if not library["built"]:
        yield f"  not built: {library['reason']}"
        return
    # the last build failed and left the library of an earlier one, or its description is broken
    if "kept" in library:
        yield f"  KEPT from an earlier build, maybe of other sources; the last one failed: {library['kept']}"
    if "reason" in library:
        yield f"  how it was built is not known: {library['reason']}"
    made_for = f" for {', '.join(map(str, library['architectures']))}" if cuda else ""
    yield f"  built with {library['compiler']}{made_for}"
    yield f"  against    torch {library['torch']}; for any Python 3 and torch {TESTED_TORCH[0]} or newer"
    if not cuda:
        yield f"  flags      {' '.join(map(str, library['flags']))}"
        for isa, flags in library["isa_flags"].items():
            yield f"  {isa + ' files':<15} {' '.join(map(str, flags))}"
    not_loaded = "not loaded" if cuda else "NOT LOADED"
    yield "  loaded" if library["loaded"] else f"  {not_loaded}: {library['error']}"


def _section_cpu(cpu: dict[str, Any]) -> Iterator[str]:
    yield f"  {cpu['machine']}, {cpu['threads']} threads"
    if "path" in cpu:
        yield f"  C++ runs its {cpu['path']} kernels, on {cpu['threads_used']} of them"


def _section_gpu(gpu: dict[str, Any]) -> Iterator[str]:
    if gpu["rocm"]:
        yield f"  torch is built for ROCm {gpu['rocm']}; its devices are called CUDA devices"
    elif gpu["cuda"]:
        yield f"  torch is built for CUDA {gpu['cuda']}"
    else:
        yield "  torch is built without CUDA"
    yield from (f"  {index}: {device}" for index, device in enumerate(gpu["devices"]))
    if (gpu["rocm"] or gpu["cuda"]) and not gpu["devices"]:
        yield "  no device"
    for name in gpu["others"]:
        lacks = "; ops that compute in float64 refuse it" if name == "mps" else ""
        yield f"  {name}: ops run as plain PyTorch (backend reference){lacks}"


def _section_ops(ops: dict[str, Any]) -> Iterator[str]:
    width = max(map(len, ops), default=0) + 2
    yield f"  {'':<{width}}{'on the CPU':<28}on a CUDA device"
    for name, devices in ops.items():
        cells = []
        for device in devices.values():
            others = [backend for backend in device["available"] if backend != device["uses"]]
            cells.append((device["uses"] or "refused") + (f" ({', '.join(others)})" if others else ""))
        yield f"  {name:<{width}}{cells[0]:<28}{cells[1]}"
    for devices in ops.values():
        yield from (f"  refused: {device['problem']}" for device in devices.values() if device["problem"])
    yield "  A gradient runs on the backend of its op."
    for shared in sorted(set(backends.SHARED.values())):
        names = sorted(name for name, found in backends.SHARED.items() if found == shared)
        yield f"  The reference's code (torch) runs on {', '.join(shared)} too: {', '.join(names)}"


def _advice(info: dict[str, Any]) -> Iterator[str]:
    """What to do to get the backends that are missing."""
    library, gpu, training = info["library"], info["gpu"], info["training"]
    if isinstance(library, dict) and not library["loaded"]:
        if sys.platform.startswith("linux"):
            yield f"cpp: C++, the fast path on the CPU. With torch {TESTED_TORCH[0]} or newer and a compiler there,"
            yield "  in the project's folder:"
            yield "    pip install 'setuptools>=77'"
            yield "    pip install --no-build-isolation --no-deps --force-reinstall ."
        else:
            yield f"cpp: C++, the fast path on the CPU, is built on Linux only; this is {sys.platform}. Ops run on reference."
    if not _found("triton"):
        yield f"triton: the fast path on an NVIDIA GPU: {backends.how_to_get_triton()}"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        yield "triton on the CPU: interpreted, slow, for tests; set TRITON_INTERPRET=1 before Python starts."
    if isinstance(gpu, dict) and gpu["rocm"]:
        yield "ROCm: nothing here has run on it. Ops run on reference; backend='triton' tries the kernels."
    elif isinstance(gpu, dict) and not gpu["devices"] and sys.platform != "darwin":
        if gpu["cuda"] is None:
            yield "CUDA: this torch has no CUDA: on a machine with an NVIDIA GPU, install a CUDA build (pytorch.org says how)."
        else:
            yield "CUDA: torch sees no device: look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES."
    if isinstance(training, dict) and not all(training.values()):
        missing = " ".join(package for package, there in training.items() if not there)
        yield f"spectral-kernels train and compare: pip install {missing}"


def report(info: dict[str, Any]) -> Iterator[str]:
    """The lines of the report on what `collect` returned."""

    def section(title: str, key: str, lines: Callable[[dict[str, Any]], Iterator[str]]) -> Iterator[str]:
        yield title
        value = info[key]
        # a section that could not be told is a text, and so are lines of what makes no sense
        told = _attempt(lambda: list(lines(value))) if isinstance(value, dict) else value
        yield from told if isinstance(told, list) else (f"  {told}",)
        yield ""

    def pairs(values: dict[str, Any]) -> Iterator[str]:
        yield from (f"  {name:<26}{value or 'not installed'}" for name, value in values.items())

    yield from section("Versions", "versions", pairs)
    yield from section("C++ library (backend cpp)", "library", _section_libraries)
    yield from section("CPU", "cpu", _section_cpu)
    yield from section("GPU", "gpu", _section_gpu)
    if info["environment"]:
        yield from section("Environment", "environment", pairs)
    yield from section("Backend that each op uses (others that backend= can force)", "ops", _section_ops)
    advice = list(_advice(info))
    yield "What is missing, and how to get it" if advice else "Nothing is missing."
    yield from (f"  {line}" for line in advice)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; `--json` prints what `collect` returns. Returns the exit status, 0."""
    parser = argparse.ArgumentParser(
        prog="python -m spectral_kernels.info",
        description="What is installed, what was built against what, and which backend each op would use.",
    )
    parser.add_argument("--json", action="store_true", help="for a program to read")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else "\n".join(report(info)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
