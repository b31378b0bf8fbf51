"""The picture of a monitor's CSV."""

import itertools
import math
from pathlib import Path
from typing import Any

from spectral_kernels.figures import BASELINE, COLOURS, drawing
from spectral_kernels.files.reading import FileError, read_csv
from spectral_kernels.monitor.log import COLUMNS, spectrum_path

BLUE, RED, GREEN, _, LIGHT = COLOURS[:5]


def monitor(csv_path: str | Path, picture: str | Path | None = None) -> Path:
    """Draw what a `SpectrumMonitor` has written: effective rank with its window, the gradient norm in its band, the
    spectrum over time, and where warnings fell.

    Args:
        csv_path: the monitor's.
        picture: PNG to write; None: beside the CSV.

    Returns:
        The picture's path.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: fewer than two measurements.
    """
    csv_path = Path(csv_path)
    picture = csv_path.with_suffix(".png") if picture is None else Path(picture)
    header, *lines = read_csv(csv_path) or [[]]
    if header != list(COLUMNS):
        raise FileError(csv_path, f"is no monitor's file: its first line is {','.join(header)[:60]!r}")
    rows = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
    if len(rows) < 2:
        raise FileError(csv_path, f"holds {len(rows)} measurements; a picture needs at least 2")
    columns = {name: _numbers(csv_path, [row[name] for row in rows]) for name in header if name != "warnings"}
    if not all(map(math.isfinite, columns["step"])):
        raise FileError(csv_path, "holds a step that is no number")
    width, *lines = read_csv(spectrum_path(csv_path)) or [[]]
    spectra = [_numbers(spectrum_path(csv_path), line) for line in lines if len(line) == len(width) > 1]
    if not all(map(math.isfinite, itertools.chain.from_iterable(spectra))):
        raise FileError(spectrum_path(csv_path), "holds what is no finite number")
    with drawing(picture) as pyplot:
        figure, axes = pyplot.subplot_mosaic([["rank", "norm"], ["spectrum", "factors"]], figsize=(10.5, 6.4))
        _ranks(axes["rank"], columns)
        _band(axes["norm"], columns)
        if len(spectra) > 1:
            _spectrum(figure, axes["spectrum"], [row[0] for row in spectra], [row[1:] for row in spectra])
        _factors(axes["factors"], columns)
        _warnings(axes["norm"], rows)
        figure.suptitle(f"{csv_path.name}: {len(rows)} measurements", x=0.01, ha="left", parse_math=False)
    return picture


def _numbers(path: Path, texts: list[str]) -> list[float]:
    try:
        return [float(text) if text else math.nan for text in texts]
    except ValueError as error:
        raise FileError(path, f"holds what is no number: {str(error)[:100]}") from error


def _ranks(axis: Any, columns: dict[str, list[float]]) -> None:
    steps, low, high = columns["step"], columns["window_low"], columns["window_high"]
    if not math.isnan(low[-1]):
        axis.fill_between(steps, low, high, color="#E6E6E6", lw=0, label="window")
    rank, error = columns["effective_rank"], columns["effective_rank_error"]
    ends = [[r + sign * e for r, e in zip(rank, error, strict=True)] for sign in (-1, 1)]
    axis.fill_between(steps, *ends, color=LIGHT, alpha=0.5, lw=0, label="± jackknife error")
    axis.plot(steps, rank, color=BLUE, label="R₂")
    axis.plot(steps, columns["rank1"], "--", color=RED, label="R₁")
    axis.plot(steps, columns["rank_inf"], ":", color=BASELINE, label="R∞")
    axis.set_title("Effective rank of the batches")
    axis.legend(ncols=2)


def _band(axis: Any, columns: dict[str, list[float]]) -> None:
    steps = columns["step"]
    axis.fill_between(steps, columns["lower"], columns["upper"], color=LIGHT, alpha=0.6, lw=0, label="band")
    axis.plot(steps, columns["norm"], color=RED, label="measured")
    axis.set(yscale="log", title="Mean ‖∂L/∂u‖² of the anchors")
    axis.legend()


def _spectrum(figure: Any, axis: Any, steps: list[float], spectra: list[list[float]]) -> None:
    edges = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    edges = [2 * steps[0] - edges[0], *edges, 2 * steps[-1] - edges[-1]]
    rows = [[max(value, 1e-6) for value in column] for column in zip(*spectra, strict=True)]
    places = [i + 0.5 for i in range(len(rows) + 1)]
    mesh = axis.pcolormesh(edges, places, rows, norm="log", vmin=1e-4, cmap="cividis", rasterized=True)
    axis.grid(visible=False)
    axis.invert_yaxis()
    axis.set(title="Spectrum λ/Σλ, by rank", xlabel="step")
    figure.colorbar(mesh, ax=axis)


def _factors(axis: Any, columns: dict[str, list[float]]) -> None:
    steps = columns["step"]
    concentration = [c / (c + 1) if c > -1 else math.nan for c in columns["chi2"]]
    for values, style, colour, label in (
        (columns["alignment"], "-", BLUE, "alignment"),
        (columns["negative_mass"], "--", RED, "mass on the negatives"),
        (columns["spread"], "-.", GREEN, "spread 1 − ‖μ‖²"),
        (concentration, ":", BASELINE, "concentration χ²/(χ² + 1)"),
    ):
        axis.plot(steps, values, style, color=colour, label=label)
    axis.set(ylim=(-0.02, 1.05), title="Why: the factors of the norm", xlabel="step")
    axis.legend()


def _warnings(axis: Any, rows: list[dict[str, str]]) -> None:
    before = ""
    for row in rows:
        if row["warnings"] and row["warnings"] != before:
            axis.axvline(float(row["step"]), color=BASELINE, lw=0.8)
            axis.text(
                float(row["step"]), 0.02, row["warnings"][:200], rotation=90, fontsize=7, va="bottom", ha="right",
                parse_math=False,
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip
        before = row["warnings"]
