"""Builds csrc/*.cpp into spectral_kernels/_C.so and, where there is an nvcc, csrc/*.cu into _C_cuda.so: each one library
for every Python 3 and, through PyTorch's stable ABI, every torch from 2.11 on. The package's metadata is in pyproject.toml.

What cannot be built never fails the install: the package then runs on its other backends, and
`python -m spectral_kernels.info` says why. A build in place (`pip install --editable .`, `build_ext --inplace`) that fails
keeps the library of an earlier one, and info says that too; a wheel is never packed with it. Environment variables:

SPECTRAL_KERNELS_BUILD     "0" builds no library and removes an earlier one; "require" makes a C++ library that cannot be
                           built an error.
SPECTRAL_KERNELS_CUDA      the same for the CUDA library.
SPECTRAL_KERNELS_SANITIZE  such as "address,undefined": compiles the C++ with -fsanitize=, and no CUDA.
CXX, NVCC, MAX_JOBS        the compilers; how many of them run at a time.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
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
    "-Wno-unused-parameter",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
]
X86_FLAGS = ["-DSPECTRAL_KERNELS_X86"]
# by the end of a file's name; every other file runs on any x86-64
ISA_FLAGS = {
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "_avx2": ["-mavx2", "-mfma"],
}

# architectures of the cubins, and that of the PTX which newer ones translate for themselves
CUBINS, PTX = ("80", "90", "100"), "90"
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


class NotBuilt(Exception):
    """Why there is no library."""


@dataclass(frozen=True)
class Toolchain:
    """What a library is built with; `flags` are those of every file, without the machine's own paths."""

    compiler: tuple[str, ...]
    compiler_version: str
    torch_folder: Path
    torch_version: str
    flags: tuple[str, ...]
    sanitize: str


@dataclass(frozen=True)
class CudaToolchain:
    """What the CUDA library is built with."""

    nvcc: str
    version: str
    library_folder: Path
    architectures: tuple[str, ...]


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch that this Python sees, not imported: it may be another Python's."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt("there was no torch when it was built (pip hides it unless told --no-build-isolation)")
    folder = Path(spec.origin).parent
    version_file = folder / "version.py"
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    found = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.MULTILINE)
    if found is None:
        raise NotBuilt("the version of the torch that was there when it was built cannot be read")
    if (int(found[2]), int(found[3])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise NotBuilt(f"torch {found[1]} was there when it was built, {oldest} or newer is needed")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise NotBuilt(f"torch {found[1]} was there when it was built, but without its C++ headers")
    return folder, found[1]


def find_compiler() -> tuple[tuple[str, ...], str]:
    """The C++ compiler's command and the first line of its --version."""
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    for command in commands:
        if shutil.which(command[0]) is None:
            continue
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return tuple(command), answer.stdout.splitlines()[0]
    tried = f"CXX={named} does not run" if named else "none of c++, g++ and clang++ was found"
    raise NotBuilt(f"no C++ compiler: {tried}")


def find_toolchain() -> Toolchain:
    """Raises NotBuilt when something is missing."""
    if not sys.platform.startswith("linux"):
        raise NotBuilt(f"the library is built on Linux only, this is {sys.platform}")
    torch_folder, torch_version = find_torch()
    compiler, compiler_version = find_compiler()
    flags = list(FLAGS)
    if is_x86():
        flags += X86_FLAGS
    sanitize = os.environ.get("SPECTRAL_KERNELS_SANITIZE", "")
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
    return Toolchain(compiler, compiler_version, torch_folder, torch_version, tuple(flags), sanitize)


def find_cuda() -> CudaToolchain:
    """Raises NotBuilt when there is no nvcc, or none for any architecture that we build for."""
    named = os.environ.get("NVCC")
    found = shutil.which(named or "nvcc")
    if found is None:
        raise NotBuilt(f"NVCC={named} does not run" if named else "there was no nvcc when it was built")
    # what a launcher elsewhere on PATH runs, by its own account
    answer = subprocess.run([found, "--dryrun", "-x", "cu", "-c", "-"], capture_output=True, text=True, check=False)
    home = re.search(r"^#\$ _HERE_=(.+)$", answer.stderr, re.MULTILINE)
    folder = (Path(home[1]) if home else Path(found).resolve().parent).parent
    libraries = next(
        (folder / name for name in ("lib64", "lib") if (folder / name / "libcudart_static.a").is_file()), None
    )
    if libraries is None:
        raise NotBuilt("nvcc is there, but not the static CUDA runtime (libcudart_static.a)")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+), (V[\d.]+)", said)
    codes = subprocess.run([found, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    architectures = tuple(name for name in CUBINS if f"sm_{name}" in codes)
    if release is None or PTX not in architectures:
        raise NotBuilt(
            f"nvcc does not compile for sm_{PTX}: {said.strip().splitlines()[-1] if said else 'says nothing'}"
        )
    return CudaToolchain(found, f"nvcc {release[1]} ({release[2]})", libraries, architectures)


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


def run(command: list[str], what: str) -> None:
    """Raises NotBuilt with the first error line; everything the compiler says goes to stderr."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotBuilt(f"{what}: {error}") from error
    if done.stderr:
        print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NotBuilt(f"{what}: {errors[0].strip() if errors else f'exit status {done.returncode}'}")


def written_to(path: Path) -> Path:
    """A name beside `path`, to be renamed when whole: builds may run at the same time."""
    return path.with_name(f".{os.getpid()}.{path.name}")


def is_current(built: Path, depends: Path) -> bool:
    """Whether no file that the compiler read for `built` has changed since."""
    if not built.is_file() or not depends.is_file():
        return False
    _, _, names = depends.read_text(encoding="utf-8").replace("\\\n", " ").partition(":")
    built_at = built.stat().st_mtime_ns
    read = [ROOT / name for name in names.split()]
    return all(path.is_file() and path.stat().st_mtime_ns < built_at for path in read)


def compile_source(source: Path, folder: Path, tools: Toolchain, cuda: CudaToolchain | None) -> Path:
    built, depends = folder / f"{source.stem}.o", folder / f"{source.stem}.d"
    if is_current(built, depends):
        return built
    new, started = written_to(built), time.time_ns()
    include = tools.torch_folder / "include"
    # what torch's checks say of a file must not name the machine that built it
    maps = [f"-ffile-prefix-map={include}=torch/include", f"-ffile-prefix-map={ROOT}=."]
    if cuda is None:
        command = [*tools.compiler, *tools.flags, *isa_flags(source), f"-isystem{include}", *maps]
        command += ["-c", str(source.relative_to(ROOT))]
    else:
        command = cuda_command(source, tools, cuda, (*cuda.architectures, f"ptx{PTX}"))
        command += [part for prefix in maps for part in ("-Xcompiler", prefix)]
    command += ["-MMD", "-MF", str(depends), "-o", str(new)]
    run(command, f"csrc/{source.name} does not compile")
    os.utime(new, ns=(started, started))  # a file edited while it was compiled is newer
    new.replace(built)
    return built


def objects_of(sources: list[Path], key: Any, tools: Toolchain, cuda: CudaToolchain | None = None) -> list[str]:
    """Compile what has changed."""
    folder = ROOT / "build" / f"objects-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return [str(path) for path in pool.map(lambda source: compile_source(source, folder, tools, cuda), sources)]


def link(target: Path, objects: list[str], tools: Toolchain, more: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    new = written_to(target)
    # no rpath: torch is imported, and so its libraries loaded, before this one
    command = [*tools.compiler, "-shared", *tools.flags, *objects, "-o", str(new)]
    command += [f"-L{tools.torch_folder / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10", *more]
    if not tools.sanitize:
        command += ["-Wl,--no-undefined"]
    run(command, "the library does not link")
    new.replace(target)


def build_library(target: Path, tools: Toolchain) -> dict[str, Any]:
    link(target, objects_of(find_sources(), (tools, ISA_FLAGS), tools), tools, [])
    isas = {ending.removeprefix("_"): flags for ending, flags in ISA_FLAGS.items()} if is_x86() else {}
    return {
        "built": True,
        "compiler": tools.compiler_version,
        "torch": tools.torch_version,
        "flags": list(tools.flags),
        "isa_flags": isas,
    }


def build_cuda_library(target: Path, tools: Toolchain) -> dict[str, Any]:
    if tools.sanitize:
        raise NotBuilt("SPECTRAL_KERNELS_SANITIZE was set when the package was built")
    cuda = find_cuda()
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    objects = objects_of(sources, (tools, cuda, CUDA_FLAGS, PTX), tools, cuda)
    # the runtime is linked in: the library loads whatever CUDA torch brings
    runtime = [f"-L{cuda.library_folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link(target, objects, tools, runtime)
    return {
        "built": True,
        "compiler": cuda.version,
        "torch": tools.torch_version,
        "architectures": [*(f"sm_{name}" for name in cuda.architectures), f"compute_{PTX}"],
    }


def try_build(
    target: Path,
    variable: str,
    what: str,
    build: Callable[[Path, Toolchain], dict[str, Any]],
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """Build and describe a library. Where that fails, say why there is none, or why an earlier build's is still there.

    `earlier` describes the library that may lie at `target`; None, or "0" in the variable, removes it.
    """
    wish = os.environ.get(variable, "1")
    if wish not in ("0", "1", "require"):
        raise SystemExit(f"{variable} must be 0, 1 or require, got {wish!r}")
    try:
        if wish == "0":
            raise NotBuilt(f"{variable}=0 was set when the package was built")
        return build(target, find_toolchain())
    except NotBuilt as error:
        if wish == "0" or earlier is None:
            target.unlink(missing_ok=True)
        if target.is_file():
            print(f"spectral_kernels: {what} library kept from an earlier build: {error}", file=sys.stderr, flush=True)
            return {**(earlier if earlier and earlier["built"] else UNKNOWN), "kept": str(error)}
        print(f"spectral_kernels: no {what} library: {error}", file=sys.stderr, flush=True)
        return {"built": False, "reason": str(error)}


def stop_if_required(variable: str, described: dict[str, Any]) -> None:
    if os.environ.get(variable) == "require" and (not described["built"] or "kept" in described):
        raise SystemExit(f"spectral_kernels: {variable}=require, giving up")


class BuildLibrary(build_ext):
    """Builds the libraries and _build_info.json in place of a Python extension module."""

    def folders(self) -> Iterator[Path]:
        yield Path(self.build_lib) / "spectral_kernels"
        if self.inplace:
            yield ROOT / "spectral_kernels"

    def run(self) -> None:
        *_, folder = self.folders()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "_build_info.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else NOT_FINISHED.copy()
        told_of_cuda = told.pop("cuda", NOT_FINISHED)

        def write(info: dict[str, Any]) -> None:
            new = written_to(path)
            new.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
            new.replace(path)

        # the package's own folder keeps its libraries; what a wheel is packed from is no place for older ones
        def build(name: str, earlier: dict[str, Any], *how: Any) -> dict[str, Any]:
            return try_build(folder / name, *how, earlier if self.inplace else None)

        info = build("_C.so", told, "SPECTRAL_KERNELS_BUILD", "C++", build_library)
        # written at once, so that no file lacks its description when the next step stops or fails
        write(info | {"cuda": told_of_cuda})
        stop_if_required("SPECTRAL_KERNELS_BUILD", info)
        cuda = build("_C_cuda.so", told_of_cuda, "SPECTRAL_KERNELS_CUDA", "CUDA", build_cuda_library)
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


# bench/aot.py imports the toolchain
if __name__ == "__main__":
    setup(
        ext_modules=[Extension("spectral_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TaggedWheel},
    )
