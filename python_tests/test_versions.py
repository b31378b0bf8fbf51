"""The torch releases that are promised are those that are tested, wherever they are named."""

import re
from pathlib import Path

from spectral_kernels import info

ROOT = Path(__file__).resolve().parents[1]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pin(name: str, package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", text_of(f"requirements/{name}.txt"), re.MULTILINE)
    return str(version)


def test_tested_torches_are_those_pinned() -> None:
    assert tuple(pin(name, "torch") for name in ("torch-oldest", "torch", "torch-newest")) == info.TESTED_TORCH


def test_oldest_torch_is_one_everywhere() -> None:
    oldest = info.TESTED_TORCH[0].removesuffix(".0")
    assert f"OLDEST_TORCH = ({oldest.replace('.', ', ')})\n" in text_of("setup.py")
    assert re.findall(r'"torch>=([\d.]+)"', text_of("pyproject.toml")) == [oldest]
    assert re.findall(r'"torch>=([\d.]+)"', text_of("README.md")) == [oldest]


def test_readme_names_what_is_tested() -> None:
    named = re.search(r"tested under torch (.*?);", text_of("README.md").replace("\n", " "))
    assert named is not None
    torches = [pin(name, "torch") for name in ("torch-oldest", "torch", "torch-newest")]
    tritons = [pin("torch-oldest", "triton"), pin("dev", "triton")]
    assert sorted(re.findall(r"\d+\.\d+\.\d+", named[1])) == sorted([*torches, *tritons])
    assert pin("dev", "triton") == pin("torch-newest", "triton")
