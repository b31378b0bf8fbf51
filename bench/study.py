"""The wall-clock study of docs/wall_clock.md: nine strategies, five seeds, three forms of Fashion-MNIST.

    python bench/study.py run                                        all that is missing, hours
    python bench/study.py run long_tail --strategy greedy-64 --seed 3 --again     one cell, beside its random run
    python bench/study.py overhead                                   what selecting adds to a step, 5 minutes
    python bench/study.py report                                     tables and picture from the CSVs

The forms are bench/study/*.yaml, written before the runs; targets and budgets are theirs. A cell is one strategy with one
seed; bench/results/study/FORM.csv has a row for each of its evaluations. Runs are resumed from runs/study.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from table import as_table, between_marks

from spectral_kernels.figures import BASELINE, COLOURS, drawing
from spectral_kernels.files.writing import write_csv, write_text
from spectral_kernels.training.clock import PARTS
from spectral_kernels.training.compare import Comparison, RunRecord
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import load
from spectral_kernels.training.evaluate import METRICS
from spectral_kernels.training.loop import Run
from spectral_kernels.training.progress import Progress
from spectral_kernels.training.report import RESAMPLES, bootstrap, first_reach, format_estimate, target_accuracy
from spectral_kernels.training.settings import read_config

ROOT = Path(__file__).parent.parent
FORMS = {path.stem: path for path in sorted((ROOT / "bench" / "study").glob("*.yaml"))}
RESULTS = ROOT / "bench" / "results" / "study"
RUNS = Path("runs") / "study"
# a step of this many times the median did not compute all that time: the machine had put the process to sleep
SUSPENDED = 10


def cell_rows(record: RunRecord) -> list[dict[str, Any]]:
    """A row an evaluation; seconds are cumulated training time, a suspended step counting as the median one."""
    totals = [sum(row[part] for part in PARTS) for row in record.steps]
    usual = statistics.median(totals)
    rows = []
    for evaluation in record.evaluations:
        done = int(evaluation["step"])
        before = int(rows[-1]["step"]) if rows else 0
        kept = [row for row, total in zip(record.steps[:done], totals, strict=False) if total <= SUSPENDED * usual]
        scale = done / len(kept) if kept else 0.0
        parts = {part: scale * sum(row[part] for row in kept) for part in PARTS}
        ranks = [
            row["effective_rank"] for row in record.steps[before:done] if row["effective_rank"] == row["effective_rank"]
        ]
        rows.append({
            "step": done, "seconds": round(sum(parts.values()), 4),
            **{part: round(seconds, 4) for part, seconds in parts.items()}, "suspended": done - len(kept),
            "effective_rank": round(statistics.fmean(ranks), 4) if ranks else "",
            **{metric: round(evaluation[metric], 5) for metric in METRICS},
        })  # fmt: skip
    return rows


Cells = dict[tuple[str, int], list[dict[str, Any]]]


def read_cells(form: str) -> Cells:
    """The rows of a form's cells, by strategy and seed, as they are written."""
    path, cells = RESULTS / f"{form}.csv", Cells()
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                cells.setdefault((row.pop("strategy"), int(row.pop("seed"))), []).append(row)
    return cells


def write_cells(form: str, new: Cells) -> None:
    """Add cells to a form's, in the place of older ones."""
    cells = sorted((read_cells(form) | new).items())
    write_csv(
        RESULTS / f"{form}.csv",
        ({"strategy": strategy, "seed": seed, **row} for (strategy, seed), rows in cells for row in rows),
    )


def read_records(form: str) -> dict[tuple[str, int], RunRecord]:
    """The evaluations of a form's cells; steps are not kept."""
    return {
        (strategy, seed): RunRecord(
            strategy, seed, [], [{name: float(value or "nan") for name, value in row.items()} for row in rows]
        )
        for (strategy, seed), rows in read_cells(form).items()
    }


def run(form: str, strategies: Sequence[str], seeds: Sequence[int], again: bool) -> None:
    """Run the cells that are missing, seed by seed, random beside them: wall-clock is compared within a seed."""
    config = read_config(FORMS[form])
    data = load(config.data.name, config.data.root, download=config.data.download)
    there = read_cells(form).keys()
    for seed in seeds or config.compare.seeds:
        wanted = [name for name in config.compare.strategies if not strategies or name in strategies]
        missing = [name for name in wanted if again or (name, seed) not in there]
        if not missing:
            continue
        names = tuple(dict.fromkeys(["random", *missing]))
        part = replace(config, compare=replace(config.compare, strategies=names, seeds=(seed,)))
        comparison = Comparison(part, data, RUNS / form / ("again" if again else ""))
        if again:
            comparison.forget()
        with Progress(config.train, len(names)) as progress:
            records = comparison.records([progress])
        write_cells(form, {(r.strategy, seed): cell_rows(r) for r in records if r.strategy in missing})


OVERHEAD = RESULTS / "overhead.csv"
OVERHEAD_STRATEGIES = ("random", "pool-balanced", "greedy-4", "greedy-16", "greedy-64")
# the bank is warm from `WARM` on
WARM, MEASURED, TURN = 150, 300, 10


def overhead() -> None:
    """Seconds of steps of equal work, strategies in turns of ten steps, next batches chosen in the step or beside it."""
    config = read_config(FORMS["balanced"])
    data = load(config.data.name, config.data.root, download=config.data.download)
    runs = {}
    for name in OVERHEAD_STRATEGIES:
        for beside in (False, True):
            if beside and name == "random":
                continue
            selection = replace(config.selection, strategy=name, overlap=beside, min_seen=0.3)
            train = replace(config.train, steps=WARM + MEASURED + 1, checkpoint_every=WARM + MEASURED + 1)
            evaluate = replace(config.evaluate, every=WARM + MEASURED + 1)
            runs[name, beside] = Run(replace(config, selection=selection, train=train, evaluate=evaluate), data)
    for until in range(TURN, WARM + MEASURED + 1, TURN):
        for training in runs.values():
            training.advance(until)
        if until % 50 == 0:
            print(f"{until} of {WARM + MEASURED} steps", flush=True)
    rows = []
    usual = sum(sum(step[-len(PARTS) :]) for step in runs["random", False].steps[WARM:])
    for (name, beside), training in runs.items():
        steps = training.steps[WARM:]
        seconds = sum(sum(step[-len(PARTS) :]) for step in steps)
        chosen = sum(step[2] for step in steps)
        rows.append({
            "strategy": name, "beside": int(beside), "steps": len(steps), "selected": int(chosen),
            "threads": torch.get_num_threads(), "ms": round(1e3 * seconds / len(steps), 3),
            "longer": round(100 * (seconds / usual - 1), 2),
        })  # fmt: skip
        print(rows[-1])
    write_csv(OVERHEAD, rows)


def overhead_table() -> str:
    """What `overhead` measured."""
    if not OVERHEAD.exists():
        return "Not run yet.\n"
    with OVERHEAD.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = {(row["strategy"], row["beside"]): row for row in rows}
    header = ["strategy", "chosen in the step, % longer", "chosen while the step before trains, % longer"]
    lines = [[name, *(cells[name, beside]["longer"] for beside in "01")] for name in OVERHEAD_STRATEGIES[1:]]
    usual = cells["random", "0"]
    return (
        f"{usual['steps']} steps of random batches, {float(usual['ms']):.0f} ms each on {usual['threads']} thread of a machine "
        "with two cores, against as many of equal work; all in one process, in turns of ten steps "
        "(`bench/study.py overhead`).\n\n" + as_table(header, lines)
    )


@dataclass(frozen=True)
class Line:
    """A strategy on one form. saved: share of random's seconds to the target, with its 95 % interval, by seeds drawn
    together for both; reached: by how many seeds, the others counting with their whole budget. slower: its step beside
    random's, in %.
    """

    strategy: str
    seeds: int
    reached: int
    steps: float
    saved: tuple[float, float, float] | None
    slower: float
    linear: str
    rank: float


def lines_of(form: str) -> tuple[Config, float | None, list[Line]]:
    """Config, target and a line for every strategy of which at least two seeds are there beside random's."""
    config = read_config(FORMS[form])
    cells = read_records(form)
    baseline = {seed: record for (name, seed), record in cells.items() if name == "random"}
    if len(baseline) < 2:
        return config, None, []
    target = target_accuracy(baseline.values(), config)
    found = []
    for name in config.compare.strategies:
        seeds = sorted(seed for strategy, seed in cells if strategy == name and seed in baseline)
        if len(seeds) >= 2:
            found.append(_line(name, [cells[name, seed] for seed in seeds], [baseline[seed] for seed in seeds], target))
    return config, target, found


def _line(name: str, own: Sequence[RunRecord], usual: Sequence[RunRecord], target: float) -> Line:
    reached = [first_reach(record, target) for record in own]
    ends = [row or record.evaluations[-1] for row, record in zip(reached, own, strict=True)]
    random_ends = [first_reach(record, target) or record.evaluations[-1] for record in usual]
    times, base = [row["seconds"] for row in ends], [row["seconds"] for row in random_ends]
    final = bootstrap([record.evaluations[-1]["linear"] for record in own])
    whole = sum(record.evaluations[-1]["seconds"] for record in own)
    half = [row["effective_rank"] for record in own for row in record.evaluations[1 + len(record.evaluations) // 2 :]]
    return Line(
        strategy=name, seeds=len(own), reached=sum(row is not None for row in reached),
        steps=statistics.fmean(row["step"] for row in ends), saved=None if name == "random" else _saved(times, base),
        slower=100 * (whole / sum(record.evaluations[-1]["seconds"] for record in usual) - 1),
        linear=format_estimate(final, 1, 100), rank=statistics.fmean(half),
    )  # fmt: skip


def _saved(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """1 − Σ times / Σ base, and its 95 % percentile-bootstrap interval over the seeds."""
    own, usual = torch.tensor(times, dtype=torch.float64), torch.tensor(base, dtype=torch.float64)
    draws = torch.randint(len(own), (RESAMPLES, len(own)), generator=torch.Generator().manual_seed(0))
    saved = (1 - own[draws].sum(1) / usual[draws].sum(1)).sort().values
    low, high = (float(saved[round(q * (RESAMPLES - 1))]) for q in (0.025, 0.975))
    return float(1 - own.sum() / usual.sum()), low, high


def markdown() -> str:
    """The tables of docs/wall_clock.md."""
    parts = []
    for form in FORMS:
        config, target, lines = lines_of(form)
        title = form.replace("_", " ").capitalize()
        if target is None:
            parts.append(f"### {title}\n\nNot run yet.\n")
            continue
        seeds = {line.seeds for line in lines}
        header = ["strategy", "seeds", "reached", "steps to the target", "seconds saved, % [95 %]", "step longer by, %"]
        header += ["final linear probe, %", "R₂"]
        rows = [
            [
                line.strategy, str(line.seeds), f"{line.reached}", f"{line.steps:.0f}",
                "" if line.saved is None else "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * value for value in line.saved)),
                f"{line.slower:.1f}", line.linear, f"{line.rank:.1f}",
            ]
            for line in lines
        ]  # fmt: skip
        share = 100 * config.compare.target_share
        parts.append(
            f"### {title}\n\nTarget: linear probe {100 * target:.1f} %, what random has reached at {share:.0f} % of "
            f"{config.train.steps} steps (mean of its seeds). {' to '.join(map(str, sorted({min(seeds), max(seeds)})))} of "
            f"{len(config.compare.seeds)} seeds.\n\n{as_table(header, rows)}"
        )
    parts.append(f"### What selecting adds to a step\n\n{overhead_table()}")
    return "\n".join(parts)


def draw(path: Path) -> None:
    """Seconds saved with their intervals, and accuracy against time, form by form."""
    found = {form: lines_of(form) for form in FORMS}
    found = {form: content for form, content in found.items() if content[1] is not None}
    with drawing(path) as pyplot:
        _, axes = pyplot.subplots(2, len(found), figsize=(1 + 4.2 * len(found), 6.4), squeeze=False)
        for column, (form, (_, target, lines)) in enumerate(found.items()):
            axis, shown = axes[0, column], [line for line in lines if line.saved is not None]
            for place, line in enumerate(reversed(shown)):
                assert line.saved is not None
                mean, low, high = (100 * value for value in line.saved)
                axis.plot([low, high], [place, place], color=COLOURS[0], lw=2)
                axis.plot(mean, place, "o", color=COLOURS[0], ms=5)
            axis.axvline(0, color=BASELINE, lw=0.8)
            axis.set_yticks(range(len(shown)), [line.strategy for line in reversed(shown)])
            axis.set_title(form.replace("_", " "))
            axis.set_xlabel("seconds to the target saved, %")
            axis, cells = axes[1, column], read_records(form)
            for name, colour in (("random", BASELINE), ("greedy-64", COLOURS[1]), ("pool-high", COLOURS[2])):
                records = [record for (strategy, _), record in cells.items() if strategy == name]
                rows = list(zip(*(record.evaluations for record in records), strict=True))
                seconds = [statistics.fmean(row["seconds"] for row in at) for at in rows]
                axis.plot(
                    seconds,
                    [100 * statistics.fmean(row["linear"] for row in at) for at in rows],
                    color=colour,
                    label=name,
                )
            assert target is not None
            axis.axhline(100 * target, color=BASELINE, lw=0.8, ls=":")
            axis.set_xlabel("seconds of training")
            axis.set_ylabel("linear probe, %")
            axis.legend(loc="lower right")


BEGIN, END = "<!-- bench/study.py: begin -->\n", "<!-- bench/study.py: end -->\n"


def report(text: Path = ROOT / "docs" / "wall_clock.md") -> None:
    """Rewrite the tables in the text, and the picture beside it."""
    write_text(text, between_marks(text.read_text(encoding="utf-8"), BEGIN, END, markdown()))
    draw(text.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run what is missing")
    runner.add_argument("forms", nargs="*", metavar="FORM", help=", ".join(FORMS))
    runner.add_argument("--strategy", action="append", default=[], help="only this one; may be repeated")
    runner.add_argument("--seed", action="append", default=[], type=int, help="only this one; may be repeated")
    runner.add_argument("--again", action="store_true", help="run also what is there, from the start")
    commands.add_parser("overhead", help="what selecting adds to a step")
    commands.add_parser("report", help="tables and picture from the CSVs")
    arguments = parser.parse_args()
    if arguments.command != "run":
        {"report": report, "overhead": overhead}[arguments.command]()
        return
    unknown = sorted(set(arguments.forms) - set(FORMS))
    if unknown:
        parser.error(f"no form {unknown[0]!r}; there are {', '.join(FORMS)}")
    for form in arguments.forms or FORMS:
        run(form, arguments.strategy, arguments.seed, arguments.again)


if __name__ == "__main__":
    sys.exit(main())
