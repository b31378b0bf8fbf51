"""A comparison from end to end, and its figures against hand-made records."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_helpers import blobs, settings

from spectral_kernels import plots
from spectral_kernels.training import compare, report
from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.checkpoint import CheckpointError
from spectral_kernels.training.clock import PARTS
from spectral_kernels.training.compare import Comparison, RunRecord
from spectral_kernels.training.config import Config
from spectral_kernels.training.evaluate import METRICS
from spectral_kernels.training.loop import Run
from spectral_kernels.training.run_state import STEP_COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:the memory bank is cold")


def small() -> Config:
    return settings(
        train={"steps": 4, "checkpoint_every": 2},
        evaluate={"every": 2},
        compare={"strategies": ["random", "pool-balanced", "greedy-4"], "seeds": [0, 1], "target_share": 0.5},
    )


class Log(Callback):
    """What happened, in order; `stop` raises at a step of a run."""

    def __init__(self, stop: tuple[str, int, int] | None = None) -> None:
        self.stop, self.steps, self.opened_at = stop, [], []  # type: ignore[var-annotated]
        self.read: list[tuple[str, int]] = []

    def opened(self, run: Run) -> None:
        self.opened_at.append((run.strategy.name, run.config.train.seed, run.step))

    def step(self, run: Run) -> None:
        self.steps.append((run.strategy.name, run.config.train.seed, run.step))
        if self.steps[-1] == self.stop:
            raise KeyboardInterrupt

    def skipped(self, record: RunRecord) -> None:
        self.read.append((record.strategy, record.seed))


def without_clock(records: list[RunRecord]) -> list[object]:
    out: list[object] = []
    for record in records:
        steps = [[str(value) for key, value in row.items() if key not in PARTS] for row in record.steps]
        evaluations = [{k: v for k, v in row.items() if k != "seconds"} for row in record.evaluations]
        out.append((record.strategy, record.seed, steps, evaluations))
    return out


@pytest.mark.parametrize("turn, blocks", [(1, ((1,), (2,), (3,), (4,))), (10, ((1, 2), (3, 4)))])
def test_runs_take_turns(
    turn: int, blocks: tuple[tuple[int, ...], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "TURN", turn)
    log = Log()
    records = Comparison(small(), blobs(), tmp_path).records([log])
    first, second = ["random", "pool-balanced", "greedy-4"], ["pool-balanced", "greedy-4", "random"]
    assert [(record.strategy, record.seed) for record in records] == [(name, seed) for seed in (0, 1) for name in first]
    turns = [(seed, names, block) for seed, names in ((0, first), (1, second)) for block in blocks]
    assert log.steps == [(name, seed, step) for seed, names, block in turns for name in names for step in block]
    for record in records:
        assert [row["step"] for row in record.evaluations] == [0, 2, 4]
        assert len(record.steps) == 4


def test_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    config, data = small(), blobs()
    whole = Comparison(config, data, tmp_path / "whole").records()
    with pytest.raises(KeyboardInterrupt):
        Comparison(config, data, tmp_path / "parts").records([Log(stop=("greedy-4", 1, 3))])
    log = Log()
    parts = Comparison(config, data, tmp_path / "parts").records([log])
    assert log.read == [("random", 0), ("pool-balanced", 0), ("greedy-4", 0), ("pool-balanced", 1)]
    assert log.opened_at == [("greedy-4", 1, 2), ("random", 1, 2)]
    assert log.steps == [("greedy-4", 1, 3), ("greedy-4", 1, 4), ("random", 1, 3), ("random", 1, 4)]
    assert without_clock(parts) == without_clock(whole)

    read_again = Log()
    again = Comparison(config, data, tmp_path / "parts").records([read_again])
    assert repr(again) == repr(parts)  # to the clock's last digit; NaN equals NaN in text only
    assert read_again.steps == []
    assert len(read_again.read) == 6


def test_fresh_and_other_settings(tmp_path: Path) -> None:
    config, data = small(), blobs()
    config = replace(config, compare=replace(config.compare, strategies=("random",), seeds=(0,)))
    Comparison(config, data, tmp_path).records()
    other = replace(config, train=replace(config.train, temperature=0.5))
    with pytest.raises(CheckpointError, match=r"train\.temperature is 0\.2 there and 0\.5 here"):
        Comparison(other, data, tmp_path).records()
    fresh = Comparison(other, data, tmp_path)
    fresh.forget()
    log = Log()
    fresh.records([log])
    assert len(log.steps) == 4


def test_more_strategies_later(tmp_path: Path) -> None:
    """Runs that are there count, whatever was compared before."""
    config, data = small(), blobs()
    fewer = replace(config, compare=replace(config.compare, strategies=("random",)))
    Comparison(fewer, data, tmp_path).records()
    log = Log()
    Comparison(config, data, tmp_path).records([log])
    assert log.read == [("random", 0), ("random", 1)]
    assert {name for name, _, _ in log.steps} == {"pool-balanced", "greedy-4"}


# --- figures


def record(strategy: str, seed: int, linear: list[float], pace: float = 1.0, chosen: int = 1) -> RunRecord:
    """Evaluations every 10 steps of `pace` seconds each; a tenth of a step's time is selection."""
    evaluations = [
        {"step": 10 * i, "seconds": 10 * i * pace, "linear": value, "knn20": value - 0.1, "knn200": value - 0.2}
        for i, value in enumerate(linear)
    ]
    step = {"loss": 1.0, "chosen": chosen, "selection": 0.1 * pace, "data": 0.2 * pace, "compute": 0.7 * pace}
    steps = [step | {"effective_rank": float(i) if i % 2 == 0 else math.nan} for i in range(10 * len(linear) - 10)]
    return RunRecord(strategy, seed, steps, evaluations)


def judged(**changes: object) -> Config:
    config = settings(train={"steps": 50}, evaluate={"every": 10}, compare={"strategies": ["random", "greedy-4"]})
    return replace(config, compare=replace(config.compare, **changes))  # type: ignore[arg-type]


RANDOM = [
    record("random", 0, [0.50, 0.60, 0.70, 0.75, 0.80, 0.82]),
    record("random", 1, [0.52, 0.62, 0.72, 0.79, 0.84, 0.86]),
]
GREEDY = [
    record("greedy-4", 0, [0.50, 0.83, 0.80, 0.83, 0.84, 0.85], pace=1.1),
    record("greedy-4", 1, [0.52, 0.70, 0.83, 0.84, 0.85, 0.86], pace=1.1),
]


def test_target_and_time_to_it() -> None:
    summary = report.summarise([*RANDOM, *GREEDY], judged())
    assert summary.target == pytest.approx(0.82)  # mean of random's 0.80 and 0.84 at step 40, 80 % of 50
    random, greedy = summary.strategies
    # seed 0 touches it at its last evaluation only: no second one in a row
    assert random.reached == 1 and random.time_to_target is None
    assert greedy.reached == 2
    assert greedy.steps_to_target.values == [30, 20]  # seed 0 was above at step 10, but fell back
    assert greedy.time_to_target.values == pytest.approx([33, 22])
    assert greedy.time_ratio is None


@pytest.mark.parametrize("pace", [1e-4, 0.5, 10.0])
def test_the_table_fits_a_terminal_however_slow_the_machine(pace: float) -> None:
    names, accuracy = ("random", "pool-balanced", "greedy-8"), [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    runs = [record(name, seed, accuracy, pace * (1 + seed)) for name in names for seed in (0, 1)]
    config = judged(target=0.65, strategies=names)
    text = report.table(report.summarise(runs, config), config, "blobs")
    assert max(map(len, text.splitlines())) <= 110


def test_time_ratio_is_paired() -> None:
    summary = report.summarise([*RANDOM, *GREEDY], judged(target=0.7))
    random, greedy = summary.strategies
    assert random.time_to_target.values == [20, 20]
    assert greedy.time_ratio.values == pytest.approx([11 / 20, 11 / 20])
    assert random.time_ratio.mean == 1


def test_untrained_evaluation_does_not_count_as_reached() -> None:
    assert report.first_reach(record("random", 0, [0.9, 0.1, 0.1]), 0.5) is None
    assert report.first_reach(record("random", 0, [0.9, 0.6, 0.1]), 0.5) is None


def test_target_of_a_budget_in_seconds() -> None:
    config = judged()
    config = replace(config, train=replace(config.train, steps=None, seconds=50.0))
    runs = [record("random", 0, [0.5, 0.6, 0.7, 0.8], pace=2.0)]  # evaluations at 20, 40, 60 s; the target at 40
    assert report.target_accuracy(runs, config) == pytest.approx(0.7)


def test_not_reached_is_said() -> None:
    config = judged(target=0.99)
    text = report.table(report.summarise([*RANDOM, *GREEDY], config), config, "blobs")
    assert text.count("not reached") == 4
    partly = judged(target=0.82)
    text = report.table(report.summarise([*RANDOM, *GREEDY], partly), partly, "blobs")
    assert "reached by 1 of 2" in text
    assert "with so few seeds" in text


def test_overhead_and_rank() -> None:
    mixed = record("greedy-4", 0, [0.5, 0.6, 0.7])
    for row in mixed.steps[:10]:  # a cold bank: random, and cheap
        row.update(chosen=0, selection=0.0)
    summary = report.summarise([record("random", 0, [0.5, 0.6, 0.7], chosen=0), mixed], judged(seeds=(0,), target=0.6))
    random, greedy = summary.strategies
    assert greedy.overhead.mean == pytest.approx(10)
    assert random.overhead.mean == pytest.approx(10)
    assert greedy.ms["selection"].mean == pytest.approx(50)  # of all steps
    assert greedy.effective_rank.mean == pytest.approx(14)  # 10, 12, … 18
    assert "One seed: no intervals" in report.table(summary, judged(seeds=(0,), target=0.6), "blobs")


def test_bootstrap() -> None:
    one = report.bootstrap([3.0])
    assert (one.mean, one.low, one.high) == (3.0, None, None)
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    estimate = report.bootstrap(values)
    assert estimate == report.bootstrap(values)
    spread = 1.96 * float(torch.tensor(values).std()) / 40**0.5
    assert estimate.low == pytest.approx(estimate.mean - spread, abs=0.06)
    assert estimate.high == pytest.approx(estimate.mean + spread, abs=0.06)
    assert report.bootstrap([1.0, 2.0]).low == 1.0
    assert report.bootstrap([1.0, 2.0]).high == 2.0


def test_comparisons_that_cannot_be_judged() -> None:
    for changes, message in (
        ({"strategies": ("greedy-4",)}, "has no 'random' to take the target from"),
        ({"target_share": 0.1}, r"evaluate\.every = 10 leaves no evaluation .* 0\.1 of 50"),
        ({"strategies": ("random", "pool-low+window")}, r"strategy 'pool-low\+window' needs selection\.window"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.check(judged(**changes))
    compare.check(judged(strategies=("greedy-4",), target=0.5))


# --- files


def test_files(tmp_path: Path) -> None:
    config = replace(judged(), data=replace(judged().data, root="/a/secret/place"))
    records = [*RANDOM, *GREEDY]
    summary = report.summarise(records, config)
    results, steps, digest = report.write(tmp_path, records, summary, config, "blobs")

    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["strategy", "seed", "step", "seconds", *METRICS]
    assert len(rows) == 4 * 6
    assert (rows[7]["strategy"], rows[7]["seed"], rows[7]["step"], rows[7]["linear"]) == ("random", "1", "10", "0.62")

    with steps.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "strategy", "seed", "step", "loss", "effective_rank", "chosen", "selection_ms", "data_ms", "compute_ms",
    ]  # fmt: skip
    assert len(rows) == 4 * 50
    assert rows[1]["effective_rank"] == ""
    assert float(rows[0]["compute_ms"]) == pytest.approx(700)

    content = json.loads(digest.read_text())
    assert content["target"] == pytest.approx(0.82)
    assert [strategy["strategy"] for strategy in content["strategies"]] == ["random", "greedy-4"]
    assert content["strategies"][0]["time_to_target"] is None
    assert content["config"]["train"]["steps"] == 50
    assert content["environment"]["cpus"] > 0
    assert content["environment"]["torch"] == torch.__version__
    assert "secret" not in digest.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "steps.csv", "summary.json"]


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "comparison.png"
    records = [*RANDOM, *GREEDY]
    plots.comparison(path, records, report.summarise(records, judged()), judged(), "blobs")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000
    plots.comparison(path, records[:1], report.summarise(records[:1], judged(strategies=("random",))), judged(), "x")


def test_columns_are_those_of_the_loop() -> None:
    assert set(record("random", 0, [0.1, 0.2]).steps[0]) == set(STEP_COLUMNS)
