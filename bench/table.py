"""Writes the benchmark table of README.md from bench/results/cpu.csv: python bench/table.py."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu.csv"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench/table.py: begin -->\n", "<!-- bench/table.py: end -->\n"


def as_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def between_marks(text: str, begin: str, end: str, content: str) -> str:
    """`text` with `content` between its marks."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def markdown(results: Path = RESULTS) -> str:
    """The table: every contender but ours, how many times longer it takes, and what either reaches."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours = {row["job"]: row for row in rows if row["contender"] == "spectral_kernels"}
    header = ["on the CPU", "against", "times faster", "target", "objective, ours / theirs"]
    lines = []
    for row in rows:
        if row["contender"] == "spectral_kernels":
            continue
        reached = (
            f"{float(ours[row['job']]['objective']):.4g} / {float(row['objective']):.4g}" if row["objective"] else ""
        )
        asked = f"{float(row['bar']):g}" if row["bar"] else ""
        job = row["job"].removeprefix("peers: ")
        lines.append([job, row["contender"], f"{float(row['ratio']):.2f}", asked, reached])
    return as_table(header, lines)


def with_table(readme: str, table: str) -> str:
    """`readme` with the table between its marks."""
    return between_marks(readme, BEGIN, END, table)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), markdown()), encoding="utf-8")
