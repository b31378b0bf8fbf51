"""Packaging: what is shipped, and that a package comes out whatever is missing when it is built."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_kernels import info

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "spectral_kernels", "python_tests", "bench", "requirements", "tools", "docs", "examples")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", *(path.name for path in ROOT.glob("*.md")))
LIBRARIES = ("_C.so", "_C_cuda.so")
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

CUDA = """
import torch, spectral_kernels
from spectral_kernels import backends
torch.ops.load_library(str(backends._CUDA_LIBRARY_PATH))
found = torch.ops.spectral_kernels_cuda
assert torch.cuda.is_available() or not found.greedy_fits(0, 1, 4096, 128, 256, 64, False, True, False)
names = ("eigenvalues", "greedy_select")
print(*(name for name in names if "CUDA" in torch._C._dispatch_dump(f"spectral_kernels_cuda::{name}")))
"""


def copy_of_the_project(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=OURS)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    return source


def environment(**changes: str) -> dict[str, str]:
    # nvcc takes its time: one test asks for it
    changes = {"SPECTRAL_KERNELS_CUDA": "0"} | changes
    dropped = ("SPECTRAL_KERNELS_BUILD", "SPECTRAL_KERNELS_BACKEND", "SPECTRAL_KERNELS_SANITIZE", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if key not in dropped} | changes


def build(kind: str, source: Path, folder: Path, python: str = sys.executable, **changes: str) -> tuple[Path, str]:
    """A wheel or sdist, and what the build said on stderr."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [python, "-c", BUILD, kind, str(folder)],
        cwd=source, env=environment(**changes), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1], done.stderr


def build_in_place(source: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source, env=environment(**changes), capture_output=True, text=True, check=False,
    )  # fmt: skip


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


def test_sdist_ships_what_builds_tests_and_benchmarks(tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path)
    sdist, _ = build("sdist", source, tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "python_tests", "bench", "requirements", "tools"):
        assert {str(path.relative_to(source)) for path in (source / folder).rglob("*.*")} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


def test_require_makes_a_missing_library_an_error(tmp_path: Path) -> None:
    done = build_in_place(copy_of_the_project(tmp_path), SPECTRAL_KERNELS_BUILD="require", CXX="/nonexistent")
    assert done.returncode != 0
    assert "CXX=/nonexistent does not run" in done.stderr


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


BROKEN = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"built": "\xff"}',
    "deep": b"[" * 100_000,
    "list": b"[]",
    "null": b"null",
    "text": b'"built"',
    "nothing told": b"{}",
    "no fields": b'{"built": true}',
    "fields of other types": b'{"built": true, "compiler": [], "torch": 2, "flags": "-O3", "isa_flags": []}',
    "no reason": b'{"built": false, "reason": null}',
    "built of another type": b'{"built": [], "cuda": []}',
    "folder": None,
}


def lay_broken(folder: Path, kind: str) -> None:
    path, content = folder / "_build_info.json", BROKEN[kind]
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("kind", BROKEN)
def test_info_survives_a_broken_description(
    kind: str, library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_broken(tmp_path, kind)
    if library:
        (tmp_path / "_C.so").write_text("a library")
    monkeypatch.setattr(info, "_BUILD_INFO", tmp_path / "_build_info.json")
    found = info.collect()
    assert found["library"]["built"] == library
    assert found["library"]["reason"].startswith("_build_info.json ")
    text = "\n".join(info.report(found))
    start = "how it was built is not known" if library else "not built"
    assert f"  {start}: _build_info.json " in text
    assert "cannot be told" not in text


def test_info_survives_a_description_that_is_broken_deep_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"built": True, "compiler": "c++", "torch": "2.11.0", "flags": [3], "isa_flags": {"avx2": 7}}
    (tmp_path / "_build_info.json").write_text(json.dumps(told))
    monkeypatch.setattr(info, "_BUILD_INFO", tmp_path / "_build_info.json")
    assert "cannot be told (TypeError" in "\n".join(info.report(info.collect()))


@pytest.fixture
def built_earlier(tmp_path: Path) -> Path:
    """The project with libraries in place; none of these builds looks into them."""
    source = copy_of_the_project(tmp_path)
    told = {"built": True, "compiler": "an earlier one", "torch": "2.11.0", "flags": ["-O3"], "isa_flags": {}}
    told["cuda"] = {"built": True, "compiler": "nvcc", "torch": "2.11.0", "architectures": ["sm_90"]}
    (source / "spectral_kernels/_build_info.json").write_text(json.dumps(told))
    for name in LIBRARIES:
        (source / "spectral_kernels" / name).write_text("the earlier library")
    return source


def told_in(source: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((source / "spectral_kernels/_build_info.json").read_text())
    return told


@pytest.mark.parametrize("wish", ["1", "require"])
def test_a_failed_build_in_place_keeps_the_earlier_libraries(
    built_earlier: Path, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = "/nonexistent"
    done = build_in_place(
        built_earlier, SPECTRAL_KERNELS_BUILD=wish, SPECTRAL_KERNELS_CUDA="1", CXX=nothing, NVCC=nothing
    )
    assert (done.returncode == 0) == (wish == "1"), done.stderr
    assert "C++ library kept from an earlier build: no C++ compiler: CXX=/nonexistent does not run" in done.stderr
    for name in LIBRARIES:
        assert (built_earlier / "spectral_kernels" / name).read_text() == "the earlier library"
    told = told_in(built_earlier)
    assert told["built"] and told["compiler"] == "an earlier one"
    assert "CXX=/nonexistent does not run" in told["kept"]
    # a required library that fails ends the build before the other one is tried
    assert ("kept" in told["cuda"]) == (wish == "1")
    monkeypatch.setattr(info, "_BUILD_INFO", built_earlier / "spectral_kernels/_build_info.json")
    report = "\n".join(info.report(info.collect()))
    assert report.count("KEPT from an earlier build") == (2 if wish == "1" else 1)


def test_a_kept_library_that_nothing_describes_is_told_of(built_earlier: Path) -> None:
    (built_earlier / "spectral_kernels/_build_info.json").unlink()
    assert build_in_place(built_earlier, CXX="/nonexistent").returncode == 0
    told = told_in(built_earlier)
    assert told["built"] and told["compiler"] == "unknown"
    assert "CXX=/nonexistent does not run" in told["kept"]


def test_no_library_wished_for_removes_the_earlier_ones(built_earlier: Path) -> None:
    done = build_in_place(built_earlier, SPECTRAL_KERNELS_BUILD="0", SPECTRAL_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert not list((built_earlier / "spectral_kernels").glob("*.so"))
    told = told_in(built_earlier)
    assert told["reason"] == "SPECTRAL_KERNELS_BUILD=0 was set when the package was built"
    assert told["cuda"]["reason"] == "SPECTRAL_KERNELS_CUDA=0 was set when the package was built"


@pytest.mark.slow
def test_a_failed_build_packs_no_older_library(tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path)
    for path in (source / "csrc").glob("*.cpp"):
        path.unlink()
    main = source / "csrc" / "only.cpp"
    main.write_text("int spectral_kernels_only() { return 0; }\n")
    first, _ = build("wheel", source, tmp_path / "first", SPECTRAL_KERNELS_BUILD="require")
    assert "spectral_kernels/_C.so" in zipfile.ZipFile(first).namelist()
    main.write_text("this is not C++\n")
    second, said = build("wheel", source, tmp_path / "second")
    assert "spectral_kernels/_C.so" not in zipfile.ZipFile(second).namelist()
    assert "csrc/only.cpp does not compile" in said


@pytest.mark.slow
def test_wheel_has_no_rpath_and_no_path_of_its_builder(library_wheel: Path) -> None:
    content = zipfile.ZipFile(library_wheel).read("spectral_kernels/_C.so")
    torch_folder = str(Path(torch.__file__).parent)
    assert torch_folder.encode() not in content
    assert str(library_wheel.parent.parent).encode() not in content


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_cuda_library_loads_under_this_torch() -> None:
    """Its operators are registered and its host code runs; the torch here may be one for the CPU."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CUDA], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["eigenvalues", "greedy_select"]
    cuda = info.collect()["library"]["cuda"]
    assert cuda["built"]
    assert {"sm_80", "sm_90"} <= set(cuda["architectures"])


def test_no_nvcc_gives_a_package_that_says_so(tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path)
    wheel, said = build(
        "wheel", source, tmp_path / "dist", SPECTRAL_KERNELS_BUILD="0", NVCC="/nonexistent", SPECTRAL_KERNELS_CUDA="1"
    )
    assert "no CUDA library: NVCC=/nonexistent does not run" in said
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.fixture(scope="module")
def library_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    source = copy_of_the_project(folder)
    return build("wheel", source, folder / "dist", SPECTRAL_KERNELS_BUILD="require")[0]


@pytest.mark.slow
def test_wheel_is_for_any_python(library_wheel: Path, tmp_path: Path) -> None:
    assert re.fullmatch(r"spectral_kernels-[\d.]+-py3-none-linux_\w+\.whl", library_wheel.name)
    found = use(library_wheel, tmp_path)["info"]
    assert isinstance(found, dict)
    assert found["library"]["loaded"]
    assert found["library"]["torch"] == torch.__version__


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
