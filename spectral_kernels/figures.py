"""What all pictures share: matplotlib, imported when one is drawn, and a style that print and any colour vision bear."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectral_kernels.files.reading import printable
from spectral_kernels.files.writing import replacing
from spectral_kernels.optional import require

# Okabe & Ito's colours, told apart with any colour vision; the baseline is grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F")
BASELINE = "#4D4D4D"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@contextmanager
def drawing(path: Path) -> Iterator[Any]:
    """`matplotlib.pyplot`; the current figure is written to `path`, a PNG, at the end.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require("matplotlib", "drawing a plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "drawing a plot")
    with pyplot.rc_context(STYLE):
        yield pyplot
        figure = pyplot.gcf()
        with replacing(path) as file:
            figure.savefig(file, dpi=150, format="png", metadata={"Software": None})
        pyplot.close(figure)


def drawn(path: Path, draw: Callable[[Path], object]) -> list[Path]:
    """The picture that `draw` makes at `path`; none, and a line that says why, where matplotlib is missing."""
    try:
        draw(path)
    except ModuleNotFoundError as error:  # the figures are there all the same
        print(f"No picture: {printable(str(error))}")
        return []
    return [path]
