"""Pictures. matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_kernels.figures import BASELINE, COLOURS, drawing
from spectral_kernels.training.clock import PARTS
from spectral_kernels.training.compare import RunRecord
from spectral_kernels.training.config import Config
from spectral_kernels.training.report import StrategySummary, Summary, budget

PART_COLOURS = {"selection": "#222222", "data": "#8C8C8C", "compute": "#D4D4D4"}  # colours mean strategies


def comparison(path: Path, records: Sequence[RunRecord], summary: Summary, config: Config, dataset: str) -> None:
    """Draw a comparison: accuracy against training time, effective rank of the batches, where a step's
    time goes.

    Args:
        path: of the PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    names = [strategy.strategy for strategy in summary.strategies]
    others = iter(COLOURS * len(names))
    colours = {name: BASELINE if name == "random" else next(others) for name in names}
    with drawing(path) as pyplot:
        figure, axes = pyplot.subplot_mosaic(
            [["accuracy", "rank"], ["accuracy", "time"]], figsize=(10.5, 5.2), width_ratios=(1.35, 1)
        )
        _accuracy(axes["accuracy"], records, summary, colours)
        _rank(axes["rank"], records, colours)
        _time(axes["time"], summary.strategies)
        seeds = len(config.compare.seeds)
        figure.suptitle(
            f"SimCLR on {dataset}: {config.model.encoder}, batch {config.train.batch_size}, "
            f"{budget(config)} a run, {seeds} seed{'s' if seeds > 1 else ''}",
            fontsize=10,
            x=0.01,
            ha="left",
        )


def _runs(records: Sequence[RunRecord], name: str) -> list[RunRecord]:
    return [record for record in records if record.strategy == name]


def _accuracy(axes: Any, records: Sequence[RunRecord], summary: Summary, colours: dict[str, str]) -> None:
    """Linear probe against seconds: a thin line a seed, a thick one for their mean."""
    for name, colour in colours.items():
        runs = _runs(records, name)
        for run in runs:
            axes.plot(*_curve(run), color=colour, alpha=0.35, linewidth=0.8)
        together = [_curve(run) for run in runs]
        length = min(len(x) for x, _ in together)
        seconds, accuracy = torch.tensor([[x[:length], y[:length]] for x, y in together]).mean(0).tolist()
        axes.plot(seconds, accuracy, color=colour, linewidth=2, marker="o", markersize=3.5, label=name)
    target = 100 * summary.target
    axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target, {target:.1f} %")
    untrained = 100 * summary.untrained["linear"].mean
    axes.axhline(untrained, color="black", linestyle=":", linewidth=1, label=f"untrained encoder, {untrained:.1f} %")
    for strategy in summary.strategies:
        if strategy.time_to_target is not None:
            style = {"marker": "v", "markersize": 8, "markeredgecolor": "white", "color": colours[strategy.strategy]}
            axes.plot(strategy.time_to_target.mean, target, **style)
    axes.set(title="Linear probe accuracy", xlabel="training wall-clock, s (evaluation excluded)", ylabel="%")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right", frameon=True, framealpha=1, edgecolor="none")


def _curve(run: RunRecord) -> tuple[list[float], list[float]]:
    return [row["seconds"] for row in run.evaluations], [100 * row["linear"] for row in run.evaluations]


def _rank(axes: Any, records: Sequence[RunRecord], colours: dict[str, str]) -> None:
    """Effective rank of the batches against steps, mean over seeds and the span they cover."""
    for name, colour in colours.items():
        traces = [torch.tensor([row["effective_rank"] for row in run.steps]) for run in _runs(records, name)]
        together = torch.stack([trace[: min(map(len, traces))] for trace in traces])
        steps = (~together.isnan().any(0)).nonzero().squeeze(1)
        together = together[:, steps]
        axes.plot(steps.tolist(), together.mean(0).tolist(), color=colour, linewidth=1.6)
        low, high = together.amin(0).tolist(), together.amax(0).tolist()
        axes.fill_between(steps.tolist(), low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(title="Effective rank of the batches (order 2)", xlabel="step")
    axes.set_ylim(bottom=0)


def _time(axes: Any, strategies: Sequence[StrategySummary]) -> None:
    """Stacked bars of a step's time, with selection's share written beside."""
    names = [strategy.strategy for strategy in strategies]
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [strategy.ms[part].mean for strategy in strategies]
        axes.barh(names, widths, left=left, height=0.6, color=PART_COLOURS[part], label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for place, strategy in enumerate(strategies):
        axes.text(1.02 * left[place], place, f"selection {strategy.overhead.mean:.1f} %", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="Time of a step", xlabel="ms")
    axes.set_xlim(right=1.35 * max(left))
    axes.legend(ncols=len(PARTS), loc="upper left", bbox_to_anchor=(0, -0.28), borderpad=0)
