"""Writes the benchmark table of README.md from bench/results/cpu.csv: python bench/table.py."""

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu.csv"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench/table.py: begin -->\n", "<!-- bench/table.py: end -->\n"


def markdown(results: Path = RESULTS) -> str:
    """The table: every contender but ours, how many times longer it takes, and what either reaches."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours = {row["job"]: row for row in rows if row["contender"] == "spectral_kernels"}
    header = ["on the CPU", "against", "times faster", "target", "objective, ours / theirs"]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    for row in rows:
        if row["contender"] == "spectral_kernels":
            continue
        reached = (
            f"{float(ours[row['job']]['objective']):.4g} / {float(row['objective']):.4g}" if row["objective"] else ""
        )
        asked = f"{float(row['bar']):g}" if row["bar"] else ""
        job = row["job"].removeprefix("peers: ")
        lines.append(f"| {job} | {row['contender']} | {float(row['ratio']):.2f} | {asked} | {reached} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """`readme` with the table between its marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), markdown()), encoding="utf-8")
