"""The wall-clock study's arithmetic, on hand-made cells."""

import sys
from pathlib import Path

import pytest

from spectral_kernels.training.compare import RunRecord

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import study


def record(strategy: str, seed: int, accuracy: list[float], step_seconds: float = 0.1) -> RunRecord:
    steps = [
        {"loss": 1.0, "effective_rank": 5.0 if step % 10 == 0 else float("nan"), "chosen": 1.0, "selection": 0.0,
         "data": 0.0, "compute": step_seconds}
        for step in range(50 * (len(accuracy) - 1))
    ]  # fmt: skip
    evaluations = [
        {"step": 50 * place, "seconds": 5.0 * place, "linear": value, "knn20": 0.5, "knn200": 0.5}
        for place, value in enumerate(accuracy)
    ]
    return RunRecord(strategy, seed, steps, evaluations)


def test_suspended_steps_count_as_the_usual_one(tmp_path: Path) -> None:
    one = record("random", 0, [0.5, 0.6, 0.7])
    one.steps[70]["compute"] = 500.0
    rows = study.cell_rows(one)
    assert [row["seconds"] for row in rows] == [0.0, 5.0, 10.0]
    assert [row["suspended"] for row in rows] == [0, 0, 1]
    assert rows[1]["effective_rank"] == 5.0
    path = tmp_path / "greedy-64+whiten-seed12.csv"
    study.write_csv(path, rows)
    read = study.read_cell(path)
    assert (read.strategy, read.seed, read.evaluations[2]["linear"]) == ("greedy-64+whiten", 12, 0.7)


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random reaches 70 at step 400 of 600; greedy-64 at 200, with steps 10 % longer; greedy-4 never."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    slow = [0.5, *(0.62 + 0.01 * k for k in range(1, 13))]
    fast = [0.5, *(0.66 + 0.01 * k for k in range(1, 13))]
    for seed in range(5):
        for name, accuracy, seconds in (
            ("random", slow, 0.1),
            ("greedy-64", fast, 0.11),
            ("greedy-4", [0.5] * 13, 0.1),
        ):
            study.write_csv(
                study.cell_path("long_tail", name, seed), study.cell_rows(record(name, seed, accuracy, seconds))
            )
    config, target, lines = study.lines_of("long_tail")
    assert config.train.steps == 600 and target == pytest.approx(0.70)
    found = {line.strategy: line for line in lines}
    assert set(found) == {"random", "greedy-64", "greedy-4"}
    assert found["random"].steps == 400 and found["random"].saved is None
    fast_line = found["greedy-64"]
    assert (fast_line.steps, fast_line.reached, fast_line.seeds) == (200, 5, 5)
    assert fast_line.saved == pytest.approx((1 - 22 / 40,) * 3)
    assert fast_line.slower == pytest.approx(10, abs=1e-6)
    assert found["greedy-4"].reached == 0 and found["greedy-4"].saved == pytest.approx((1 - 60 / 40,) * 3)
    assert "| greedy-64 | 5 | 5 | 200 | 45 [45, 45] | 10.0 |" in study.markdown()


def test_the_committed_tables_are_those_of_the_csvs() -> None:
    text = (Path(study.ROOT) / "docs" / "wall_clock.md").read_text(encoding="utf-8")
    table = text.split(study.BEGIN)[1].split(study.END)[0]
    assert table.strip() == study.markdown().strip(), "run python bench/study.py report"
