"""The report on the installation: complete, useful, and there whatever is broken."""

import json

import pytest
import torch
from process_helpers import run_python

from spectral_kernels import info
from spectral_kernels.dispatch import backends


def test_json_is_what_collect_returns() -> None:
    assert json.loads(run_python("-m", "spectral_kernels.info", "--json").stdout).keys() == info.collect().keys()


def test_every_op_and_its_backend_is_reported() -> None:
    text = "\n".join(info.report(info.collect()))
    for name in backends.OPS:
        if not name.endswith("_backward"):
            (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
            assert line.split()[1] == backends.choose(name, torch.device("cpu"))


def test_shared_code_is_reported() -> None:
    (line,) = (line for line in info.report(info.collect()) if "runs on cpp, triton, cuda too" in line)
    assert "spectrum_backward" in line


def test_library_and_path_are_reported() -> None:
    found = info.collect()
    assert found["library"]["built"]
    assert found["library"]["loaded"]
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in found["library"]["flags"]
    assert found["cpu"]["path"] in ("avx512", "avx2", "baseline")


def test_loops_of_the_library_run_in_parallel() -> None:
    assert torch.ops.spectral_kernels_cpp.parallel_threads(64) == torch.get_num_threads()


def test_forced_backend_that_cannot_run_is_reported() -> None:
    done = run_python("-m", "spectral_kernels.info", SPECTRAL_KERNELS_BACKEND="cuda")
    assert "refused: backend 'cuda' cannot run greedy_select" in done.stdout


@pytest.mark.parametrize("section", ["_library", "_cpu", "_gpu", "_ops", "_versions"])
def test_a_section_that_fails_leaves_the_others(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(info, section, fail)
    text = "\n".join(info.report(info.collect()))
    assert text.count("cannot be told (RuntimeError: no such thing)") == 1


def test_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CPP_ERROR", "the C++ library was not built")
    monkeypatch.setattr(info, "_found", lambda module: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "\n".join(info.report(info.collect()))
    for command in (
        "pip install --no-build-isolation --no-deps --force-reinstall .",
        "pip install triton",
        "pip install matplotlib scikit-learn tqdm PyYAML",
    ):
        assert command in text
