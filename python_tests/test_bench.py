"""The benchmarks' own promises: the README's table is what the CSV says, and no figure is printed without its check."""

import importlib.util
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
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "job,contender,p20_ms,p50_ms,p80_ms,ratio,bar,objective"
