"""Copies of the project, and what its builds make and say."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILT = ("csrc", "spectral_kernels", "tools")
FOLDERS = (*BUILT, "python_tests", "bench", "requirements", "docs", "examples")
FILES = ("setup.py", "pyproject.toml", "Makefile", "LICENSE", *(path.name for path in ROOT.glob("*.md")))
OURS = shutil.ignore_patterns("_C*.so", "_build_info.json", "__pycache__")

# setuptools' hooks, called as pip calls them; the platform's own folder of packages follows PYTHONPATH
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
SMOKE = """
import json, sys, torch, spectral_kernels as sk
from spectral_kernels import info
assert sk.__file__.startswith(sys.argv[1]), sk.__file__
z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
picks = sk.greedy_select(z, 8, candidates=None, start=0)
print(json.dumps({"indices": picks.indices.tolist(), "rank": sk.effective_rank(z).item(), "info": info.collect()}))
"""


def copy_of_the_project(folder: Path, folders: tuple[str, ...] = BUILT) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in folders:
        shutil.copytree(ROOT / name, source / name, ignore=OURS)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    return source


def environment(**changes: str) -> dict[str, str]:
    # nvcc takes its time: one test asks for it
    changes = {"SPECTRAL_KERNELS_CUDA": "0"} | changes
    dropped = ("SPECTRAL_KERNELS_BUILD", "SPECTRAL_KERNELS_BACKEND", "SPECTRAL_KERNELS_SANITIZE", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if key not in dropped} | changes


def hook(
    kind: str, source: Path, folder: Path, python: str = sys.executable, **changes: str
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [python, "-c", BUILD, kind, str(folder)],
        cwd=source, env=environment(**changes), capture_output=True, text=True, check=False,
    )  # fmt: skip


def build(kind: str, source: Path, folder: Path, python: str = sys.executable, **changes: str) -> tuple[Path, str]:
    """A wheel or sdist, and what the build said on stderr."""
    done = hook(kind, source, folder, python, **changes)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1], done.stderr


def build_in_place(source: Path, fails: bool = False, **changes: str) -> str:
    """What it says on stderr."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source, env=environment(**changes), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def use(wheel: Path, folder: Path) -> dict[str, object]:
    """Unpack a wheel, import it in a new process, and tell what ops and `info` say there."""
    zipfile.ZipFile(wheel).extractall(folder)
    done = subprocess.run(
        [sys.executable, "-P", "-c", SMOKE, str(folder)],
        env=environment(PYTHONPATH=str(folder)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def small_project(folder: Path) -> Path:
    """The project with a library that is built in no time."""
    source = copy_of_the_project(folder)
    for path in (source / "csrc").glob("*.cpp"):
        path.unlink()
    (source / "csrc" / "only.cpp").write_text("int spectral_kernels_only() { return 0; }\n")
    return source


def told_in(source: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((source / "spectral_kernels/_build_info.json").read_text())
    return told
