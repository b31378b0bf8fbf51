"""What all pictures share: matplotlib, imported when one is drawn, and a style that print and any colour vision bear."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectral_kernels.files.writing import replacing

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
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing a plot needs matplotlib, which is not installed: pip install 'spectral_kernels[train]'"
        ) from error
    with pyplot.rc_context(STYLE):
        yield pyplot
        figure = pyplot.gcf()
        with replacing(path) as file:
            figure.savefig(file, dpi=150, format="png", metadata={"Software": None})
        pyplot.close(figure)
