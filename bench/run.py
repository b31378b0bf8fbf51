"""Benchmarks of the ops on the CPU: `python bench/run.py [greedy] [ops] [peers] [--repeats 25] [--output FILE.csv]`.

Every job checks its result before it is timed; contenders take turns in one process; figures are medians, and ratios
are what to quote.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Row, report, time_job

BENCHES = ("greedy", "ops", "peers")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--repeats", type=int, default=25, help="timed turns of each contender")
    parser.add_argument("--output", type=Path, help="CSV to write")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.benches) - set(BENCHES))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHES)}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    rows: list[Row] = []
    failures: list[str] = []
    for bench in options.benches or BENCHES:
        for job in importlib.import_module(f"bench_{bench}").jobs():
            for label, reason in job.absent.items():
                print(f"absent from {job.name!r}: {label} ({reason})")
            try:
                rows += time_job(job, options.repeats)
            except AssertionError as error:
                failures.append(f"{job.name}: {error}")
    return report(rows, failures, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
