"""`spectral-kernels band` and `variance`."""

import csv
from pathlib import Path

import pytest
import torch
from helpers import assert_same

from spectral_kernels import cli
from spectral_kernels.commands import band
from spectral_kernels.theory import validation
from spectral_kernels.training.compare import run_config
from spectral_kernels.training.data import load
from spectral_kernels.training.gradients import along_training, at_fixed_parameters, embed
from spectral_kernels.training.loop import Run
from spectral_kernels.training.settings import read_config


def test_a_setting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "BATCHES", 2)
    setting = validation.measure("k^-1", validation.synthetic_views(1.0), 0.1)
    assert setting.anchors == 512 and setting.contained
    for kind in validation.KINDS:
        assert setting.lower[kind] <= setting.norm <= setting.upper[kind]
    assert 1 < setting.width["rank 16"] < setting.width["rank 0"] < setting.width["a priori"]
    query, key = next(validation.synthetic_views(2.0))
    torch.testing.assert_close((query * key).sum(1), torch.full((256,), 0.8, dtype=torch.float64))


def test_widths_hold_their_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "BATCHES", 4)
    for anisotropy, bar in zip(validation.ANISOTROPIES, (1.4, 1.5, 2.1, 2.6), strict=True):
        setting = validation.measure("", validation.synthetic_views(anisotropy), 0.1)
        assert setting.width["rank 16"] <= bar


def test_experiments() -> None:
    ranks = validation.selected_ranks(rows=1024, repeats=2)
    assert ranks["pool-low"] < ranks["pool-balanced"] < ranks["pool-high"] < ranks["greedy-64"]
    assert validation.temperature_law().slope == pytest.approx(-2, abs=0.01)
    found = validation.whitened_gradients(batches=3)
    assert found.measured == found.variance[0] / found.variance[1] and found.predicted > 1


def test_an_escaped_anchor_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(band, "BATCHES", 1)
    monkeypatch.setattr(validation, "BATCHES", 1)
    monkeypatch.setattr(band, "_experiments", lambda settings: "")
    arguments = ["band", "--config", "tiny", "--out", str(tmp_path), "train.steps=4"]
    assert cli.main(arguments) == 0
    assert "100.00" in capsys.readouterr().out
    with (tmp_path / "band.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and {row["source"] for row in rows} >= {"k^-0", "k^-2", "untrained", "trained"}
    assert (tmp_path / "band.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(validation, "RELATIVE", -0.5)  # as if measured norms were half of themselves off
    assert cli.main(arguments) == 1
    assert "NOT CONTAINED: k^-0 at temperature 0.05" in capsys.readouterr().out


def runs() -> tuple[Run, Run]:
    config, data = read_config("tiny", ["train.steps=200"]), load("digits")
    plain, whitened = (Run(run_config(config, name, 0), data) for name in ("random", "random+whiten"))
    return plain, whitened


def test_measuring_leaves_a_run_as_it_was() -> None:
    (run, _), (same, _) = runs(), runs()
    run.advance(5)
    same.advance(5)
    at_fixed_parameters(run)
    embed(run, 3)
    run.advance(10)
    same.advance(10)
    assert_same(run.model.state_dict(), same.model.state_dict())


def test_variance_along_training_is_that_of_the_steps() -> None:
    plain, whitened = runs()
    found = along_training(plain, whitened)
    assert (plain.step, whitened.step, found.step) == (50, 50, 0)
    again, _ = runs()
    gradients = []
    for step in range(1, 51):
        again.advance(step)
        parts = [parameter.grad for parameter in again.model.parameters() if parameter.grad is not None]
        gradients.append(torch.cat([part.reshape(-1).double() for part in parts]))
    assert found.plain.variance.total == pytest.approx(float(torch.stack(gradients).var(0).sum()), rel=1e-9)
    assert found.plain.variance.norms[7] == pytest.approx(float(gradients[7].norm()))
    assert found.ratios["total"] == found.plain.variance.total / found.whitened.variance.total


def test_variance_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["variance", "--config", "tiny", "--out", str(tmp_path), "train.steps=60"]) == 0
    assert "published: 1.37" in capsys.readouterr().out
    with (tmp_path / "variance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["where"] for row in rows} == {"fixed", "along"}
    assert (tmp_path / "variance.png").read_bytes()[:4] == b"\x89PNG"
