"""Whatever a run shows its monitor, the run goes on: what cannot be observed is skipped, counted and said once."""

import csv
import itertools
import math
import os
import resource
import signal
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor_helpers import rows, stand_in_for_lightning

import spectral_kernels as sk
from spectral_kernels.monitor import lightning_callback, plots, spectrum_monitor
from spectral_kernels.monitor.log import COLUMNS
from spectral_kernels.monitor.signatures import SIGNATURES, exploding_variance

pytestmark = pytest.mark.filterwarnings("ignore::spectral_kernels.SpectrumWarning")

INF, NAN = math.inf, math.nan


def written(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, every cell of which is there and a number, but for the warnings."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        assert list(row) == list(COLUMNS) and None not in row.values()
        assert all(math.isfinite(float(cell)) or cell == "nan" for name, cell in row.items() if name != "warnings")
    return found


def watch(path: Path, **options: Any) -> sk.SpectrumMonitor:
    return sk.SpectrumMonitor(path, temperature=0.2, every=1, **options)


def said_once(caught: list[warnings.WarningMessage], text: str) -> None:
    found = [str(one.message) for one in caught if text in str(one.message)]
    assert len(found) == 1, [str(one.message) for one in caught]


class Hostile:
    """Of no use as anything."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __float__(self) -> float:
        raise ZeroDivisionError

    __int__ = __float__

    def __repr__(self) -> str:
        return "hostile"


@pytest.mark.parametrize(
    "bad", [INF, -INF, NAN, torch.tensor(NAN), torch.zeros(3), "much", 1j, [], Hostile()], ids=repr
)
@pytest.mark.parametrize("argument", ["gradient_norm", "value"])
def test_a_number_that_is_none(argument: str, bad: Any, tmp_path: Path) -> None:
    monitor, name = watch(tmp_path / "m.csv"), {"value": "loss"}.get(argument, argument)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor._norms = [1.0] * 50
        for step in range(4):
            monitor.observe(step, *rows(n=8), **{argument: bad if step in (1, 3) else 1.0})
    said_once(caught, name)
    assert monitor.skipped == {name: 2} and len(monitor.records) == 4
    found = written(tmp_path / "m.csv")
    assert [row[name] for row in found] == ["1", "nan", "1", "nan"]
    assert found[-1]["skipped"] == "2"


@pytest.mark.parametrize("value", [INF, NAN])
def test_rows_that_are_not_finite_are_left_out(value: float, tmp_path: Path) -> None:
    query, key = rows()
    good = watch(tmp_path / "good.csv", loss="info_nce").observe(0, query[3:], key[3:], queue=query)
    query[0, 3], key[1:3, 2] = value, value
    monitor = watch(tmp_path / "m.csv", loss="info_nce")
    with pytest.warns(sk.SpectrumWarning, match="4 of the rows hold NaN or Inf"):
        found = monitor.observe(0, query, key, queue=torch.cat([rows()[0], torch.full((1, 8), value)]))
    assert good is not None and found is not None and monitor.skipped == {"rows": 1}
    ignored = {"seconds", "skipped"}
    same = [str({k: v for k, v in record.items() if k not in ignored}) for record in (found, good)]
    assert same[0] == same[1]
    monitor.observe(1, torch.full_like(query, value), key)
    assert monitor.skipped == {"rows": 2, "measurement": 1}


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e30, 1e200])
def test_rows_of_any_scale(scale: float, tmp_path: Path) -> None:
    monitor = watch(tmp_path / "m.csv")
    query, key = ((view.double() * scale).to(torch.float64 if scale > 1e38 else torch.float32) for view in rows())
    monitor.observe(0, query, key)
    (found,) = written(tmp_path / "m.csv")
    right = watch(tmp_path / "right.csv").observe(0, *rows())
    assert right is not None
    if scale > 1:
        assert monitor.skipped == {}
        assert float(found["effective_rank"]) == pytest.approx(right["effective_rank"], rel=1e-4)
    if scale == 0:
        assert "collapse" in found["warnings"] and float(found["spread"]) == 0


QUERY, KEY = rows()
NO_BATCHES: dict[str, dict[str, Any]] = {
    "no tensors": {"query": None, "key": "key"},
    "integers": {"query": QUERY.long(), "key": KEY},
    "one row": {"query": QUERY[:1], "key": KEY[:1]},
    "no row": {"query": QUERY[:0], "key": KEY[:0]},
    "other shapes": {"query": QUERY, "key": KEY[:5]},
    "other features": {"query": QUERY, "key": KEY[:, :5]},
    "one dimension": {"query": QUERY[0], "key": KEY[0]},
    "sparse": {"query": QUERY.to_sparse(), "key": KEY},
    "meta": {"query": QUERY.to("meta"), "key": KEY},
    "hostile": {"query": Hostile(), "key": KEY},
    "queue": {"query": QUERY, "key": KEY, "queue": Hostile()},
    "empty queue": {"query": QUERY, "key": KEY, "queue": QUERY[:0]},
}


@pytest.mark.parametrize("name", NO_BATCHES)
def test_what_is_no_batch_is_not_measured(name: str, tmp_path: Path) -> None:
    monitor = watch(tmp_path / "m.csv", loss="info_nce")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert monitor.observe(0, **NO_BATCHES[name]) is None
        assert monitor.observe(1, **NO_BATCHES[name]) is None
    said_once(caught, "is not measured")
    assert monitor.skipped == {"measurement": 2}
    assert monitor.observe(2, *rows()) is not None
    assert [row["step"] for row in written(tmp_path / "m.csv")] == ["2"]


def test_mixed_dtypes_and_views_that_need_a_gradient(tmp_path: Path) -> None:
    query, key = rows()
    monitor = watch(tmp_path / "m.csv", loss="info_nce")
    record = monitor.observe(0, query.bfloat16().requires_grad_(), key.half(), queue=key.double())
    assert record is not None and monitor.skipped == {}


def test_surroundings_of_any_type(tmp_path: Path) -> None:
    monitor, query, key = watch(tmp_path / "m.csv"), *rows()
    for step, (bank, window) in enumerate(
        [("bank", 3), (Hostile(), (1, 2, 3)), (sk.MemoryBank(4, 2, device="meta"), (INF, "x")), (None, Hostile())]
    ):
        assert monitor.observe(step, query, key, bank=bank, window=window) is not None  # type: ignore[arg-type]
    assert monitor.skipped == {"bank": 3, "window": 5}
    for bad in (None, "x", NAN, INF, Hostile()):
        assert monitor.observe(bad, query, key) is None  # type: ignore[arg-type]
    assert monitor.skipped["step"] == 5 and len(written(tmp_path / "m.csv")) == 4


def test_signatures_say_nothing_of_nan() -> None:
    unknown = dict.fromkeys(COLUMNS, NAN)
    for signature in SIGNATURES.values():
        assert signature([unknown] * 4) is None
    for bad in (INF, -INF, NAN):
        assert exploding_variance([bad] * 200) is None
        assert exploding_variance([1.0] * 60 + [bad] + [1.0, 100.0] * 10) is not None
    assert exploding_variance([0.0] * 200) is None
    for scale in (1e308, 1e-308, 5e-324):
        assert exploding_variance([scale] * 100) is None
    message = exploding_variance([1e306] * 60 + [1e306, 1e308] * 10)
    assert message is not None and "e+307" in message


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is taken back, and the file goes on once there is room."""
    monitor = watch(tmp_path / "m.csv")
    monitor.observe(0, *rows())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = (tmp_path / "m.csv").read_bytes()
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert monitor.observe(1, *rows()) is not None
            assert monitor.observe(2, *rows()) is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    said_once(caught, "cannot be written")
    assert monitor.skipped == {"file": 2} and (tmp_path / "m.csv").read_bytes() == whole
    monitor.observe(3, *rows())
    assert [(row["step"], row["skipped"]) for row in written(tmp_path / "m.csv")] == [("0", "0"), ("3", "2")]


def test_a_folder_that_goes(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    monitor = watch(folder / "m.csv")
    monitor.observe(0, *rows())
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    with pytest.warns(sk.SpectrumWarning, match="cannot be written: FileNotFoundError"):
        monitor.observe(1, *rows())
    folder.mkdir()
    monitor.observe(2, *rows())
    assert [row["step"] for row in written(folder / "m.csv")] == ["2"]
    folder2 = tmp_path / "file"
    late = watch(folder2 / "m.csv")
    folder2.write_text("in its place")
    with pytest.warns(sk.SpectrumWarning, match="cannot be written"):
        assert late.observe(0, *rows()) is not None
    os.remove(folder2)
    late.observe(1, *rows())
    assert [row["step"] for row in written(folder2 / "m.csv")] == ["1"]


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_a_file_of_another_is_left_alone(when: str, tmp_path: Path) -> None:
    monitor = watch(tmp_path / "m.csv") if when == "while it runs" else None
    (tmp_path / "m.csv").write_text("a,b\n1,2\n")
    if monitor is None:
        with pytest.raises(ValueError, match=r"is no monitor's file: its first line is 'a,b'"):
            watch(tmp_path / "m.csv")
    else:
        with pytest.warns(sk.SpectrumWarning, match="no monitor's file"):
            monitor.observe(0, *rows())
    assert (tmp_path / "m.csv").read_text() == "a,b\n1,2\n"


def test_other_features_and_the_picture(tmp_path: Path) -> None:
    """Spectra keep one width; a picture is drawn of what there is."""
    monitor = watch(tmp_path / "m.csv")
    monitor.observe(0, *rows(), value=NAN)
    monitor.observe(1, *rows(d=6))
    monitor.observe(2, *rows(), window=(3, 5))
    assert monitor.skipped == {"loss": 1, "file": 1} and len(written(tmp_path / "m.csv")) == 3
    assert plots.monitor(tmp_path / "m.csv") == tmp_path / "m.png" and (tmp_path / "m.png").exists()


def test_measuring_that_fails_keeps_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings of the clock are 10 ms apart, so that a measurement takes 10 ms."""
    clock = itertools.count()
    monkeypatch.setattr(spectrum_monitor.time, "perf_counter", lambda: 0.01 * next(clock))
    monitor = sk.SpectrumMonitor(tmp_path / "m.csv", temperature=0.2)
    query, key = rows()
    for step in range(250):
        monitor.observe(step, query, key[:5])
    assert monitor.skipped["measurement"] == 2


def test_tensorboard_that_fails(tmp_path: Path) -> None:
    monitor = watch(tmp_path / "m.csv")
    monitor._writer = Hostile()
    with pytest.warns(sk.SpectrumWarning, match="the event file cannot be written: RuntimeError: no add_scalar"):
        assert monitor.observe(0, *rows()) is not None


@pytest.mark.parametrize("outputs", [None, 3, {"loss": 1.0}, {"query": 1}, torch.tensor(1.0)], ids=repr)
def test_lightning_callback(outputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_lightning(monkeypatch)
    monitor = watch(tmp_path / "m.csv")
    callback = lightning_callback(monitor)
    callback.on_before_optimizer_step(None, Hostile(), None)
    trainer = types.SimpleNamespace(is_global_zero=True, global_step=3)
    with pytest.warns(sk.SpectrumWarning, match="returned no 'query' and 'key'"):
        callback.on_train_batch_end(trainer, None, outputs, None, 0)
    assert monitor.skipped == {"gradient_norm": 1, "embeddings": 1}
    query, key = rows()
    callback.on_train_batch_end(trainer, None, {"loss": Hostile(), "query": query, "key": key}, None, 1)
    assert monitor.skipped["loss"] == 1 and len(monitor.records) == 1
