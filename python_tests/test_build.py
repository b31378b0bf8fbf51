"""Packaging: what is shipped, and that a package comes out whatever is missing when it is built."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from build_helpers import ROOT, build, copy_of_the_project, environment, use

from spectral_kernels import info

CUDA = """
import torch, spectral_kernels
from spectral_kernels.dispatch import backends
torch.ops.load_library(str(backends._CUDA_LIBRARY_PATH))
found = torch.ops.spectral_kernels_cuda
assert torch.cuda.is_available() or not found.greedy_fits(0, 1, 4096, 128, 256, 64, False, True, False)
names = ("eigenvalues", "greedy_select")
print(*(name for name in names if "CUDA" in torch._C._dispatch_dump(f"spectral_kernels_cuda::{name}")))
"""


@pytest.fixture(scope="module")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a package says that was built where no compiler runs."""
    folder = tmp_path_factory.mktemp("no_compiler")
    wheel, said = build("wheel", copy_of_the_project(folder), folder / "dist", CC="/nonexistent", CXX="/nonexistent")
    return {"wheel": wheel, "said": said, **use(wheel, folder / "site")}


def test_no_compiler_gives_a_package_that_says_so(without_library: dict[str, object]) -> None:
    reason = "no C++ compiler: CXX=/nonexistent does not run"
    assert f"spectral_kernels: no C++ library: {reason}" in str(without_library["said"])
    assert Path(str(without_library["wheel"])).name.endswith("-py3-none-any.whl")
    found = without_library["info"]
    assert isinstance(found, dict)
    assert found["library"]["reason"] == reason
    assert not found["library"]["loaded"]
    assert found["ops"]["greedy_select"]["cpu"]["uses"] == "reference"
    assert f"not built: {reason}" in "\n".join(info.report(found))


def test_package_ships_types_and_configs(without_library: dict[str, object]) -> None:
    names = zipfile.ZipFile(Path(str(without_library["wheel"]))).namelist()
    assert "spectral_kernels/py.typed" in names
    shipped = {Path(name).name for name in names if name.startswith("spectral_kernels/training/configs/")}
    assert shipped == {path.name for path in (ROOT / "spectral_kernels/training/configs").glob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "spectral_kernels").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


@pytest.mark.slow
def test_plain_pip_install_gives_a_package_without_library(tmp_path: Path) -> None:
    """pip isolates the build, which then sees no torch; needs a package index for setuptools."""
    site = tmp_path / "site"
    source = copy_of_the_project(tmp_path)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(source)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = json.loads((site / "spectral_kernels/_build_info.json").read_text())
    assert "--no-build-isolation" in library["reason"]
    assert not (site / "spectral_kernels/_C.so").exists()


@pytest.mark.slow
def test_wheel_is_for_any_python_and_place(library_wheel: Path, tmp_path: Path) -> None:
    assert re.fullmatch(r"spectral_kernels-[\d.]+-py3-none-linux_\w+\.whl", library_wheel.name)
    found: Any = use(library_wheel, tmp_path)["info"]
    assert found["library"]["loaded"]
    assert found["library"]["torch"] == torch.__version__
    content = zipfile.ZipFile(library_wheel).read("spectral_kernels/_C.so")
    torch_folder = str(Path(torch.__file__).parent)
    assert torch_folder.encode() not in content
    assert str(library_wheel.parent.parent).encode() not in content


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_cuda_library_loads_under_this_torch() -> None:
    """Its operators are registered and its host code runs; the torch here may be one for the CPU."""
    done = subprocess.run([sys.executable, "-P", "-c", CUDA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["eigenvalues", "greedy_select"]
    cuda = info.collect()["library"]["cuda"]
    assert cuda["built"]
    assert {"sm_80", "sm_90"} <= set(cuda["architectures"])


@pytest.fixture(scope="module")
def library_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    source = copy_of_the_project(folder)
    return build("wheel", source, folder / "dist", SPECTRAL_KERNELS_BUILD="require")[0]


@pytest.mark.slow
def test_code_for_wide_processors_stays_in_its_files(library_wheel: Path) -> None:
    """The linker keeps one copy of an inline function: were it the AVX-512 one, every processor would run it."""
    if platform.machine() != "x86_64":
        pytest.skip("only x86-64 has files for instruction sets of their own")
    objects = sorted((library_wheel.parent.parent / "source/build").glob("objects-*/*_avx*.o"))
    assert objects
    for path in objects:
        isa = path.stem.rpartition("_")[2]
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line) and f"::{isa}::" not in line]
        assert not shared, path.name


def other_python() -> str | None:
    """A Python of another minor version that runs and can make environments."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = [version for version in ("3.12", "3.13", "3.14", "3.11") if version != own]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in versions:
        for command in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}*/bin/python{version}"))):
            if command is None:
                continue
            done = subprocess.run([str(command), "-c", "import ensurepip, venv"], capture_output=True, check=False)
            if done.returncode == 0:
                return str(command)
    return None


@pytest.mark.slow
def test_wheel_built_under_another_python_loads_here(tmp_path: Path) -> None:
    """The torch that is compiled against is this Python's, and is not imported by the build."""
    python = other_python()
    if python is None:
        pytest.skip("no other Python of 3.11 or newer is on PATH or under pyenv")
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "setuptools>=77"], check=True, capture_output=True)
    torch_spec = importlib.util.find_spec("torch")
    assert torch_spec is not None
    assert torch_spec.origin is not None
    # only torch: this Python's compiled packages are not the other one's
    only_torch = tmp_path / "only_torch"
    only_torch.mkdir()
    (only_torch / "torch").symlink_to(Path(torch_spec.origin).parent)
    source = copy_of_the_project(tmp_path)
    wheel, _ = build(
        "wheel", source, tmp_path / "dist", python, PYTHONPATH=str(only_torch), SPECTRAL_KERNELS_BUILD="require"
    )
    found = use(wheel, tmp_path / "site")
    assert isinstance(found["info"], dict)
    assert found["info"]["library"]["loaded"]
    assert found["info"]["ops"]["greedy_select"]["cpu"]["uses"] == "cpp"
