"""Builds `csrc/emulation.cpp`, the bodies of the CUDA kernels on the host, into `build/`."""

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# shared memory of a block of the larger GPUs
CHIP_LIMIT = 227 * 1024
# read at run time by `make check`: the sanitizer's library must then be loaded before Python
SANITIZE = "SPECTRAL_KERNELS_SANITIZE"


def load_emulation() -> ModuleType:
    """The module, compiled when its sources have changed."""
    csrc = ROOT / "csrc"
    sources = [csrc / name for name in ("emulation.cpp", "emulation.h", "device.h", "greedy_key.h")]
    sources += sorted(csrc.glob("*_cuda.h"))
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    sanitize = os.environ.get(SANITIZE)
    flags = [*FLAGS, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
        # said of pybind11, and only with a sanitizer
        flags += ["-Wno-error=maybe-uninitialized"]
    key = hashlib.sha256(repr((compiler, flags, [path.read_bytes() for path in sources])).encode()).hexdigest()[:12]
    built = ROOT / "build" / f"emulation-{key}" / "emulation.so"
    if not built.is_file():
        built.parent.mkdir(parents=True, exist_ok=True)
        new = built.with_name(f".{os.getpid()}.so")
        done = subprocess.run(
            [*compiler, *flags, str(csrc / "emulation.cpp"), "-o", str(new)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        new.replace(built)
    spec = importlib.util.spec_from_file_location("emulation", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
