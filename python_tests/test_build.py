"""Packaging: what is shipped, and that a package comes out whatever is missing when it is built."""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import spectral_kernels
from spectral_kernels import info

ROOT = Path(__file__).resolve().parents[1]
BUILT = ("csrc", "spectral_kernels", "tools")
FOLDERS = (*BUILT, "python_tests", "bench", "requirements", "docs", "examples")
FILES = ("setup.py", "pyproject.toml", "Makefile", "LICENSE", *(path.name for path in ROOT.glob("*.md")))
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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project in a git of its own, and beside what is tracked a private key in every place that was ever packed."""
    if shutil.which("git") is None:
        pytest.skip("an sdist is made of what git tracks, and there is no git")
    source = copy_of_the_project(tmp_path, FOLDERS)
    (source / ".gitignore").write_text("*.ignored\n*.egg-info/\n/build/\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=source, check=True)
    for name in ("build", "spectral_kernels.egg-info", ".ci"):
        (source / name).mkdir()
    for name in (
        "key.pem", "README.rst", "setup.cfg", "key.ignored", "build/key.py", "spectral_kernels.egg-info/key.pem", ".ci/key",
        "MANIFEST.in", "tests/test_key.py",
        *(f"{folder}/{key}" for folder in FOLDERS for key in ("key.pem", "key.py", "key.ignored", "key.yaml")),
        "spectral_kernels/training/configs/key.yaml", "spectral_kernels/training/key.txt", "spectral_kernels/key.pyi",
    ):  # fmt: skip
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("# PRIVATE KEY\n")
    (source / "MANIFEST.in").write_text("graft .\n")
    return source


def tracked(source: Path) -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=source, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def test_sdist_and_its_wheel_ship_what_git_tracks(checkout: Path, tmp_path: Path) -> None:
    # as a hook of another repository has it
    subprocess.run(["git", "init", "-q", str(tmp_path / "other")], check=True)
    sdist, _ = build("sdist", checkout, tmp_path / "dist", GIT_DIR=str(tmp_path / "other/.git"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
        assert names - {"PKG-INFO", "setup.cfg"} == tracked(checkout)
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel, _ = build("wheel", unpacked, tmp_path / "dist", CXX="/nonexistent")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("spectral_kernels/")} - {"spectral_kernels/_build_info.json"}
    assert package == {name for name in tracked(checkout) if name.startswith("spectral_kernels/")}


def test_wheel_of_a_checkout_takes_only_the_data_it_names(checkout: Path, tmp_path: Path) -> None:
    wheel, _ = build("wheel", checkout, tmp_path / "dist", CXX="/nonexistent")
    package = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("spectral_kernels/")]
    # modules are taken as they lie there, as in an editable install
    assert {Path(name).suffix for name in package if Path(name).stem == "key"} == {".py", ".pyi"}


@pytest.mark.parametrize("lacks", ["checkout", "git", "setup.py", "a file", "room"])
def test_no_sdist_of_what_git_does_not_tell(
    checkout: Path, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "checkout":
        shutil.rmtree(checkout / ".git")
    elif lacks == "git":
        monkeypatch.setenv("PATH", "/nonexistent")
    elif lacks == "setup.py":  # as where an sdist lies unpacked in another project's checkout
        subprocess.run(["git", "rm", "-q", "--cached", "setup.py"], cwd=checkout, check=True)
    elif lacks == "a file":
        (checkout / "csrc/apply.h").unlink()
    else:  # left by an sdist that was broken off
        (checkout / f"spectral_kernels-{spectral_kernels.__version__}").mkdir()
    done = hook("sdist", checkout, tmp_path / "dist")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("spectral_kernels: no sdist: ")
    assert not list((tmp_path / "dist").glob("*.tar.gz"))


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


def load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load(ROOT / "setup.py", "setup_under_test")


@pytest.fixture
def toolchain(setup_py: Any) -> Any:
    module = sys.modules["toolchain"]
    module.jobs.cache_clear()
    return module


# what CXX or NVCC may name; None is a folder
PROGRAMS = {
    "folder": None,
    "not executable": "#!/bin/sh\n",
    "no program": "neither machine code nor a script\n",
    "no interpreter": "#!/nonexistent/sh\n",
    "silent": "#!/bin/sh\n",
    "blank": "#!/bin/sh\necho ' '\n",
    "fails": "#!/bin/sh\nc++ \"$@\"; echo 'no licence' >&2; exit 3\n",
    "crashes": "#!/bin/sh\nkill -SEGV $$\n",
    "hangs": '#!/bin/sh\nsleep 2\nexec c++ "$@"\n',
    "reads": "#!/bin/sh\ncat\n",
    "not UTF-8": "#!/bin/sh\nprintf '\\377\\376\\n'\n",
    "another": "#!/bin/sh\necho 'make 4.3'\n",
}
# what they may hold themselves
VALUES = ("/nonexistent", " ", "\t", "''", '"', "'", "g++ 'x", "g++ \\", "/no/a b", "\udcff", "true", "echo", "cat")


def refused(find: Any, variable: str, value: str, toolchain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(toolchain.NotBuilt) as caught:
        find()
    assert f"{variable}={shlex.quote(value)} " in str(caught.value)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("variable", ["CXX", "NVCC"])
def test_a_value_that_is_no_compiler(
    variable: str, value: str, toolchain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = {"CXX": toolchain.find_compiler, "NVCC": toolchain.find_cuda}[variable]
    refused(find, variable, value, toolchain, monkeypatch)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("variable", ["CXX", "NVCC"])
def test_a_program_that_is_no_compiler(
    variable: str, program: str, toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "ANSWER_SECONDS", 0.3)
    path, text = tmp_path / "program", PROGRAMS[program]
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
        path.chmod(0o644 if program == "not executable" else 0o755)
    find = {"CXX": toolchain.find_compiler, "NVCC": toolchain.find_cuda}[variable]
    refused(find, variable, str(path), toolchain, monkeypatch)


@pytest.mark.parametrize("value", ['"', " ", "two\nlines", "/"])
def test_a_compiler_that_is_none_stops_only_what_requires_it(value: str, tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path)
    done = build_in_place(source, SPECTRAL_KERNELS_CUDA="1", CXX=value, NVCC=value)
    assert done.returncode == 0, done.stderr
    reason = f"no C++ compiler: CXX={' '.join(shlex.quote(value).split())} does not run"
    assert told_in(source)["reason"].startswith(reason)
    done = build_in_place(source, SPECTRAL_KERNELS_BUILD="require", CXX=value)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("spectral_kernels: ")]
    assert said[0].startswith(f"spectral_kernels: no C++ library: {reason}")
    assert said[1] == "spectral_kernels: SPECTRAL_KERNELS_BUILD=require, giving up"


@pytest.mark.parametrize("value", ["abc", "0", "-3", "1e9", " ", "4.0", "9" * 5000, "٣", "1\n2", "\udcff"])
def test_wrong_max_jobs_is_told_and_not_taken(
    value: str, toolchain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    assert toolchain.jobs() == os.cpu_count()
    told = f"spectral_kernels: MAX_JOBS={value!r} is no number of jobs: taking {os.cpu_count()}\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("value, count", [("", os.cpu_count()), ("1", 1), ("64", 64)])
def test_max_jobs_is_taken(
    value: str, count: int, toolchain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    assert toolchain.jobs() == count
    assert capsys.readouterr().err == ""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The project with a library that is built in no time."""
    source = copy_of_the_project(tmp_path)
    for path in (source / "csrc").glob("*.cpp"):
        path.unlink()
    (source / "csrc" / "only.cpp").write_text("int spectral_kernels_only() { return 0; }\n")
    return source


def test_odd_variables_do_not_stop_a_required_library(small: Path) -> None:
    done = build_in_place(small, SPECTRAL_KERNELS_BUILD="require", MAX_JOBS="1e9", TMPDIR="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MAX_JOBS='1e9' is no number of jobs") == 1
    assert told_in(small)["built"] is True


def test_a_compiler_that_writes_nothing_or_dies_gives_no_library(small: Path) -> None:
    """It answers like one."""
    compiler = small / "compiler"
    said = "csrc/only.cpp does not compile: "
    for end, why in (("exit 0", "FileNotFoundError: "), ("kill -KILL $$", said), ("printf '\\377' >&2; exit 1", said)):
        compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {end};; esac\nexec c++ "$@"\n')
        compiler.chmod(0o755)
        done = build_in_place(small, CXX=str(compiler))
        assert done.returncode == 0, done.stderr
        assert told_in(small)["reason"].startswith(why)
        assert not list((small / "build").rglob("*.o")) and not list((small / "spectral_kernels").glob(".*"))


def test_what_nobody_foresaw_gives_no_library(
    setup_py: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SPECTRAL_KERNELS_BUILD", raising=False)
    monkeypatch.setattr(setup_py, "find_toolchain", lambda: None)
    (tmp_path / "_C.so").mkdir()  # which cannot be removed as a file is
    for error in (OSError(28, "No space left"), ValueError("two\nlines"), MemoryError(), RuntimeError("\udcff")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        told = setup_py.try_build(tmp_path / "_C.so", tmp_path, "SPECTRAL_KERNELS_BUILD", "C++", fail, None)
        assert told["built"] is False
        assert told["reason"].startswith(f"{type(error).__name__}:")
        assert capsys.readouterr().err == f"spectral_kernels: no C++ library: {told['reason']}\n"


def test_what_is_written_is_whole_or_not_there(setup_py: Any, tmp_path: Path) -> None:
    def write() -> None:
        with setup_py.written_to(tmp_path / "folder" / "file") as new:
            new.write_text("a part")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("depends", ["", "\xff", "a.o:", "a.o: /nonexistent"])
def test_an_object_whose_sources_are_not_known_is_compiled_again(setup_py: Any, tmp_path: Path, depends: str) -> None:
    (tmp_path / "a.d").write_bytes(depends.encode("latin-1"))
    (tmp_path / "a.o").write_text("")
    assert not setup_py.is_current(tmp_path / "a.o", tmp_path / "a.d")


@pytest.mark.parametrize("text", [None, b"", b"\xff\xfe", b"__version__ = 'unknown'", b"__version__ = '2.13.0' # \xe9"])
def test_torch_whose_version_is_odd(
    text: bytes | None, toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "version.py"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text)
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    said = "torch 2.13.0 was there" if text and b"2.13.0" in text else "the version of the torch that was there"
    with pytest.raises(toolchain.NotBuilt, match=said):
        toolchain.find_torch((2, 11))


def test_a_folder_named_torch_is_no_torch(tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path)
    (source / "torch").mkdir()
    program = "import sys; sys.path.insert(0, 'tools'); import toolchain; toolchain.find_torch((2, 11))"
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=source, env=environment(), capture_output=True, text=True, check=False)
    assert "NotBuilt: there was no torch" in done.stderr


@pytest.mark.parametrize("link", [True, False])
def test_a_wheel_where_folders_cannot_be_made(link: bool, small: Path, tmp_path: Path) -> None:
    for name in ("build", "spectral_kernels.egg-info"):
        (small / name).symlink_to("/nonexistent/folder") if link else (small / name).write_text("a file")
    wheel, said = build("wheel", small, tmp_path / "dist", SPECTRAL_KERNELS_BUILD="require")
    assert "spectral_kernels/_C.so" in zipfile.ZipFile(wheel).namelist()
    assert said.count("building in") == 1


READ_ONLY = """
mount --bind "$PWD" "$PWD" && mount -o remount,ro,bind "$PWD" && cd "$PWD" && ! touch here || exit 77
exec "$@"
"""


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_read_only_tree_is_built_elsewhere(kind: str, small: Path, tmp_path: Path) -> None:
    """Where the tree is to hold the library itself, there is none, and the package is installed."""
    (tmp_path / "dist").mkdir()
    command = ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", sys.executable, "-c", BUILD, kind, str(tmp_path / "dist")]
    try:
        done = subprocess.run(command, cwd=small, env=environment(), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("no mount of one's own here")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert ("spectral_kernels/_C.so" in zipfile.ZipFile(wheel).namelist()) == (kind == "wheel")
    assert ("no C++ library: OSError: [Errno 30] Read-only file system" in done.stderr) == (kind == "editable")
    assert "building in" in done.stderr


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


@pytest.mark.parametrize("kind", ["no JSON", "not UTF-8", "list", "no fields", "fields of other types", "folder"])
def test_a_broken_description_is_written_anew(built_earlier: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_broken(built_earlier / "spectral_kernels", kind)
    done = build_in_place(built_earlier, CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    if BROKEN[kind] is None:
        assert "how the libraries were built is not written down" in done.stderr
        return
    assert "CXX=/nonexistent does not run" in told_in(built_earlier)["kept"]
    monkeypatch.setattr(info, "_BUILD_INFO", built_earlier / "spectral_kernels/_build_info.json")
    assert "KEPT from an earlier build" in "\n".join(info.report(info.collect()))


def test_no_library_wished_for_removes_the_earlier_ones(built_earlier: Path) -> None:
    done = build_in_place(built_earlier, SPECTRAL_KERNELS_BUILD="0", SPECTRAL_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert not list((built_earlier / "spectral_kernels").glob("*.so"))
    told = told_in(built_earlier)
    assert told["reason"] == "SPECTRAL_KERNELS_BUILD=0 was set when the package was built"
    assert told["cuda"]["reason"] == "SPECTRAL_KERNELS_CUDA=0 was set when the package was built"


@pytest.mark.slow
def test_a_failed_build_packs_no_older_library(small: Path, tmp_path: Path) -> None:
    first, _ = build("wheel", small, tmp_path / "first", SPECTRAL_KERNELS_BUILD="require")
    assert "spectral_kernels/_C.so" in zipfile.ZipFile(first).namelist()
    (small / "csrc" / "only.cpp").write_text("this is not C++\n")
    second, said = build("wheel", small, tmp_path / "second")
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
