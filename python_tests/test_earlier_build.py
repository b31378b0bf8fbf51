"""What an earlier build left: its libraries, and its description, which may be broken."""

import json
import zipfile
from pathlib import Path

import pytest
from build_helpers import build, build_in_place, copy_of_the_project, small_project, told_in

from spectral_kernels import info

LIBRARIES = ("_C.so", "_C_cuda.so")

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


@pytest.mark.parametrize("wish", ["1", "require"])
def test_a_failed_build_in_place_keeps_the_earlier_libraries(
    built_earlier: Path, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = "/nonexistent"
    changes = {"SPECTRAL_KERNELS_BUILD": wish, "SPECTRAL_KERNELS_CUDA": "1", "CXX": nothing, "NVCC": nothing}
    said = build_in_place(built_earlier, fails=wish == "require", **changes)
    assert "C++ library kept from an earlier build: no C++ compiler: CXX=/nonexistent does not run" in said
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


@pytest.mark.parametrize(
    "kind", ["missing", "no JSON", "not UTF-8", "list", "no fields", "fields of other types", "folder"]
)
def test_a_broken_description_is_written_anew(built_earlier: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "missing":
        (built_earlier / "spectral_kernels/_build_info.json").unlink()
    else:
        lay_broken(built_earlier / "spectral_kernels", kind)
    said = build_in_place(built_earlier, CXX="/nonexistent")
    if kind == "folder":
        assert "how the libraries were built is not written down" in said
        return
    told = told_in(built_earlier)
    assert "CXX=/nonexistent does not run" in told["kept"]
    assert told["built"] and (kind != "missing" or told["compiler"] == "unknown")
    monkeypatch.setattr(info, "_BUILD_INFO", built_earlier / "spectral_kernels/_build_info.json")
    assert "KEPT from an earlier build" in "\n".join(info.report(info.collect()))


def test_no_library_wished_for_removes_the_earlier_ones(built_earlier: Path) -> None:
    build_in_place(built_earlier, SPECTRAL_KERNELS_BUILD="0", SPECTRAL_KERNELS_CUDA="0")
    assert not list((built_earlier / "spectral_kernels").glob("*.so"))
    told = told_in(built_earlier)
    assert told["reason"] == "SPECTRAL_KERNELS_BUILD=0 was set when the package was built"
    assert told["cuda"]["reason"] == "SPECTRAL_KERNELS_CUDA=0 was set when the package was built"


@pytest.mark.slow
def test_a_failed_build_packs_no_older_library(tmp_path: Path) -> None:
    small = small_project(tmp_path)
    first, _ = build("wheel", small, tmp_path / "first", SPECTRAL_KERNELS_BUILD="require")
    assert "spectral_kernels/_C.so" in zipfile.ZipFile(first).namelist()
    (small / "csrc" / "only.cpp").write_text("this is not C++\n")
    second, said = build("wheel", small, tmp_path / "second")
    assert "spectral_kernels/_C.so" not in zipfile.ZipFile(second).namelist()
    assert "csrc/only.cpp does not compile" in said
