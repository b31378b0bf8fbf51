"""Times contenders for one job in one run: interleaved, medians, no figure without its check."""

import csv
import ctypes
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# A turn repeats its call for so many seconds: a single short call would be charged for the caches and page tables that
# the contender before it left.
TURN = 0.005


@dataclass(frozen=True)
class Job:
    """One thing to be done, by several contenders on the same data.

    Attributes:
        name: operator and size.
        contenders: label -> call; the first is ours.
        check: raises AssertionError when our result is wrong; run before any timing.
        bars: label -> speed-up over that contender that the project asks for.
        objective: what a contender's result is worth, printed beside its time.
        absent: contenders that cannot run here -> why.
        pause: seconds between turns, in which threads that another library keeps spinning go to sleep.
        most_ms: our median that the project asks for at most.
        most_mb: memory that our call takes at most, beside what is there before it.
    """

    name: str
    contenders: dict[str, Callable[[], object]]
    check: Callable[[], None]
    bars: dict[str, float]
    objective: Callable[[Any], float] | None = None
    absent: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    most_ms: float | None = None
    most_mb: float | None = None


@dataclass(frozen=True)
class Row:
    """A contender's times in ms, how many times longer it takes than ours, and what it reaches.

    `demands`: what is asked of our own row but a ratio, as it is printed.
    """

    job: str
    contender: str
    p20: float
    p50: float
    p80: float
    ratio: float
    bar: float | None
    objective: float | None
    demands: tuple[str, ...] = ()


def time_job(job: Job, repeats: int) -> list[Row]:
    """Rows of a job whose check has passed. Contenders take turns, so that a busy moment hits all of them."""
    job.check()
    reached = {label: call() for label, call in job.contenders.items()}
    times: dict[str, list[float]] = {label: [] for label in job.contenders}
    for _ in range(repeats):
        for label, call in job.contenders.items():
            if job.pause:
                time.sleep(job.pause)
                _turn(call)  # wakes this one's own threads
            times[label].append(_turn(call) * 1e3)
    first = next(iter(times))
    ours = statistics.median(times[first])
    demands = _demands(job, ours)
    rows = []
    for label, values in times.items():
        p20, p50, p80 = (quantile(values, q) for q in (0.2, 0.5, 0.8))
        objective = None if job.objective is None else job.objective(reached[label])
        asked = demands if label == first else ()
        rows.append(Row(job.name, label, p20, p50, p80, p50 / ours, job.bars.get(label), objective, asked))
    return rows


def _demands(job: Job, ours: float) -> tuple[str, ...]:
    demands = []
    if job.most_ms is not None:
        met = "met" if ours <= job.most_ms else "NOT MET"
        demands.append(f"asked for: at most {job.most_ms:g} ms {met}")
    if job.most_mb is not None:
        taken = peak_mb(next(iter(job.contenders.values())))
        met = "met" if taken <= job.most_mb else "NOT MET"
        demands.append(f"takes {taken:.1f} MB beside its data, asked for: at most {job.most_mb:g} MB {met}")
    return tuple(demands)


def peak_mb(call: Callable[[], object]) -> float:
    """By how many MB a call's peak stands above the memory resident before it (Linux)."""

    def resident(field: str) -> float:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return float(status.split(f"{field}:")[1].split()[0]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # or the call would live on what others have freed
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def _turn(call: Callable[[], object]) -> float:
    """Seconds a call takes: the median of as many as fill a turn."""
    seconds: list[float] = []
    while sum(seconds) < TURN:
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))]


def report(rows: Sequence[Row], failures: Sequence[str], output: Path | None) -> int:
    """Print the table, write the CSV; the exit status is 1 when a check failed."""
    width = max([len(row.contender) for row in rows], default=0)
    job = None
    for row in rows:
        if row.job != job:
            job = row.job
            print(
                f"\n{job}   (check passed)\n{'':{width}}  {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9}   ours is faster by"
            )
        bar = "" if row.bar is None else f"   asked for: {row.bar:g}x {'met' if row.ratio >= row.bar else 'NOT MET'}"
        reached = "" if row.objective is None else f"   reaches {row.objective:.5g}"
        print(
            f"{row.contender:{width}}  {row.p20:9.3f} {row.p50:9.3f} {row.p80:9.3f}   {row.ratio:6.2f}x{reached}{bar}"
        )
        for demand in row.demands:
            print(f"{'':{width}}  {demand}")
    for failure in failures:
        print(f"\nCHECK FAILED, not timed: {failure}", file=sys.stderr)
    print(
        f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; medians of one run"
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["job", "contender", "p20_ms", "p50_ms", "p80_ms", "ratio", "bar", "objective"])
            for row in rows:
                times = [f"{value:.4f}" for value in (row.p20, row.p50, row.p80)]
                reached = "" if row.objective is None else f"{row.objective:.6g}"
                writer.writerow([row.job, row.contender, *times, f"{row.ratio:.3f}", row.bar or "", reached])
        print(f"written to {output}")
    return 1 if failures else 0


def worst_relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
