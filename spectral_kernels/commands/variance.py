"""`spectral-kernels variance`: the gradient's variance with and without in-batch whitening."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_kernels.figures import BASELINE, COLOURS, drawing, drawn
from spectral_kernels.files.writing import write_csv
from spectral_kernels.training.compare import run_config
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData
from spectral_kernels.training.gradients import STEPS, Comparison, along_training, at_fixed_parameters
from spectral_kernels.training.loop import Run
from spectral_kernels.training.report import aligned

HELP = f"""\
Total variance of the loss's gradient over {STEPS} batches, with and without in-batch whitening before
the loss: at fixed parameters (the same ones and the same batches for both), and over {STEPS} consecutive
steps of two runs that differ in whitening only. Unscaled, after scaling both to the same mean
gradient norm, and beside what the upper band predicts. Published: a factor of 1.37. Writes
variance.csv and variance.png.
"""
DEFAULTS = ("model.width=16", "train.steps=300")
PUBLISHED = 1.37
LABELS = {"total": "unscaled", "equal_norm": "at equal mean norm", "band": "upper band"}


def run(config: Config, data: ImageData, out: Path) -> None:
    """Train, measure, print, write."""
    began = time.monotonic()
    plain, whitened = (Run(run_config(config, name, config.train.seed), data) for name in ("random", "random+whiten"))
    found: list[Comparison] = []
    steps = config.train.steps or 300
    for step in sorted({0, STEPS, steps // 2, max(0, steps - STEPS)}):
        for training in (plain, whitened):
            training.advance(step)
        found.append(at_fixed_parameters(plain))
        if steps - step >= STEPS:
            found.append(along_training(plain, whitened))
    settings = f"{config.model.encoder}, batch {config.train.batch_size}, τ = {config.train.temperature:g}"
    print(f"{data.name}, {settings}; variance without / with whitening:\n")
    header = ["parameters", "from step", *LABELS.values(), "mean norm", "mean norm, whitened"]
    print(aligned(header, [_cells(one) for one in found]))
    print(f"\nAbove 1 whitening lowers it; published: {PUBLISHED}.")
    numbers = out / "variance.csv"
    write_csv(numbers, (_row(one) for one in found))
    files = [numbers, *drawn(out / "variance.png", lambda path: _draw(path, found, config))]
    print(f"Took {time.monotonic() - began:.0f} s. Written: {', '.join(map(str, files))}")


def _cells(one: Comparison) -> list[str]:
    norms = (one.plain.variance.mean_norm, one.whitened.variance.mean_norm)
    return [one.where, str(one.step), *(f"{value:.2f}" for value in one.ratios.values()), *(f"{n:.3g}" for n in norms)]


def _row(one: Comparison) -> dict[str, Any]:
    row: dict[str, Any] = {"where": one.where, "step": one.step}
    for name, measured in (("plain", one.plain), ("whitened", one.whitened)):
        variance = measured.variance
        row |= {
            f"{name}_total": variance.total, f"{name}_at_equal_norm": variance.at_equal_norm,
            f"{name}_mean_norm": variance.mean_norm, f"{name}_upper": measured.upper,
        }  # fmt: skip
    return row | {f"ratio_{name}": value for name, value in one.ratios.items()}


def _draw(path: Path, found: Sequence[Comparison], config: Config) -> None:
    with drawing(path) as pyplot:
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
        titles = {"fixed": f"fixed parameters, {STEPS} batches", "along": f"{STEPS} consecutive steps"}
        for axis, (where, title) in zip(axes, titles.items(), strict=True):
            here = [one for one in found if one.where == where]
            for number, (name, label) in enumerate(LABELS.items()):
                x = [place + 0.26 * (number - 1) for place in range(len(here))]
                axis.bar(x, [one.ratios[name] for one in here], 0.24, color=COLOURS[number], label=label)
            axis.axhline(1, color=BASELINE, lw=0.8)
            axis.axhline(PUBLISHED, color=BASELINE, lw=0.8, ls=":", label=f"published, {PUBLISHED}")
            axis.set_xticks(range(len(here)), [f"step {one.step}" for one in here])
            axis.set_title(title)
        axes[0].set_ylabel("without / with whitening")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(
            f"Gradient variance and in-batch whitening, τ = {config.train.temperature:g}", x=0.01, ha="left"
        )
