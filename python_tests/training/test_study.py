"""The wall-clock study's arithmetic, on hand-made cells."""

import sys
from pathlib import Path

import pytest

from spectral_kernels.training.compare import RunRecord
from spectral_kernels.training.config import Config

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


@pytest.fixture(autouse=True)
def results(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "committed" not in request.node.name:
        monkeypatch.setattr(study, "RESULTS", tmp_path)


def test_suspended_steps_count_as_the_usual_one() -> None:
    one = record("random", 0, [0.5, 0.6, 0.7])
    one.steps[70]["compute"] = 500.0
    rows = study.cell_rows(one)
    assert [row["seconds"] for row in rows] == [0.0, 5.0, 10.0]
    assert [row["suspended"] for row in rows] == [0, 0, 1]
    assert rows[1]["effective_rank"] == 5.0
    study.write_cells("balanced", {("greedy-64+whiten", 12): rows})
    (read,) = study.read_records("balanced").values()
    assert (read.strategy, read.seed, read.evaluations[2]["linear"]) == ("greedy-64+whiten", 12, 0.7)


def test_new_cells_take_the_place_of_their_older_ones_alone() -> None:
    first, second = ([{"step": step, "linear": value} for step in (0, 50)] for value in (0.25, "0.10000"))
    study.write_cells("balanced", {("random", 10): first, ("random", 2): second})
    path = study.RESULTS / "balanced.csv"
    before = path.read_text()
    study.write_cells("balanced", {("random", 10): second, ("greedy-4", 3): second})
    assert path.read_text() == (
        "strategy,seed,step,linear\ngreedy-4,3,0,0.10000\ngreedy-4,3,50,0.10000\n" + before.split("\n", 1)[1]
    ).replace("0.25", "0.10000")


def test_a_run_makes_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Comparison:
        def __init__(self, config: Config, *_: object) -> None:
            asked.append((config.compare.strategies, *config.compare.seeds))

        def forget(self) -> None:
            asked.append("forget")

        def records(self, _: object) -> list[RunRecord]:
            names, seed = asked[-2 if asked[-1] == "forget" else -1][0], 3
            return [record(name, seed, [0.5, 0.6]) for name in names]

    monkeypatch.setattr(study, "Comparison", Comparison)
    monkeypatch.setattr(study, "load", lambda *_, **__: None)
    study.run("long_tail", ["greedy-4"], [3], again=False)
    assert list(study.read_cells("long_tail")) == [("greedy-4", 3)]
    study.run("long_tail", ["greedy-4", "random"], [3], again=False)
    study.run("long_tail", ["greedy-4", "random"], [3], again=False)
    study.run("long_tail", ["random"], [3], again=True)
    assert asked == [(("random", "greedy-4"), 3), (("random",), 3), (("random",), 3), "forget"]
    assert list(study.read_cells("long_tail")) == [("greedy-4", 3), ("random", 3)]


def test_lines() -> None:
    """Random reaches 70 at step 400 of 600; greedy-64 at 200, with steps 10 % longer; greedy-4 never."""
    slow = [0.5, *(0.62 + 0.01 * k for k in range(1, 13))]
    fast = [0.5, *(0.66 + 0.01 * k for k in range(1, 13))]
    for seed in range(5):
        for name, accuracy, seconds in (
            ("random", slow, 0.1),
            ("greedy-64", fast, 0.11),
            ("greedy-4", [0.5] * 13, 0.1),
        ):
            study.write_cells("long_tail", {(name, seed): study.cell_rows(record(name, seed, accuracy, seconds))})
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
