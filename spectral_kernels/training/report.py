"""What a comparison found: figures with intervals, a table for the terminal, CSV and JSON files."""

import itertools
import math
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import spectral_kernels
from spectral_kernels.files.writing import write_csv, write_json
from spectral_kernels.training.clock import PARTS
from spectral_kernels.training.compare import RunRecord
from spectral_kernels.training.config import Config
from spectral_kernels.training.evaluate import METRICS

FEW_SEEDS = 5
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, with the 95 % bootstrap interval of that mean (None for one seed)."""

    mean: float
    low: float | None
    high: float | None
    values: list[float]


@dataclass(frozen=True)
class StrategySummary:
    """A strategy over its seeds.

    reached: of how many seeds. time_to_target (seconds), steps_to_target: of the first of two evaluations
    in a row at or above the target; None unless all seeds reached it. time_ratio: time to target over
    random's, seed by seed; None where one of both did not reach it in every seed. final: accuracy by
    metric. effective_rank: order 2, of the batches of the second half of the run. ms: per step by part.
    overhead: selection in % of the step's time, over the steps whose batch the strategy chose (all steps
    for random).
    """

    strategy: str
    seeds: int
    reached: int
    time_to_target: Estimate | None
    steps_to_target: Estimate | None
    time_ratio: Estimate | None
    final: dict[str, Estimate]
    effective_rank: Estimate | None
    ms: dict[str, Estimate]
    overhead: Estimate


@dataclass(frozen=True)
class Summary:
    """A comparison. target: linear probe accuracy; untrained: accuracy by metric, before any step."""

    target: float
    untrained: dict[str, Estimate]
    strategies: list[StrategySummary]


def bootstrap(values: Sequence[float]) -> Estimate:
    """Mean of `values` and its 95 % percentile-bootstrap interval; deterministic."""
    values = [float(value) for value in values]
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None, values)
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Estimate(mean, means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))], values)


def target_accuracy(records: Iterable[RunRecord], config: Config) -> float:
    """`compare.target`, or the mean over seeds of what `random` has reached at `target_share` of the
    budget: of its last evaluation up to there (its first one after the start where there is none)."""
    if config.compare.target is not None:
        return config.compare.target
    key, budget = ("step", config.train.steps) if config.train.steps else ("seconds", config.train.seconds)
    assert budget is not None
    reached = []
    for record in records:
        if record.strategy == "random":
            trained = [row for row in record.evaluations if row["step"] > 0]
            before = [row for row in trained if row[key] <= config.compare.target_share * budget]
            reached.append((before or trained[:1])[-1]["linear"])
    return statistics.fmean(reached)


def first_reach(record: RunRecord, target: float) -> dict[str, float] | None:
    """The first of two evaluations in a row at or above the target, the untrained encoder's left out."""
    trained = [row for row in record.evaluations if row["step"] > 0]
    for row, following in itertools.pairwise(trained):
        if row["linear"] >= target and following["linear"] >= target:
            return row
    return None


def summarise(records: Sequence[RunRecord], config: Config) -> Summary:
    """The figures of a comparison; `records` hold every strategy with every seed."""
    target = target_accuracy(records, config)
    of = {name: [record for record in records if record.strategy == name] for name in config.compare.strategies}
    start = next(iter(of.values()))
    untrained = {metric: bootstrap([record.evaluations[0][metric] for record in start]) for metric in METRICS}
    baseline = [first_reach(record, target) for record in of.get("random", [])]
    strategies = [_summarise(name, runs, target, baseline) for name, runs in of.items()]
    return Summary(target, untrained, strategies)


def _summarise(
    name: str, runs: Sequence[RunRecord], target: float, baseline: Sequence[dict[str, float] | None]
) -> StrategySummary:
    reached = [row for run in runs if (row := first_reach(run, target)) is not None]
    everywhere = len(reached) == len(runs)
    usual = [row for row in baseline if row is not None]
    ratio = None
    if everywhere and len(usual) == len(runs):
        ratio = bootstrap([own["seconds"] / base["seconds"] for own, base in zip(reached, usual, strict=True)])
    ranks = [_mean_rank(run) for run in runs]
    return StrategySummary(
        strategy=name,
        seeds=len(runs),
        reached=len(reached),
        time_to_target=bootstrap([row["seconds"] for row in reached]) if everywhere else None,
        steps_to_target=bootstrap([row["step"] for row in reached]) if everywhere else None,
        time_ratio=ratio,
        final={metric: bootstrap([run.evaluations[-1][metric] for run in runs]) for metric in METRICS},
        effective_rank=None if any(math.isnan(rank) for rank in ranks) else bootstrap(ranks),
        ms={part: bootstrap([1e3 * _mean(run, part) for run in runs]) for part in PARTS},
        overhead=bootstrap([_overhead(run) for run in runs]),
    )


def _mean(run: RunRecord, part: str) -> float:
    return statistics.fmean(row[part] for row in run.steps)


def _mean_rank(run: RunRecord) -> float:
    """Mean measured effective rank over the second half of the run; NaN if there is none."""
    half = run.steps[len(run.steps) // 2 :]
    ranks = [row["effective_rank"] for row in half if not math.isnan(row["effective_rank"])]
    return statistics.fmean(ranks) if ranks else math.nan


def _overhead(run: RunRecord) -> float:
    rows = [row for row in run.steps if row["chosen"]] or run.steps
    total = sum(row[part] for row in rows for part in PARTS)
    return 100 * sum(row["selection"] for row in rows) / total


# --- the terminal


def format_estimate(estimate: Estimate | None, digits: int, scale: float = 1.0, missing: str = "-") -> str:
    """`85.4 [85.1, 85.7]`, or without an interval for one seed; no decimals above 100, so that columns stay narrow."""
    if estimate is None:
        return missing
    if scale * max(estimate.mean, estimate.high or 0) > 100:
        digits = 0
    text = f"{scale * estimate.mean:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{scale * estimate.low:.{digits}f}, {scale * estimate.high:.{digits}f}]"


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text columns: the first to the left, the others to the right."""
    rows = list(rows)
    first, *others = (max(map(len, column)) for column in zip(header, *rows, strict=True))
    lines = (header, ["-" * width for width in (first, *others)], *rows)
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]).rstrip() for line in lines)


def table(summary: Summary, config: Config, dataset: str) -> str:
    """The comparison for a terminal."""
    seeds = len(config.compare.seeds)
    accuracy = aligned(
        ["final accuracy, %", "linear probe", "kNN-20", "kNN-200"],
        [
            [name, *(format_estimate(scores[metric], 1, 100) for metric in METRICS)]
            for name, scores in (
                ("untrained encoder", summary.untrained),
                *((strategy.strategy, strategy.final) for strategy in summary.strategies),
            )
        ],
    )
    reaching = aligned(
        ["to the target", "seconds", "steps", "seconds / random's"],
        [_target_row(strategy) for strategy in summary.strategies],
    )
    speed = aligned(
        ["per step", "selection ms", "data ms", "compute ms", "overhead, %", "effective rank"],
        [
            [
                strategy.strategy,
                *(format_estimate(strategy.ms[part], 1) for part in PARTS),
                format_estimate(strategy.overhead, 1),
                format_estimate(strategy.effective_rank, 1),
            ]
            for strategy in summary.strategies
        ],
    )
    notes = (
        "overhead: selection in % of the time of the steps whose batch was chosen. effective rank: of order\n"
        f"2, of the batches of the second half. {_interval_note(seeds)}"
    )
    return "\n\n".join([_headline(summary, config, dataset), accuracy, reaching, speed, notes])


def _target_row(strategy: StrategySummary) -> list[str]:
    if not strategy.reached:
        return [strategy.strategy, "not reached", "not reached", "-"]
    missing = f"reached by {strategy.reached} of {strategy.seeds}"
    return [
        strategy.strategy,
        format_estimate(strategy.time_to_target, 1, missing=missing),
        format_estimate(strategy.steps_to_target, 0, missing=missing),
        format_estimate(strategy.time_ratio, 2),
    ]


def run_table(record: RunRecord) -> str:
    """One run for a terminal: accuracies before and after, and where a step's time goes."""
    accuracy = aligned(
        ["accuracy, %", "linear probe", "kNN-20", "kNN-200"],
        [
            [label, *(f"{100 * row[metric]:.1f}" for metric in METRICS)]
            for label, row in (
                ("untrained encoder", record.evaluations[0]),
                ("trained", record.evaluations[-1]),
            )
        ],
    )
    parts = ", ".join(f"{part} {1e3 * _mean(record, part):.1f} ms" for part in PARTS)
    return f"{accuracy}\n\nper step: {parts}; selection overhead {_overhead(record):.1f} %"


def budget(config: Config) -> str:
    """`500 steps` or `60 s`."""
    return f"{config.train.steps} steps" if config.train.steps else f"{config.train.seconds:g} s"


def _headline(summary: Summary, config: Config, dataset: str) -> str:
    seeds = len(config.compare.seeds)
    origin = "as set"
    if config.compare.target is None:
        origin = f"what random reaches at {100 * config.compare.target_share:.0f} % of the budget"
    return (
        f"{dataset}, {config.model.encoder}, batch {config.train.batch_size}, {budget(config)} a run, "
        f"{seeds} seed{'s' if seeds > 1 else ''}.\n"
        f"Target: linear probe {100 * summary.target:.1f} %, {origin}; reached at the first of two\n"
        "evaluations in a row at or above it. Seconds are training wall-clock."
    )


def _interval_note(seeds: int) -> str:
    if seeds == 1:
        return "One seed: no intervals, and differences between strategies may be chance."
    note = f"[low, high]: 95 % bootstrap intervals\nover {seeds} seeds"
    few = "; with so few seeds they say little more than the range of what was seen" if seeds < FEW_SEEDS else ""
    return f"{note}{few}."


# --- files


def write(folder: Path, records: Sequence[RunRecord], summary: Summary, config: Config, dataset: str) -> list[Path]:
    """Write results.csv, steps.csv and summary.json; returns their paths."""
    settings = config.to_dict()
    del settings["data"]["root"]  # says where on this machine, not what
    content = {"data": dataset, **asdict(summary), "config": settings, "environment": environment()}
    digest = folder / "summary.json"
    files = [*write_runs(folder, records), digest]
    write_json(digest, content)
    return files


def write_runs(folder: Path, records: Sequence[RunRecord]) -> list[Path]:
    """Write results.csv, one row an evaluation, and steps.csv, one row a step; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results, steps = folder / "results.csv", folder / "steps.csv"
    runs = [({"strategy": record.strategy, "seed": record.seed}, record) for record in records]
    write_csv(results, ({**run, **row} for run, record in runs for row in record.evaluations))
    write_csv(
        steps,
        ({**run, "step": step, **_step_row(row)} for run, record in runs for step, row in enumerate(record.steps)),
    )
    return [results, steps]


def _step_row(row: dict[str, float]) -> dict[str, object]:
    rank = row["effective_rank"]
    return {
        "loss": row["loss"],
        "effective_rank": "" if math.isnan(rank) else rank,
        "chosen": int(row["chosen"]),
        **{f"{part}_ms": round(1e3 * row[part], 4) for part in PARTS},
    }


def environment() -> dict[str, object]:
    """What the figures were made with; nothing that names the machine."""
    return {
        "spectral_kernels": spectral_kernels.__version__,
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def git_commit() -> str | None:
    """The commit of the source tree that the package runs from, None where it is installed or there is no git."""
    tree = Path(spectral_kernels.__file__).parent.parent
    if not (tree / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
