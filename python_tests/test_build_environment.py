"""Builds where the compiler, a variable, a folder or torch is not what it should be."""

import importlib.util
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from build_helpers import BUILD, ROOT, build, build_in_place, copy_of_the_project, environment, small_project, told_in
from process_helpers import module_of


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module_of(ROOT / "setup.py", "setup_under_test")


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


@pytest.mark.parametrize("value", (*VALUES, *PROGRAMS))
@pytest.mark.parametrize("variable", ["CXX", "NVCC"])
def test_what_is_no_compiler_is_refused(
    variable: str, value: str, toolchain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value in PROGRAMS:
        monkeypatch.setattr(toolchain, "ANSWER_SECONDS", 0.3)
        path, text = tmp_path / "program", PROGRAMS[value]
        if text is None:
            path.mkdir()
        else:
            path.write_text(text)
            path.chmod(0o644 if value == "not executable" else 0o755)
        value = str(path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(toolchain.NotBuilt) as caught:
        {"CXX": toolchain.find_compiler, "NVCC": toolchain.find_cuda}[variable]()
    assert f"{variable}={shlex.quote(value)} " in str(caught.value)


@pytest.mark.parametrize("value", ['"', " ", "two\nlines", "/"])
def test_a_compiler_that_is_none_stops_only_what_requires_it(value: str, tmp_path: Path) -> None:
    source = copy_of_the_project(tmp_path)
    build_in_place(source, SPECTRAL_KERNELS_CUDA="1", CXX=value, NVCC=value)
    does_not_run = f"{' '.join(shlex.quote(value).split())} does not run"
    reason = f"no C++ compiler: CXX={does_not_run}"
    assert told_in(source)["reason"].startswith(reason)
    said = build_in_place(source, SPECTRAL_KERNELS_BUILD="0", SPECTRAL_KERNELS_CUDA="1", NVCC=value)
    assert f"spectral_kernels: no CUDA library: NVCC={does_not_run}" in said
    assert not list((source / "spectral_kernels").glob("*.so"))
    said = build_in_place(source, fails=True, SPECTRAL_KERNELS_BUILD="require", CXX=value).splitlines()
    said = [line for line in said if line.startswith("spectral_kernels: ")]
    assert said[0].startswith(f"spectral_kernels: no C++ library: {reason}")
    assert said[1] == "spectral_kernels: SPECTRAL_KERNELS_BUILD=require, giving up"


@pytest.mark.parametrize(
    "value", ["", "1", "64", "abc", "0", "-3", "1e9", " ", "4.0", "9" * 5000, "٣", "1\n2", "\udcff"]
)
def test_max_jobs_is_taken_or_told_wrong(
    value: str, toolchain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    taken = {"": os.cpu_count(), "1": 1, "64": 64}
    assert toolchain.jobs() == taken.get(value, os.cpu_count())
    told = f"spectral_kernels: MAX_JOBS={value!r} is no number of jobs: taking {os.cpu_count()}\n"
    assert capsys.readouterr().err == ("" if value in taken else told)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return small_project(tmp_path)


def test_odd_variables_do_not_stop_a_required_library(small: Path) -> None:
    said = build_in_place(small, SPECTRAL_KERNELS_BUILD="require", MAX_JOBS="1e9", TMPDIR="/nonexistent")
    assert said.count("MAX_JOBS='1e9' is no number of jobs") == 1
    assert told_in(small)["built"] is True


def test_a_compiler_that_writes_nothing_or_dies_gives_no_library(small: Path) -> None:
    """It answers like one."""
    compiler = small / "compiler"
    said = "csrc/only.cpp does not compile: "
    for end, why in (("exit 0", "FileNotFoundError: "), ("kill -KILL $$", said), ("printf '\\377' >&2; exit 1", said)):
        compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {end};; esac\nexec c++ "$@"\n')
        compiler.chmod(0o755)
        build_in_place(small, CXX=str(compiler))
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
