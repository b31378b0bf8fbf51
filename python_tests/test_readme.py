"""README: its snippets run, and the targets that it names are there."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import ROOT, run, snippets

import spectral_kernels as sk

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = snippets(ROOT / "README.md")


def heading_of(snippet: str) -> str:
    return re.findall(r"^### (.*)", README[: README.index(snippet)], re.MULTILINE)[-1]


def test_three_uses_are_shown() -> None:
    assert [heading_of(snippet) for snippet in SNIPPETS] == [
        "Call the ops",
        "Run the benchmarks",
        "Drop a selector into SimCLR",
    ]


def run_below(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the snippet below a heading leaves."""
    monkeypatch.chdir(folder)
    (snippet,) = (snippet for snippet in SNIPPETS if heading_of(snippet) == heading)
    return run(snippet, ROOT / "README.md")


def test_ops_do_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_below("Call the ops", tmp_path, monkeypatch)
    z = names["z"].detach()
    chosen, random = (sk.effective_rank(rows, order=2) for rows in (z[names["chosen"].indices], z[:256]))
    assert chosen > random + 5
    assert names["z"].grad.isfinite().all() and names["z"].grad.abs().max() > 0
    assert (sk.covariance(names["y"]) - torch.eye(128)).abs().max() < 1e-2


def test_benchmarks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run_below("Run the benchmarks", ROOT, monkeypatch)


@pytest.mark.filterwarnings("ignore:the memory bank is cold", "error::spectral_kernels.SpectrumWarning")
def test_simclr_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It does not collapse: rows that are all equal have a loss of ln(2B - 1) and a rank of 1."""
    names = run_below("Drop a selector into SimCLR", tmp_path, monkeypatch)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert max(losses) < math.log(255) - 1 and losses[-1] < losses[0] - 0.1
    z = names["encoder"](names["images"]).detach()
    assert sk.effective_rank(z, order=2) > 5
    assert names["monitor"].records[0]["chi2"] > 0 and (tmp_path / "monitor.csv").exists()
    assert names["sampler"].selection_seconds > 0


def test_documented_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z]+[a-z0-9-]*):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    prose = {"alone"}
    assert named - prose <= known
