"""Pictures of a monitor's CSV, whatever somebody has made of it: a picture, or one error that names the file."""

import time
from pathlib import Path

import numpy as np
import pytest

from spectral_kernels.files.reading import FileError
from spectral_kernels.monitor import plots
from spectral_kernels.monitor.log import COLUMNS, spectrum_path

pytest.importorskip("matplotlib")


def line(step: int | str, warning: str = "") -> list[str]:
    return [str(step), *["1.5"] * (len(COLUMNS) - 2), warning]


def write(path: Path, lines: list[list[str]], spectrum: str = "step,p1,p2\n0,0.5,0.5\n1,0.6,0.4\n") -> None:
    path.write_text("\n".join(",".join(one) for one in [list(COLUMNS), *lines]) + "\n", encoding="utf-8")
    spectrum_path(path).write_text(spectrum)


@pytest.mark.parametrize(
    "lines, spectrum",
    [
        ([line(0), line(1)], None),
        ([line(0, "$\\bad{$"), line(1, "x" * 100_000)], None),
        ([line(0), ["half"], line(1), line(2)], None),
        ([line(0), line(1)], ""),
        ([line(0), line(1)], "\n\n"),
        ([line(0), line(1)], "step\n0\n1\n"),
        ([[*line(0)[:13], "-1", *line(0)[14:]], line(1)], None),
        ([[*line(0)[:4], "nan", *line(0)[5:]], line(1)], None),
    ],
)
def test_pictures_of_what_is_there(lines: list[list[str]], spectrum: str | None, tmp_path: Path) -> None:
    path = tmp_path / "m$_{x.csv"
    write(path, lines, *([] if spectrum is None else [spectrum]))
    began = time.monotonic()
    assert plots.monitor(path).read_bytes()[:4] == b"\x89PNG"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "lines, spectrum, message",
    [
        ([line(0)], None, "holds 1 measurements"),
        ([line(0), line("")], None, "holds a step that is no number"),
        ([line(0), line("inf")], None, "holds a step that is no number"),
        ([line(0), line("x")], None, "holds what is no number"),
        ([line(0), line(1)], "step,p1\n0,x\n", "holds what is no number"),
        ([line(0), line(1)], "step,p1\n0,inf\n1,1\n", "holds what is no finite number"),
    ],
)
def test_refused(lines: list[list[str]], spectrum: str | None, message: str, tmp_path: Path) -> None:
    write(tmp_path / "m.csv", lines, *([] if spectrum is None else [spectrum]))
    with pytest.raises(FileError, match=message):
        plots.monitor(tmp_path / "m.csv")


def test_damaged_csvs_never_raise_anything_else(tmp_path: Path) -> None:
    path, rng = tmp_path / "m.csv", np.random.default_rng(0)
    write(path, [line(0), line(1, "collapse")])
    whole, drawn = path.read_bytes(), 0
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(len(",".join(COLUMNS)), len(content)))] = int(rng.choice(list(b"0-.,e\nn\xff\0")))
        path.write_bytes(content)
        try:
            plots.monitor(path)
            drawn += 1
        except FileError:
            pass
    assert 0 < drawn < 40
