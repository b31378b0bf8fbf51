"""Builds csrc/*.cpp into spectral_kernels/_C.so and, where there is an nvcc, csrc/*.cu into _C_cuda.so: each one library
for every Python 3 and, through PyTorch's stable ABI, every torch from 2.11 on. The package's metadata is in pyproject.toml.

What cannot be built never fails the install: the package then runs on its other backends, and
`python -m spectral_kernels.info` says why. A build in place (`pip install --editable .`, `build_ext --inplace`) that fails
keeps the library of an earlier one, and info says that too; a wheel is never packed with it. An sdist holds what git
tracks, nothing else; a wheel holds the package's modules as they lie there. Environment variables:

SPECTRAL_KERNELS_BUILD     "0" builds no library and removes an earlier one; "require" makes a C++ library that cannot be
                           built an error.
SPECTRAL_KERNELS_CUDA      the same for the CUDA library.
SPECTRAL_KERNELS_SANITIZE  such as "address,undefined": compiles the C++ with -fsanitize=, and no CUDA.
CXX, NVCC, MAX_JOBS        the compilers; how many of them run at a time, as many as there are cores where it is no number.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"spectral_kernels builds with setuptools 77 or newer, found {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from toolchain import PTX, CudaToolchain, NotBuilt, Toolchain, find_compiler, find_cuda, find_torch, jobs, run

OLDEST_TORCH = (2, 11)
FLAGS = [
    "-std=c++20",
    "-O3",
    # or no loop with a square root is vectorised
    "-fno-math-errno",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
]
X86_FLAGS = ["-DSPECTRAL_KERNELS_X86"]
# by the end of a file's name; every other file runs on any x86-64
ISA_FLAGS = {
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "_avx2": ["-mavx2", "-mfma"],
}

CUDA_FLAGS = [
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",
    # what is said of torch's own headers
    "-diag-suppress=20013,20015",
    FLAGS[-1],
]

NOT_FINISHED = {"built": False, "reason": "no build of it came to its end"}
# a library that lies there without a description
UNKNOWN = {"built": True, "compiler": "unknown", "torch": "unknown", "flags": [], "isa_flags": {}, "architectures": []}


def find_toolchain() -> Toolchain:
    """Raises NotBuilt when something is missing."""
    if not sys.platform.startswith("linux"):
        raise NotBuilt(f"the library is built on Linux only, this is {sys.platform}")
    torch_folder, torch_version = find_torch(OLDEST_TORCH)
    compiler, compiler_version = find_compiler()
    flags = list(FLAGS)
    if is_x86():
        flags += X86_FLAGS
    sanitize = os.environ.get("SPECTRAL_KERNELS_SANITIZE", "")
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
    return Toolchain(compiler, compiler_version, torch_folder, torch_version, tuple(flags), sanitize)


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def find_sources() -> list[Path]:
    """csrc/*.cpp that this processor's family can run; emulation.cpp is a module of the tests."""
    sources = sorted(path for path in (ROOT / "csrc").glob("*.cpp") if path.stem != "emulation")
    if not is_x86():
        sources = [path for path in sources if not path.stem.endswith(tuple(ISA_FLAGS))]
    if not sources:
        raise NotBuilt("csrc holds no C++ sources")
    return sources


def isa_flags(source: Path) -> list[str]:
    return next((flags for ending, flags in ISA_FLAGS.items() if source.stem.endswith(ending)), [])


def cuda_command(source: Path, tools: Toolchain, cuda: CudaToolchain, architectures: tuple[str, ...]) -> list[str]:
    """nvcc's command without its output; an architecture "90" is a cubin, "ptx90" what newer ones translate."""
    code = []
    for name in architectures:
        virtual = name.removeprefix("ptx")
        code += ["-gencode", f"arch=compute_{virtual},code={'sm_' if virtual == name else 'compute_'}{virtual}"]
    command = [cuda.nvcc, *CUDA_FLAGS, *code, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    if "CXX" in os.environ:
        command += ["-ccbin", tools.compiler[0]]
    return [*command, "-isystem", str(tools.torch_folder / "include"), "-c", str(source.relative_to(ROOT))]


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[Path]:
    """A name beside `path`, renamed when whole: builds may run at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def is_current(built: Path, depends: Path) -> bool:
    """Whether no file that the compiler read for `built` has changed since."""
    if not built.is_file() or not depends.is_file():
        return False
    _, _, names = depends.read_text(encoding="utf-8", errors="replace").replace("\\\n", " ").partition(":")
    built_at = built.stat().st_mtime_ns
    read = [ROOT / name for name in names.split()]
    return bool(read) and all(path.is_file() and path.stat().st_mtime_ns < built_at for path in read)


def compile_source(source: Path, folder: Path, tools: Toolchain, cuda: CudaToolchain | None) -> Path:
    built, depends = folder / f"{source.stem}.o", folder / f"{source.stem}.d"
    if is_current(built, depends):
        return built
    include = tools.torch_folder / "include"
    # what torch's checks say of a file must not name the machine that built it
    maps = [f"-ffile-prefix-map={include}=torch/include", f"-ffile-prefix-map={ROOT}=."]
    if cuda is None:
        command = [*tools.compiler, *tools.flags, *isa_flags(source), f"-isystem{include}", *maps]
        command += ["-c", str(source.relative_to(ROOT))]
    else:
        command = cuda_command(source, tools, cuda, (*cuda.architectures, f"ptx{PTX}"))
        command += [part for prefix in maps for part in ("-Xcompiler", prefix)]
    with written_to(built) as new:
        started = time.time_ns()
        run([*command, "-MMD", "-MF", str(depends), "-o", str(new)], f"csrc/{source.name} does not compile")
        os.utime(new, ns=(started, started))  # a file edited while it was compiled is newer
    return built


def objects_of(sources: list[Path], base: Path, key: Any, tools: Toolchain, cuda: CudaToolchain | None) -> list[str]:
    """Compile what has changed."""
    folder = base / f"objects-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    with ThreadPoolExecutor(jobs()) as pool:
        return [str(path) for path in pool.map(lambda source: compile_source(source, folder, tools, cuda), sources)]


def link(target: Path, objects: list[str], tools: Toolchain, more: list[str]) -> None:
    # no rpath: torch is imported, and so its libraries loaded, before this one
    command = [*tools.compiler, "-shared", *tools.flags, *objects]
    command += [f"-L{tools.torch_folder / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10", *more]
    if not tools.sanitize:
        command += ["-Wl,--no-undefined"]
    with written_to(target) as new:
        run([*command, "-o", str(new)], "the library does not link")


def build_library(target: Path, base: Path, tools: Toolchain) -> dict[str, Any]:
    link(target, objects_of(find_sources(), base, (tools, ISA_FLAGS), tools, None), tools, [])
    isas = {ending.removeprefix("_"): flags for ending, flags in ISA_FLAGS.items()} if is_x86() else {}
    return {
        "built": True,
        "compiler": tools.compiler_version,
        "torch": tools.torch_version,
        "flags": list(tools.flags),
        "isa_flags": isas,
    }


def build_cuda_library(target: Path, base: Path, tools: Toolchain) -> dict[str, Any]:
    if tools.sanitize:
        raise NotBuilt("SPECTRAL_KERNELS_SANITIZE was set when the package was built")
    cuda = find_cuda()
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    objects = objects_of(sources, base, (tools, cuda, CUDA_FLAGS, PTX), tools, cuda)
    # the runtime is linked in: the library loads whatever CUDA torch brings
    runtime = [f"-L{cuda.library_folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link(target, objects, tools, runtime)
    return {
        "built": True,
        "compiler": cuda.version,
        "torch": tools.torch_version,
        "architectures": [*(f"sm_{name}" for name in cuda.architectures), f"compute_{PTX}"],
    }


def tell(what: str) -> None:
    print(f"spectral_kernels: {what}", file=sys.stderr, flush=True)


def told_of(told: Any) -> dict[str, Any]:
    """What an earlier build said of a library, if that can be made out."""
    return told if isinstance(told, dict) and isinstance(told.get("built"), bool) else NOT_FINISHED


def try_build(
    target: Path,
    base: Path,
    variable: str,
    what: str,
    make: Callable[[Path, Path, Toolchain], dict[str, Any]],
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """Build and describe a library. Where that fails, say why there is none, or why an earlier build's is still there.

    Objects are kept under `base`. `earlier` describes the library that may lie at `target`; None, or "0" in the variable,
    removes it.
    """
    wish = os.environ.get(variable, "1")
    if wish not in ("0", "1", "require"):
        raise SystemExit(f"{variable} must be 0, 1 or require, got {wish!r}")
    try:
        if wish == "0":
            raise NotBuilt(f"{variable}=0 was set when the package was built")
        return make(target, base, find_toolchain())
    except Exception as error:  # whatever it is, the package is installed
        said = str(error) if isinstance(error, NotBuilt) else f"{type(error).__name__}: {error}"
    reason = " ".join(said.encode(errors="backslashreplace").decode().split())
    if wish == "0" or earlier is None:
        with contextlib.suppress(OSError):
            target.unlink()
    if target.is_file():
        tell(f"{what} library kept from an earlier build: {reason}")
        known = {name: told for name, told in (earlier or {}).items() if isinstance(told, type(UNKNOWN.get(name)))}
        return UNKNOWN | known | {"built": True, "kept": reason}
    tell(f"no {what} library: {reason}")
    return {"built": False, "reason": reason}


def stop_if_required(variable: str, described: dict[str, Any]) -> None:
    if os.environ.get(variable) == "require" and (not described["built"] or "kept" in described):
        raise SystemExit(f"spectral_kernels: {variable}=require, giving up")


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@functools.cache
def elsewhere() -> str:
    """A folder for what cannot be written in the source tree, removed when Python ends."""
    folder = tempfile.mkdtemp(prefix="spectral_kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tell(f"{ROOT} or its build folder cannot be written: building in {folder}")
    return folder


class BuildAnywhere(build):
    def finalize_options(self) -> None:
        base = ROOT / self.build_base
        if not all(map(is_writable, (base, *base.glob("*/")))):
            self.build_base = elsewhere()
        super().finalize_options()


class DescribeAnywhere(egg_info):
    def finalize_options(self) -> None:
        if self.egg_base is None and not is_writable(ROOT / "spectral_kernels.egg-info"):
            self.egg_base = elsewhere()
        super().finalize_options()


class BuildLibrary(build_ext):
    """Builds the libraries and _build_info.json in place of a Python extension module."""

    def folders(self) -> Iterator[Path]:
        yield Path(self.build_lib) / "spectral_kernels"
        if self.inplace:
            yield ROOT / "spectral_kernels"

    def run(self) -> None:
        *_, folder = self.folders()
        base = ROOT / self.get_finalized_command("build").build_base
        path = folder / "_build_info.json"
        try:
            told = told_of(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            told = NOT_FINISHED
        earlier_cuda = told_of(told.get("cuda"))

        def write(info: dict[str, Any]) -> None:
            try:
                with written_to(path) as new:
                    new.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                tell(f"how the libraries were built is not written down: {error}")

        # the package's own folder keeps its libraries; what a wheel is packed from is no place for older ones
        def make(name: str, earlier: dict[str, Any], *how: Any) -> dict[str, Any]:
            return try_build(folder / name, base, *how, earlier if self.inplace else None)

        info = make("_C.so", told, "SPECTRAL_KERNELS_BUILD", "C++", build_library)
        # written at once, so that no file lacks its description when the next step stops or fails
        write(info | {"cuda": earlier_cuda})
        stop_if_required("SPECTRAL_KERNELS_BUILD", info)
        cuda = make("_C_cuda.so", earlier_cuda, "SPECTRAL_KERNELS_CUDA", "CUDA", build_cuda_library)
        write(info | {"cuda": cuda})
        stop_if_required("SPECTRAL_KERNELS_CUDA", cuda)

    def library_was_built(self) -> bool:
        return any((folder / name).is_file() for folder in self.folders() for name in ("_C.so", "_C_cuda.so"))

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "spectral_kernels"
        return [str(folder / name) for name in ("_C.so", "_C_cuda.so", "_build_info.json") if (folder / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class TaggedWheel(bdist_wheel):
    """py3-none-<platform> with the library, which any Python 3 loads; py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").library_was_built()
        return "py3", "none", super().get_tag()[2] if built else "any"


def tracked_files() -> list[str]:
    """What git tracks here; without that list there is no sdist."""
    # a hook of another repository sets these
    others = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in others}
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, env=environment, capture_output=True, check=False)
        tracked, said = os.fsdecode(done.stdout), done.stderr.decode(errors="replace").strip()
    except OSError as error:
        tracked, said = "", str(error)
    names = set(tracked.split("\0")) - {""}
    if "setup.py" not in names:
        said = " ".join(said.split()) or "it tracks nothing here"
        raise SystemExit(f"spectral_kernels: no sdist: it is made of what git tracks, and git says: {said}")
    missing = sorted(name for name in names if not (ROOT / name).is_file())
    if missing:
        raise SystemExit(f"spectral_kernels: no sdist: git tracks {missing[0]}, which is not there")
    return sorted(names)


class TrackedSdist(sdist):
    """What git tracks and PKG-INFO, whatever else lies around."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        if os.path.lexists(base_dir):
            raise SystemExit(f"spectral_kernels: no sdist: {base_dir} is in the way, remove it")
        super().make_release_tree(base_dir, tracked_files())


# bench/aot.py imports the toolchain
if __name__ == "__main__":
    setup(
        ext_modules=[Extension("spectral_kernels._C", sources=[])],
        cmdclass={
            "bdist_wheel": TaggedWheel,
            "build": BuildAnywhere,
            "build_ext": BuildLibrary,
            "egg_info": DescribeAnywhere,
            "sdist": TrackedSdist,
        },
    )
