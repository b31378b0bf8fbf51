"""The sdist, and what of a checkout goes into a package: what git tracks."""

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from build_helpers import FOLDERS, build, copy_of_the_project, hook

import spectral_kernels


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
