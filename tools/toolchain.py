"""What setup.py builds the libraries with. Raises NotBuilt where it is missing, does not run or is something else."""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# architectures of the cubins, and that of the PTX which newer ones translate for themselves
CUBINS, PTX = ("80", "90", "100"), "90"
# for a program to say its version; for a file to be compiled
ANSWER_SECONDS, COMPILE_SECONDS = 20, 1800


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


def find_torch(oldest: tuple[int, int]) -> tuple[Path, str]:
    """Folder and version of the torch that this Python sees, not imported: it may be another Python's."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt("there was no torch when it was built (pip hides it unless told --no-build-isolation)")
    folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.MULTILINE)
    if found is None:
        raise NotBuilt(f"the version of the torch that was there when it was built is not in {folder / 'version.py'}")
    if (int(found[2]), int(found[3])) < oldest:
        raise NotBuilt(f"torch {found[1]} was there when it was built, {oldest[0]}.{oldest[1]} or newer is needed")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise NotBuilt(f"torch {found[1]} was there when it was built, but without its C++ headers")
    return folder, found[1]


def ask(*command: str) -> str:
    """What a program says, stdout first."""
    if shutil.which(command[0]) is None:
        raise NotBuilt("does not run")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=ANSWER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NotBuilt(f"does not answer within {ANSWER_SECONDS} seconds") from error
    except OSError as error:
        raise NotBuilt(f"does not run: {error}") from error
    if done.returncode != 0:
        errors = done.stderr.strip().splitlines()
        raise NotBuilt(f"does not run: {errors[0] if errors else f'exit status {done.returncode}'}")
    return done.stdout + done.stderr


def find_compiler() -> tuple[tuple[str, ...], str]:
    """The C++ compiler's command and the first line of its --version."""
    named = os.environ.get("CXX")
    for text in [named] if named else ["c++", "g++", "clang++"]:
        try:
            command = shlex.split(text)
            version = ask(*command, "--version")
            # which other programs do not say
            if "__cplusplus" in ask(*command, "-dM", "-E", "-x", "c++", os.devnull) and version.strip():
                return tuple(command), version.strip().splitlines()[0]
            problem = "is no C++ compiler"
        except ValueError as error:
            problem = f"does not run: {error}"
        except NotBuilt as error:
            problem = str(error)
    tried = f"CXX={shlex.quote(named)} {problem}" if named else "none of c++, g++ and clang++ was found"
    raise NotBuilt(f"no C++ compiler: {tried}")


def find_cuda() -> CudaToolchain:
    """An nvcc that compiles for an architecture that we build for."""
    named = os.environ.get("NVCC")
    found = shutil.which(named or "nvcc")
    if found is None and not named:
        raise NotBuilt("there was no nvcc when it was built")
    try:
        return look_at_nvcc(found or "")
    except NotBuilt as error:
        raise NotBuilt(f"{f'NVCC={shlex.quote(named)}' if named else found} {error}") from error


def look_at_nvcc(nvcc: str) -> CudaToolchain:
    said = ask(nvcc, "--version")
    release = re.search(r"release ([\d.]+), (V[\d.]+)", said)
    if release is None:
        raise NotBuilt("is no nvcc")
    codes = ask(nvcc, "--list-gpu-code").split()
    architectures = tuple(name for name in CUBINS if f"sm_{name}" in codes)
    if PTX not in architectures:
        raise NotBuilt(f"does not compile for sm_{PTX}: it is {release[1]}")
    try:
        # what a launcher elsewhere on PATH runs, by its own account
        home = re.search(r"^#\$ _HERE_=(.+)$", ask(nvcc, "--dryrun", "-x", "cu", "-c", "-"), re.MULTILINE)
    except NotBuilt:  # its own choice of a C++ compiler is not there; ours may be another
        home = None
    folder = (Path(home[1]) if home else Path(nvcc).resolve().parent).parent
    for libraries in (folder / "lib64", folder / "lib"):
        if (libraries / "libcudart_static.a").is_file():
            return CudaToolchain(nvcc, f"nvcc {release[1]} ({release[2]})", libraries, architectures)
    raise NotBuilt("lacks the static CUDA runtime (libcudart_static.a)")


def run(command: list[str], what: str) -> None:
    """Raises NotBuilt with the first error line; everything the compiler says goes to stderr."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=COMPILE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"{what}: {error}") from error
    if done.stderr:
        print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NotBuilt(f"{what}: {errors[0].strip() if errors else f'exit status {done.returncode}'}")


@functools.cache
def jobs() -> int:
    """How many compilers run at a time."""
    cores = os.cpu_count() or 1
    named = os.environ.get("MAX_JOBS") or str(cores)
    if re.fullmatch("[1-9][0-9]{0,5}", named, re.ASCII):
        return int(named)
    print(f"spectral_kernels: MAX_JOBS={named!r} is no number of jobs: taking {cores}", file=sys.stderr, flush=True)
    return cores
