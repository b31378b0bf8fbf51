"""The picture of `spectral-kernels band`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_kernels.figures import BASELINE, COLOURS, drawing
from spectral_kernels.theory.validation import ANISOTROPIES, RANK, TEMPERATURES, Setting, TemperatureLaw

BLUE, RED, _, _, LIGHT = COLOURS[:5]


def band(path: Path, settings: Sequence[Setting], encoder: Sequence[Setting], law: TemperatureLaw) -> None:
    """Measured norms between their bounds: 16 settings, one real encoder, and against the temperature.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    with drawing(path) as pyplot:
        figure, axes = pyplot.subplot_mosaic(
            [["synthetic", "synthetic"], ["encoder", "law"]], figsize=(10.5, 7.2), height_ratios=(1.15, 1)
        )
        _settings(axes["synthetic"], settings)
        _anchors(axes["encoder"], [setting for setting in encoder if setting.temperature == 0.2])
        _law(axes["law"], law)
        inside = sum(setting.inside[f"rank {RANK}"] for setting in [*settings, *encoder])
        total = sum(setting.anchors for setting in [*settings, *encoder])
        figure.suptitle(
            f"Squared InfoNCE gradient norms and their bounds: {inside:,} of {total:,} anchors inside",
            x=0.01,
            ha="left",
        )


def _settings(axis: Any, settings: Sequence[Setting]) -> None:
    place = {value: number for number, value in enumerate(f"k^-{a:g}" for a in ANISOTROPIES)}
    stride = len(TEMPERATURES) + 1
    places = [place[s.source] * stride + TEMPERATURES.index(s.temperature) for s in settings]
    for number, (x, setting) in enumerate(zip(places, settings, strict=True)):
        for kind, colour, width in (("rank 0", LIGHT, 9), (f"rank {RANK}", BLUE, 5)):
            ends = [setting.lower[kind], setting.upper[kind]]
            axis.plot([x, x], ends, color=colour, lw=width, solid_capstyle="butt", label=kind if number == 0 else None)
        axis.plot(x, setting.norm, "o", color=RED, ms=4, zorder=3, label="measured" if number == 0 else None)
    axis.set(yscale="log", xlabel="temperature τ", ylabel="mean ‖g‖² of 4096 anchors")
    axis.set_xticks(places, [f"{s.temperature:g}" for s in settings])
    for name, number in place.items():
        axis.text(number * stride + 1.5, 1.01, f"spectrum {name}", transform=axis.get_xaxis_transform(), ha="center")
    axis.legend(loc="lower right", ncols=3)


def _anchors(axis: Any, settings: Sequence[Setting]) -> None:
    for number, (setting, colour) in enumerate(zip(settings, (BASELINE, BLUE), strict=True)):
        order = setting.norms.argsort()
        x = (order.argsort().sort().values.double() + 0.5) / len(order)
        low, norm, high = (values[order].clamp(min=1e-6) for values in (setting.lowers, setting.norms, setting.uppers))
        axis.fill_between(x, low, high, color=colour, alpha=0.35, lw=0, rasterized=True)
        axis.plot(x, norm, color=colour, lw=1.2, label=f"{setting.source} (R₂ = {setting.effective_rank:.1f})")
        axis.text(
            0.02, 0.9 - 0.08 * number, f"{setting.source}: median width {setting.width[f'rank {RANK}']:.2f}",
            transform=axis.transAxes, color=colour,
        )  # fmt: skip
    title = f"A real encoder at τ = 0.2, band of rank {RANK}"
    axis.set(yscale="log", title=title, xlabel="anchors, by their norm", ylabel="‖g‖²")
    axis.legend(loc="lower right")


def _law(axis: Any, law: TemperatureLaw) -> None:
    axis.fill_between(law.temperatures, law.lower, law.upper, color=LIGHT, alpha=0.6, lw=0, label="band, rank 0")
    axis.plot(law.temperatures, law.norms, color=RED, lw=1.2, label="measured")
    last, temperature = law.norms[-1], law.temperatures[-1]
    line = [last * (temperature / t) ** 2 for t in law.temperatures]
    axis.plot(law.temperatures, line, ":", color=BASELINE, label="1/τ²")
    axis.set(xscale="log", yscale="log", ylim=(1e-4, 1e4), xlabel="temperature τ")
    axis.set_title("The law of the temperature, isotropic batch")
    axis.legend(loc="upper right")
