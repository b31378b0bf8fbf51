"""Builds `csrc/emulation.cpp`, the bodies of the CUDA kernels on the host, into `build/`."""

import functools
import hashlib
import os
import shlex
import subprocess
import sysconfig
from types import ModuleType
from typing import Any

import pybind11
import torch
from process_helpers import ROOT, module_of
from torch import Tensor

FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# shared memory of a block of the larger GPUs
CHIP_LIMIT = 227 * 1024
# read at run time by `make check`: the sanitizer's library must then be loaded before Python
SANITIZE = "SPECTRAL_KERNELS_SANITIZE"


@functools.cache
def load_emulation() -> ModuleType:
    """The CUDA kernels' own code, to be run thread by thread on the host; compiled when its sources have changed."""
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
    module: ModuleType = module_of(built, "emulation")
    return module


def chip_select(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, seed: Tensor, k: int,
    objective: str = "effective_rank", normalize: bool = True, *, multiprocessors: int = 3, limit: int = CHIP_LIMIT,
    descending: bool = False, words: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:  # fmt: skip
    """csrc/greedy_cuda.h's indices, ranks and objectives, and its plan: pools at a time, CTAs of each, whether by draw, rows
    kept. Threads run in either order; into `words` goes what they note of bad data.
    """
    *found, plan = load_emulation().greedy_select(
        pool.numpy(), start.numpy(), *(None if part is None else part.numpy() for part in (draws, valid)), seed.numpy(), k,
        objective == "logdet", normalize, multiprocessors, limit, descending,
        **({} if words is None else {"words": words.numpy()}),
    )  # fmt: skip
    return tuple(torch.from_numpy(part) for part in found), plan
