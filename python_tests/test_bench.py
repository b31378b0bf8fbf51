"""The benchmarks' own promises: the README's table is what the CSV says, and no figure is printed without its check."""

import json
from pathlib import Path
from typing import Any

import pytest
from process_helpers import ROOT, module_of, run_python


def bench_module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return module_of(ROOT / "bench" / f"{name}.py", f"bench_under_test_{name}")


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
    columns = "job,contender,p20_ms,p50_ms,p80_ms,ratio,bar,objective\n"
    assert (tmp_path / "out.csv").read_text().startswith(columns)


def test_what_is_asked_beside_a_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harness = bench_module("harness", monkeypatch)

    def eats() -> int:
        return len(b"1" * (32 << 20))

    job = harness.Job("eat", {"ours": eats}, lambda: None, {}, most_ms=1e-6, most_mb=8.0)
    assert harness.report(harness.time_job(job, 1), [], None) == 0
    printed = capsys.readouterr().out
    assert "at most 1e-06 ms NOT MET" in printed and "at most 8 MB NOT MET" in printed
    assert 30 < harness.peak_mb(eats) < 40


@pytest.mark.slow
def test_gpu_check_survives_planted_faults(tmp_path: Path) -> None:
    """A crash, a hang, a missing library, a wrong result: each ends its own phase, and is reported."""
    done = run_python("bench/gpu_check.py", "--rehearse", "--out", str(tmp_path))
    assert "rehearsed: every planted fault ended its own phase only" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "clean" / "results.jsonl").read_text().splitlines()]
    timed = [line for line in lines if line["phase"] == "speed" and line.get("what") == "ours"]
    assert len(timed) >= 25 and all(line["passed"] and line["us"] > 0 for line in timed)
    assert any("test" in line and line["outcome"] == "passed" for line in lines)


def test_gpu_check_without_a_gpu_ends_at_once(tmp_path: Path) -> None:
    done = run_python(
        "bench/gpu_check.py", "--out", str(tmp_path), "--device", "cuda", status=3, CUDA_VISIBLE_DEVICES=""
    )
    assert "phase load: 1" in done.stdout and "speed" not in done.stdout


def test_gpu_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpu.context import append
    from gpu.report import table

    case = "covariance 65536x128 fp32"
    append(tmp_path, phase="load", environment={"gpu": "NVIDIA H100 80GB HBM3"})
    append(tmp_path, phase="load", ceilings={"copy": 3e12})
    ours = {"phase": "speed", "case": case, "what": "ours", "passed": True, "error": 1e-7, "eager_error": 1e-7}
    append(tmp_path, **ours, timer="graph", p20=40.0, us=50.0, p80=60.0, from_python_us=90.0)
    append(tmp_path, phase="peers", case=case, what="eager", timer="graph", us=100.0)
    append(tmp_path, phase="peers", case=case, what="torch.compile", failed="RuntimeError: no")
    append(tmp_path, phase="peers", ended="crashed, signal 11", seconds=3.0)
    text = table(tmp_path)
    assert "50.0 us [40.0, 60.0] (graph), from Python 90" in text and "goal 20 NOT MET" in text
    assert "eager: 100.0 us (graph), 2.00x ours" in text and "torch.compile: no time: RuntimeError: no" in text
    assert "phase peers: crashed, signal 11, 3.0 s" in text


def test_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = bench_module("roofline", monkeypatch)
    gpu = roofline.Gpu("test", bandwidth=1e12, rates={"fp32": 1e12}, launch=1e-6, step=1e-6)
    assert roofline.Work(3e6, 2e6).floor(gpu) == (pytest.approx(3e-6), "memory")
    assert roofline.Work(1e6, 5e6).floor(gpu) == (pytest.approx(5e-6), "fp32")
    assert roofline.Work(1e6, 2e6, launches=4).floor(gpu) == (pytest.approx(4e-6), "launches")
    assert roofline.Work(1e6, 2e6, steps=7).floor(gpu) == (pytest.approx(7e-6), "steps")
    lines = roofline.table(gpu, {"sum": roofline.Work(3e6)}, {"sum": 6.0})
    assert "50 %" in lines[1]
