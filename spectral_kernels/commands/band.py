"""`spectral-kernels band`: the bands against measured gradients."""

import time
from pathlib import Path

from spectral_kernels.figures import drawn
from spectral_kernels.files.writing import write_csv
from spectral_kernels.theory import figure
from spectral_kernels.theory.validation import (
    BATCHES,
    KINDS,
    TEMPERATURES,
    Setting,
    measure,
    selected_ranks,
    synthetic_settings,
    temperature_law,
    whitened_gradients,
)
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData
from spectral_kernels.training.gradients import embed
from spectral_kernels.training.loop import Run
from spectral_kernels.training.report import aligned

HELP = """\
Compare the bounds of the InfoNCE gradient with measured gradients:
  - 16 synthetic settings: 4 temperatures × spectra k^-a, a = 0, 0.5, 1, 2; 4096 anchors each;
  - the embeddings of a real encoder, before and after a short training;
  - the law of the temperature, and three first experiments: anisotropy and the gradient's norm,
    selection and diversity, whitening and the gradient's variance.
Writes band.csv and band.png; the exit status is 1 if one anchor is outside its band. Settings are
those of the encoder.
"""
DEFAULTS = ("train.steps=150", "model.width=16")


def run(config: Config, data: ImageData, out: Path) -> int:
    """Measure, print, write; the exit status."""
    began = time.monotonic()
    settings = list(synthetic_settings())
    print(_table(settings), flush=True)
    encoder = _encoder_settings(config, data)
    steps = config.train.steps
    print(f"\n{data.name}, {config.model.encoder}, before and after {steps} steps of SimCLR (one-way loss)\n")
    print(_table(encoder), flush=True)
    print("\nwidth: median over the batches of the median upper/lower of an anchor.\n")

    law = temperature_law()
    print(f"Temperature: mean norm² falls as τ^{law.slope:.3f} at τ = {law.temperatures[-1]:g} (the law: -2).\n")
    print(_experiments(settings))
    numbers = out / "band.csv"
    write_csv(numbers, (_row(setting) for setting in [*settings, *encoder]))
    files = [numbers, *drawn(out / "band.png", lambda path: figure.band(path, settings, encoder, law))]
    print(f"Took {time.monotonic() - began:.0f} s. Written: {', '.join(map(str, files))}")
    outside = [setting for setting in [*settings, *encoder] if not setting.contained]
    for setting in outside:
        print(f"NOT CONTAINED: {setting.source} at temperature {setting.temperature:g}")
    return 1 if outside else 0


def _encoder_settings(config: Config, data: ImageData) -> list[Setting]:
    training, settings = Run(config, data), []
    for name in ("untrained", "trained"):
        if name == "trained":
            training.advance(config.train.steps or 0)
        pairs = embed(training, BATCHES)
        settings += [measure(name, pairs, temperature) for temperature in TEMPERATURES]
    return settings


def _table(settings: list[Setting]) -> str:
    header = ["batches", "temperature", "anchors", "R2", "mean norm²"]
    header += [*(f"width, {kind}" for kind in KINDS), *(f"inside %, {kind}" for kind in KINDS)]
    rows = [
        [
            setting.source, f"{setting.temperature:g}", str(setting.anchors), f"{setting.effective_rank:.1f}",
            f"{setting.norm:.3g}", *(f"{setting.width[kind]:.3g}" for kind in KINDS),
            *(f"{100 * count / setting.anchors:.2f}" for count in setting.inside.values()),
        ]
        for setting in settings
    ]  # fmt: skip
    return aligned(header, rows)


def _experiments(settings: list[Setting]) -> str:
    norms = [
        [setting.source, f"{setting.effective_rank:.1f}", f"{setting.norm:.3g}"]
        for setting in settings
        if setting.temperature == 0.1
    ]
    ranks = [[name, f"{rank:.1f}"] for name, rank in selected_ranks().items()]
    whitened = []
    for anisotropy in (0.0, 1.0, 2.0):
        found = whitened_gradients(anisotropy)
        whitened.append([f"k^-{anisotropy:g}", f"{found.measured:.2f}", f"{found.predicted:.2f}"])
    return "\n\n".join(
        [
            aligned(["1. anisotropy at τ = 0.1", "R2", "mean norm²"], norms),
            aligned(["2. batches of 256 from a pool of 4096, spectrum 1/k", "R2"], ranks),
            aligned(["3. whitening at τ = 0.1, 50 batches", "variance / whitened", "upper band / whitened"], whitened)
            + "\nof the anchors' gradients; below 1 whitening makes it larger (published: 1.37, of a training run).\n",
        ]
    )


def _row(setting: Setting) -> dict[str, object]:
    row: dict[str, object] = {
        "source": setting.source, "temperature": setting.temperature, "anchors": setting.anchors,
        "effective_rank": setting.effective_rank, "norm": setting.norm,
    }  # fmt: skip
    for kind in KINDS:
        name = kind.replace(" ", "_")
        row |= {
            f"{name}_inside": setting.inside[kind], f"{name}_width": setting.width[kind],
            f"{name}_lower": setting.lower[kind], f"{name}_upper": setting.upper[kind],
        }  # fmt: skip
    return row
