"""The benchmarks' own promises: the README's table is what the CSV says, and no figure is printed without its check."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def bench_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location(f"bench_under_test_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_readme_holds_the_table_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    table = bench_module("table", monkeypatch)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == table.with_table(readme, table.markdown()), "run python bench/table.py"


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = bench_module("harness", monkeypatch)
    calls = []

    def wrong() -> None:
        raise AssertionError("off by one")

    def right() -> None:
        calls.append("checked")

    timed = harness.Job("sum", {"ours": lambda: 3, "theirs": lambda: 4}, right, {"theirs": 1e9}, objective=float)
    rows = harness.time_job(timed, 3)
    assert calls == ["checked"] and [row.objective for row in rows] == [3.0, 4.0]
    with pytest.raises(AssertionError, match="off by one"):
        harness.time_job(harness.Job("sum", {"ours": lambda: 3}, wrong, {}), 3)
    assert harness.report(rows, ["sum: off by one"], tmp_path / "out.csv") == 1
    printed = capsys.readouterr()
    assert "NOT MET" in printed.out and "CHECK FAILED, not timed: sum: off by one" in printed.err
    assert (tmp_path / "out.csv").read_text().splitlines()[
        0
    ] == "job,contender,p20_ms,p50_ms,p80_ms,ratio,bar,objective"


def test_what_is_asked_beside_a_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harness = bench_module("harness", monkeypatch)

    def eats() -> int:
        return len(b"1" * (32 << 20))

    job = harness.Job("eat", {"ours": eats}, lambda: None, {}, most_ms=1e-6, most_mb=8.0)
    assert harness.report(harness.time_job(job, 1), [], None) == 0
    printed = capsys.readouterr().out
    assert "at most 1e-06 ms NOT MET" in printed and "at most 8 MB NOT MET" in printed
    assert 30 < harness.peak_mb(eats) < 40


def test_gpu_benchmark_goes_through_its_steps_without_one(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu.py", "--dry-run", "--no-build", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["dry_run"] and found["environment"]["torch"]
    assert len(found["rows"]) >= 25
    assert all(row["passed"] and row["ours_us"] > 0 and row["floor_us"] > 0 for row in found["rows"])
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == len(found["rows"]) + 1
    assert "no figure below means anything" in done.stdout


def test_gpu_benchmark_times_nothing_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = bench_module("gpu", monkeypatch)
    import spectral_kernels as sk

    monkeypatch.setattr(sk, "covariance", lambda z, normalize: 1.001 * z.mT @ z)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--dry-run", "--no-build", "--only", "covariance", "--out", str(tmp_path)]
    )
    assert gpu.main() == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not any(row["passed"] or row["ours_us"] for row in found["rows"])
    assert capsys.readouterr().out.count("NOT TIMED: error") == len(found["rows"])


def test_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = bench_module("roofline", monkeypatch)
    gpu = roofline.Gpu("test", bandwidth=1e12, rates={"fp32": 1e12}, launch=1e-6, step=1e-6)
    assert roofline.Work(3e6, 2e6).floor(gpu) == (pytest.approx(3e-6), "memory")
    assert roofline.Work(1e6, 5e6).floor(gpu) == (pytest.approx(5e-6), "fp32")
    assert roofline.Work(1e6, 2e6, launches=4).floor(gpu) == (pytest.approx(4e-6), "launches")
    assert roofline.Work(1e6, 2e6, steps=7).floor(gpu) == (pytest.approx(7e-6), "steps")
    lines = roofline.table(gpu, {"sum": roofline.Work(3e6)}, {"sum": 6.0})
    assert "50 %" in lines[1]
