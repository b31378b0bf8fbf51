"""The CSV of a monitor and that of its spectra: readable whatever became of the disk or of a run before."""

import csv
import errno
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectral_kernels.files.reading import FileError, read_csv
from spectral_kernels.files.writing import replacing

COLUMNS = (
    "step", "seconds", "loss", "gradient_norm", "effective_rank", "effective_rank_error", "centred_rank", "rank1",
    "rank_inf", "spread", "alignment", "uniformity", "negative_mass", "chi2", "negatives", "duplicate_share", "lower",
    "norm", "upper", "bank_age", "bank_seen", "window_low", "window_high", "skipped", "warnings",
)  # fmt: skip


def spectrum_path(path: Path) -> Path:
    """Where the spectra of the monitor of `path` go."""
    return path.with_name(f"{path.stem}_spectrum.csv")


class Log:
    """Appends measurements to `path`, and their spectra to the file beside it.

    Raises:
        ValueError: a file is there that is no monitor's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.spectra_path = path, spectrum_path(path)
        self._open, self._width = False, 0
        for one in (self.path, self.spectra_path):
            self._rows(one)

    def open(self, first: int) -> None:
        """Keep what a stopped run wrote of the steps before `first`; done once."""
        if self._open:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.spectra_path):
            rows = self._rows(path) or ([list(COLUMNS)] if path == self.path else [])
            # a run that was killed may have left half a line
            kept = [row for row in rows[1:] if len(row) == len(rows[0]) and _before(row[0], first)]
            with replacing(path) as file:
                file.write(_lines([*rows[:1], *kept]))
        self._width = len(rows[0]) - 1 if rows else 0
        self._open = True

    def append(self, record: Mapping[str, Any], spectrum: Sequence[float]) -> None:
        """Write a measurement."""
        _append(self.path, COLUMNS, [_text(record[name]) for name in COLUMNS])
        self._width = self._width or len(spectrum)
        if len(spectrum) != self._width:
            raise ValueError(f"{self.spectra_path} has {self._width} eigenvalues a line, got {len(spectrum)}")
        header = ["step", *(f"p{i + 1}" for i in range(len(spectrum)))]
        _append(self.spectra_path, header, [str(record["step"]), *(f"{value:.6g}" for value in spectrum)])

    def _rows(self, path: Path) -> list[list[str]]:
        """What a monitor has written there, header first; nothing where there is no file."""
        if not path.exists():
            return []
        rows = read_csv(path)
        if rows and (rows[0] != list(COLUMNS) if path == self.path else rows[0][:1] != ["step"]):
            raise FileError(path, f"is no monitor's file: its first line is {','.join(rows[0])[:60]!r}")
        return rows


def _before(step: str, first: int) -> bool:
    try:
        return int(step) < first
    except ValueError:
        return False


def _lines(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _append(path: Path, header: Sequence[str], row: Sequence[str]) -> None:
    """Add a line, or nothing: what a full disk took only half of is taken back."""
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        line = _lines([row] if start else [header, row])
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(start)
            raise


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.8g}" if math.isfinite(value) else "nan"
    return str(value)
