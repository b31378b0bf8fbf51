"""SpectrumMonitor: the signatures fire where they are provoked and nowhere else; its files; what it costs."""

import csv
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor_helpers import rows, stand_in_for_lightning

import spectral_kernels as sk
from spectral_kernels.monitor import lightning_callback, spectrum_monitor
from spectral_kernels.monitor.log import COLUMNS
from spectral_kernels.monitor.signatures import exploding_variance
from spectral_kernels.training.data import load
from spectral_kernels.training.loop import Run
from spectral_kernels.training.monitoring import Monitored
from spectral_kernels.training.settings import read_config

PROVOKED = {
    "collapse": ["train.temperature=0.01"],
    "flat softmax": ["train.temperature=10"],
    "one-hot softmax": ["train.temperature=0.01", "train.whiten=cholesky"],
    "redundant negatives": ["data.duplicates=0.98", "augment.crop_scale=[0.95,1.0]", "augment.jitter=0"],
}


def watch(path: Path, overrides: list[str], steps: int) -> tuple[Run, Monitored, list[str]]:
    config = read_config("tiny", [f"train.steps={steps}", "selection.strategy=random", *overrides])
    run, watched = Run(config, load("digits")), Monitored(path / "monitor.csv", every=10)
    watched.opened(run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sk.SpectrumWarning)
        run.advance(steps, [watched])
    return run, watched, [str(one.message) for one in caught if one.category is sk.SpectrumWarning]


@pytest.mark.parametrize("name", PROVOKED)
def test_a_signature_fires_where_it_is_provoked(name: str, tmp_path: Path) -> None:
    _, watched, messages = watch(tmp_path, PROVOKED[name], 60)
    said = [message for message in messages if f": {name}: " in message]
    assert len(said) == 1  # once, for as long as it lasts
    assert "Try " in said[0] and "healthy: " in said[0]
    assert watched.monitor is not None
    assert name in watched.monitor.records[-1]["warnings"]


@pytest.mark.parametrize("strategy", ["random", "greedy-8", "random+whiten"])
def test_a_healthy_run_is_silent(strategy: str, tmp_path: Path) -> None:
    _, watched, messages = watch(tmp_path, [f"selection.strategy={strategy}"], 150)
    assert messages == []
    assert watched.monitor is not None and len(watched.monitor.records) == 15


def test_exploding_variance(tmp_path: Path) -> None:
    """Weights that decay away under batch normalisation: the gradient grows as they shrink."""
    run, watched, messages = watch(tmp_path, ["train.steps=400"], 100)
    assert messages == []
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 2.0
    with pytest.warns(sk.SpectrumWarning, match="exploding variance: the gradient norm of the last 20 steps"):
        run.advance(160, [watched])


def test_exploding_variance_needs_a_past() -> None:
    assert exploding_variance([1.0, 100.0] * 15) is None
    assert exploding_variance([1.0] * 60 + [1.0, 100.0] * 10) is not None
    assert exploding_variance([1.0, 1.001] * 30 + [1.0, 1.1] * 10) is None  # small beside the gradient


@pytest.mark.parametrize("loss", ["nt_xent", "info_nce"])
def test_numbers_are_those_of_the_ops(loss: str, tmp_path: Path) -> None:
    monitor = sk.SpectrumMonitor(tmp_path / "m.csv", temperature=0.2, loss=loss, every=1, rank=4)
    query, key = rows(n=64, d=16)
    bank = sk.MemoryBank(100, 16)
    bank.update(torch.arange(50), query[:50])
    state = torch.get_rng_state()
    record = monitor.observe(7, query, key, value=1.5, gradient_norm=2.0, bank=bank, window=(3, 5))
    assert record is not None and torch.equal(state, torch.get_rng_state())
    band = sk.gradient_band(query, key, temperature=0.2, rank=4, loss=loss)
    norm = float(sk.info_nce_grad_norms(query, key, temperature=0.2, loss=loss).double().mean())
    assert record["norm"] == pytest.approx(norm)
    assert record["lower"] <= norm <= record["upper"]
    assert record["upper"] == pytest.approx(float(band.batch_upper))
    assert record["effective_rank"] == pytest.approx(float(sk.effective_rank(key, order=2)))
    assert record["rank1"] == pytest.approx(float(sk.effective_rank(key, order=1)), rel=1e-5)
    assert record["alignment"] == pytest.approx(float(band.alignment.mean()))
    assert (record["bank_seen"], record["window_low"], record["loss"]) == (0.5, 3.0, 1.5)
    with (tmp_path / "m.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert list(written) == list(COLUMNS) and float(written["upper"]) == pytest.approx(record["upper"], rel=1e-6)
    with (tmp_path / "m_spectrum.csv").open(newline="") as file:
        header, spectrum = csv.reader(file)
    assert header[:2] == ["step", "p1"] and sum(map(float, spectrum[1:])) == pytest.approx(1, abs=1e-4)


def test_a_larger_batch_is_looked_at_in_part(tmp_path: Path) -> None:
    monitor = sk.SpectrumMonitor(tmp_path / "m.csv", temperature=0.2, every=1, anchors=32)
    views = rows(n=64)
    whole = monitor.observe(0, *views)
    part = monitor.observe(1, *(view[:32] for view in views))
    assert whole is not None and part is not None
    assert whole["norm"] == part["norm"] and whole["negatives"] == 62


def test_a_resumed_run_goes_on_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    first = sk.SpectrumMonitor(path, temperature=0.2, every=5)
    for step in range(1, 31):
        first.observe(step, *rows(step))
    with path.open("ab") as file:  # damaged, and killed while it wrote
        file.write(b"\0\0\0\xff\n" + b"x" + b"," * (len(COLUMNS) - 1) + b"\n3,0.1,3")
    second = sk.SpectrumMonitor(path, temperature=0.2, every=5)
    for step in range(21, 41):
        second.observe(step, *rows(step))
    for name in ("m.csv", "m_spectrum.csv"):
        with (tmp_path / name).open(newline="") as file:
            steps = [int(row[0]) for row in list(csv.reader(file))[1:]]
        assert steps == [5, 10, 15, 20, 25, 30, 35, 40]


def test_the_interval_follows_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of 50 ms beside steps of 10 ms: one in 500 steps at 1 %."""
    now = 0.0
    monkeypatch.setattr(spectrum_monitor.time, "perf_counter", lambda: now)
    monitor = sk.SpectrumMonitor(tmp_path / "m.csv", temperature=0.2)
    measure = monitor._measure

    def dear(*given: Any) -> dict[str, Any]:
        nonlocal now
        now += 0.05
        return measure(*given)

    monkeypatch.setattr(monitor, "_measure", dear)
    query, key = rows(n=8)
    for step in range(3000):
        now += 0.01
        monitor.observe(step, query, key)
    assert monitor.seconds <= 0.01 * now + 0.05
    assert 5 <= len(monitor.records) <= 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": 0.1, "loss": "triplet"}, "loss must be one of"),
        ({"temperature": 0.1, "every": 0}, "every must be"),
        ({"temperature": 0.1, "budget": 0}, "budget must be above 0"),
        ({"temperature": 0.1, "rank": -1}, "rank must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sk.SpectrumMonitor(tmp_path / "m.csv", **options)


def test_no_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pip install lightning"):
        lightning_callback(sk.SpectrumMonitor(tmp_path / "m.csv", temperature=0.2))


def test_lightning_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_lightning(monkeypatch)
    monitor = sk.SpectrumMonitor(tmp_path / "m.csv", temperature=0.2, every=1)
    callback = lightning_callback(monitor)
    module = torch.nn.Linear(2, 1)
    module(torch.ones(1, 2)).sum().backward()
    trainer = types.SimpleNamespace(is_global_zero=True, global_step=3)
    query, key = rows()
    callback.on_before_optimizer_step(trainer, module, None)
    callback.on_train_batch_end(trainer, module, {"loss": torch.tensor(0.5), "query": query, "key": key}, None, 0)
    (record,) = monitor.records
    assert (record["step"], record["loss"]) == (3, 0.5)
    assert record["gradient_norm"] == pytest.approx(3**0.5)
