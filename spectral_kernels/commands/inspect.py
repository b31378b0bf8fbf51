"""`spectral-kernels inspect FILE`: the diagnostics of a training run for any embeddings."""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from spectral_kernels import checks
from spectral_kernels.figures import BASELINE, COLOURS, drawing
from spectral_kernels.files import write_csv
from spectral_kernels.inspection.diagnosis import BATCH, DUPLICATE, Diagnosis, diagnose
from spectral_kernels.inspection.files import open_embeddings
from spectral_kernels.ops.greedy import greedy_select

HELP = """\
Diagnose embeddings: effective ranks of every order with an error, spectrum, near-duplicates, and
what batches of them look like. FILE is .npy, .pt (tensors alone) or .safetensors; rows are scaled
to unit length; the file is read in pieces. Writes FILE's name with _spectrum.csv and
_spectrum.png, and with --subset a diverse subset's row numbers as .npy.
"""


def run(file: Path, out: Path, *, key: str | None, subset: int | None, temperature: float) -> None:
    """Read, print, write."""
    began = time.monotonic()
    z = open_embeddings(file, key)
    if subset is not None:
        checks.integer(subset, "--subset", 1, len(z))
    found = diagnose(z, temperature=temperature, progress=_show if sys.stderr.isatty() else None)
    print(table(found, str(file)))
    spectrum, picture = out / f"{file.stem}_spectrum.csv", out / f"{file.stem}_spectrum.png"
    pairs = zip(found.spectrum.tolist(), found.centred_spectrum.tolist(), strict=True)
    write_csv(spectrum, ({"k": k, "eigenvalue": a, "centred": b} for k, (a, b) in enumerate(pairs, 1)))
    files = [spectrum]
    try:
        _draw(picture, found, file.name)
        files.append(picture)
    except ModuleNotFoundError as error:
        print(f"No picture: {error}")
    if subset is not None:
        files.append(out / f"{file.stem}_subset.npy")
        _write_subset(files[-1], z, subset)
    print(f"\nTook {time.monotonic() - began:.1f} s. Written: {', '.join(map(str, files))}")


def table(found: Diagnosis, name: str) -> str:
    """The diagnosis for a terminal."""
    ranks = found.ranks
    lines = [
        f"{name}: {found.rows:,} rows × {found.dim}, {found.dtype}, {found.zero_rows:,} zero rows",
        "",
        "effective rank           R1        R2      Rinf",
        *(
            f"  {label:<14} {ranks[p + 'R1']:>9.2f} {ranks[p + 'R2']:>9.2f} {ranks[p + 'Rinf']:>9.2f}"
            for label, p in (("as they are", ""), ("centred", "centred "))
        ),
        f"  R2 ± {found.rank_error:.2g} (jackknife); unbiased {ranks['R2 unbiased']:.2f}; RankMe {ranks['RankMe']:.2f}",
        f"mean cosine              {found.mean_cosine:.4f}",
        f"uniformity               {found.uniformity:.3f}",
        f"near-duplicates          {100 * found.duplicate_share:.2f} % have another row within cosine {DUPLICATE}"
        + (f" (± {100 * found.duplicate_error:.2f}, of {found.queries} rows drawn)" if found.duplicate_error else ""),
    ]
    if found.batch_ranks is not None and found.greedy_ranks is not None and found.batch_chi2 is not None:
        share = found.batch_chi2 / (BATCH - 2)
        lines += [
            f"batches of {BATCH}           R2 {found.batch_ranks:.1f} random, {found.greedy_ranks:.1f} by Greedy-64",
            f"softmax at τ = {found.temperature:g}       χ² {found.batch_chi2:.3g}, {100 * share:.1f} % of one-hot",
        ]
    return "\n".join(lines)


def _show(share: float) -> None:
    print(f"\r{100 * share:3.0f} %", end="\r" if share >= 1 else "", file=sys.stderr, flush=True)


def _write_subset(path: Path, z: torch.Tensor, subset: int) -> None:
    import numpy

    generator = torch.Generator().manual_seed(0)
    chosen = greedy_select(z, subset, candidates=min(64, len(z)), generator=generator)
    numpy.save(path, chosen.indices.numpy())
    print(f"subset of {subset}: R2 {float(chosen.effective_rank.reshape(-1)[-1]):.2f}")


def _draw(path: Path, found: Diagnosis, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with drawing(path) as pyplot:
        figure, axis = pyplot.subplots(figsize=(6.4, 3.8))
        k = range(1, found.dim + 1)
        curves: list[tuple[Any, str, str, str]] = [
            (found.spectrum, "-", COLOURS[0], f"as they are, R₂ = {found.ranks['R2']:.1f}"),
            (found.centred_spectrum, "--", COLOURS[1], f"centred, R₂ = {found.ranks['centred R2']:.1f}"),
        ]
        for values, style, colour, label in curves:
            share = values / values.sum().clamp(min=1e-300)
            axis.plot(k, share.clamp(min=1e-12).tolist(), style, color=colour, label=label)
        axis.axhline(1 / found.dim, color=BASELINE, lw=0.8, ls=":", label="isotropic")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("k")
        axis.set_ylabel("λₖ / Σλ")
        axis.legend()
        figure.suptitle(f"{name}: {found.rows:,} rows × {found.dim}", x=0.01, ha="left")
