"""The pictures of docs/, each by its name: python bench/figures.py small_batches whitening monitor band variance.

Without a name: all of them (four minutes on two cores).
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels import cli
from spectral_kernels.figures import BASELINE, COLOURS, drawing
from spectral_kernels.files.writing import write_csv
from spectral_kernels.ops.whitening import METHODS
from spectral_kernels.theory.validation import power_law

DOCS = Path(__file__).parent.parent / "docs"


def small_batches() -> None:
    """R₂ of batches against that of many rows: bias, scatter, and the jackknife's error beside the scatter."""
    d, repeats, sizes = 128, 400, (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    table = []
    for anisotropy in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        many = float(sk.effective_rank(power_law(anisotropy, generator, 200_000, d), order=2, unbiased=True))
        for n in sizes:
            z = power_law(anisotropy, generator, n * repeats, d).unflatten(0, (repeats, n))
            for name, unbiased in (("plain", False), ("unbiased", True)):
                ranks = sk.effective_rank(z, order=2, unbiased=unbiased)
                errors = sk.effective_rank_error(z, unbiased=unbiased)
                median, low, high = (float(ranks.quantile(q)) for q in (0.5, 0.16, 0.84))
                table.append({
                    "anisotropy": anisotropy, "n": n, "estimate": name, "true": many, "median": median, "low": low,
                    "high": high, "jackknife": float(errors.median()), "scatter": (high - low) / 2,
                })  # fmt: skip
    write_csv(DOCS / "small_batches.csv", table)
    with drawing(DOCS / "small_batches.png") as pyplot:
        figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.4))
        for axis, anisotropy in zip(axes, (0.0, 1.0), strict=False):
            for name, colour in (("plain", COLOURS[1]), ("unbiased", COLOURS[0])):
                rows = [row for row in table if (row["anisotropy"], row["estimate"]) == (anisotropy, name)]
                n = [row["n"] for row in rows]
                axis.fill_between(
                    n, [r["low"] for r in rows], [r["high"] for r in rows], color=colour, alpha=0.25, lw=0
                )
                axis.plot(n, [r["median"] for r in rows], color=colour, label=name)
            axis.axhline(rows[0]["true"], color=BASELINE, ls=":", label="of 200,000 rows")
            axis.set_xscale("log", base=2)
            axis.set(ylim=(0, 2 * rows[0]["true"]), title=f"R₂ of n rows, spectrum k^-{anisotropy:g}", xlabel="n")
            axis.legend()
        for name, colour in (("plain", COLOURS[1]), ("unbiased", COLOURS[0])):
            rows = [row for row in table if (row["anisotropy"], row["estimate"]) == (1.0, name)]
            n = [row["n"] for row in rows]
            axes[2].plot(n, [row["scatter"] for row in rows], color=colour, label=f"{name}: seen")
            axes[2].plot(n, [row["jackknife"] for row in rows], "--", color=colour, label=f"{name}: jackknife")
        axes[2].set_xscale("log", base=2)
        axes[2].set(yscale="log", title="Scatter and its estimate, k^-1", xlabel="n")
        axes[2].legend(fontsize=7)
        figure.suptitle(f"Effective rank of small batches, d = {d}: median and 68 % of 400 batches", x=0.01, ha="left")


def whitening() -> None:
    """Errors of a step with whitening before NT-Xent, and how white the rows are, for the three methods."""
    d, table = 32, []
    generator = torch.Generator().manual_seed(0)
    for n in (8, 16, 32, 64, 256, 1024, 4096):
        for kind in ("distinct", "duplicates"):
            first = power_law(2.0, generator, n, d)
            if kind == "duplicates":
                first = first[torch.arange(n) % max(1, n // 8)]
            z = torch.cat([first, first + 0.1 * power_law(2.0, generator, n, d)])
            for method in METHODS:
                for temperature in (0.01, 0.1):
                    exact = _gradient(z, method, temperature)
                    single = _gradient(z.float(), method, temperature)
                    half = _gradient(z.bfloat16().float(), method, temperature, amp=True)
                    half_exact = _gradient(z.bfloat16().double(), method, temperature)
                    white = sk.whiten(z.float(), method=method).double()
                    values = torch.linalg.eigvalsh(white.mT @ white / len(white))
                    table.append({
                        "pairs": n, "rows": kind, "method": method, "temperature": temperature,
                        "fp32_error": _error(single, exact), "bf16_error": _error(half, half_exact),
                        "largest": float(values[-1]), "smallest": float(values[max(0, d - 2 * n)]),
                    })  # fmt: skip
    write_csv(DOCS / "whitening.csv", table)
    with drawing(DOCS / "whitening.png") as pyplot:
        figure, axes = pyplot.subplots(2, len(METHODS), figsize=(10.5, 5.8), sharey="row", sharex=True)
        for column, method in enumerate(METHODS):
            for kind, style in (("distinct", "-"), ("duplicates", "--")):
                rows = [row for row in table if (row["method"], row["rows"]) == (method, kind)]
                for temperature, colour in ((0.01, COLOURS[1]), (0.1, COLOURS[0])):
                    here = [row for row in rows if row["temperature"] == temperature]
                    n = [row["pairs"] for row in here]
                    for name, width in (("fp32", 1.6), ("bf16", 0.8)):
                        label = f"{name}, τ = {temperature:g}, {kind}"
                        errors = [row[f"{name}_error"] for row in here]
                        axes[0, column].plot(n, errors, style, color=colour, lw=width, label=label)
                for end, colour in (("largest", COLOURS[2]), ("smallest", BASELINE)):
                    label = f"{end} eigenvalue, {kind}"
                    axes[1, column].plot(n, [row[end] for row in here], style, color=colour, label=label)
            axes[0, column].set(yscale="log", title=method)
            axes[1, column].set_xscale("log", base=2)
            axes[1, column].set_xlabel("pairs of views")
        axes[0, 0].set_ylabel("gradient's relative error")
        axes[1, 0].set_ylabel("whitened covariance")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
        axes[1, 2].legend(fontsize=7)
        figure.suptitle("Whitening before NT-Xent, d = 32, spectrum 1/k²: against float64", x=0.01, ha="left")


def _gradient(z: Tensor, method: str, temperature: float, amp: bool = False) -> Tensor:
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = torch.nn.functional.linear(z, torch.eye(z.shape[1])) if amp else z
        white = sk.whiten(out, method=method)
        loss = sk.nt_xent(*white.chunk(2), temperature=temperature)
    return torch.autograd.grad(loss.double(), z)[0].double()


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def monitor() -> None:
    """A run of greedy batches on the long-tailed pool, as its monitor saw it."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["train", "--config", "demo", "--out", folder, "selection.strategy=greedy-64"]
        settings = ["data.long_tail=100", "train.steps=400", "evaluate.every=400"]
        _command([*arguments, *settings])
        for name in ("monitor.csv", "monitor_spectrum.csv", "monitor.png"):
            shutil.copy(Path(folder) / name, DOCS / name)


def band() -> None:
    """`spectral-kernels band`."""
    _command(["band", "--out", str(DOCS)])


def variance() -> None:
    """`spectral-kernels variance`."""
    _command(["variance", "--out", str(DOCS)])


def _command(arguments: list[str]) -> None:
    if cli.main(arguments):
        sys.exit(f"spectral-kernels {' '.join(arguments)} failed")


FIGURES = {function.__name__: function for function in (small_batches, whitening, monitor, band, variance)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    for name in names:
        FIGURES[name]()
        print(f"docs/{name}.png")


if __name__ == "__main__":
    main()
