"""`spectral-kernels inspect FILE`: the diagnostics of a training run for any embeddings."""

import sys
import time
from pathlib import Path

import torch

from spectral_kernels import checks
from spectral_kernels.figures import drawn
from spectral_kernels.files.embeddings import open_embeddings
from spectral_kernels.files.reading import shown
from spectral_kernels.files.writing import replacing, write_csv
from spectral_kernels.inspection.diagnosis import diagnose
from spectral_kernels.inspection.duplicates import Pairs, near_duplicates
from spectral_kernels.inspection.result import DUPLICATE
from spectral_kernels.ops._rows import NORM_FLOOR
from spectral_kernels.ops.greedy import greedy_select

HELP = """\
Diagnose embeddings: effective ranks of every order with an error, spectrum, near-duplicates, and
what batches of them look like. FILE, which is read in pieces, is one of
  .npy, .npz, .pt, .safetensors   an array, or one of several (--key)
  .parquet, a folder of them, or a pattern such as "train-*.parquet"
                                  a column of lists (pip install pyarrow)
  a folder                        of a data set that datasets' save_to_disk wrote (the same)
  .faiss, .index                  (pip install faiss-cpu, if not flat)
Rows are scaled to unit length, but for RankMe. Writes FILE's name with _spectrum.csv and
_spectrum.png, with _duplicates.csv (pairs of rows within a cosine, of which the earlier is the one
to keep; among at most 20,000 rows drawn, with --duplicates 200,000), and with --subset a diverse
subset's row numbers as .npy.
"""

QUICK = 20_000  # rows compared in pairs by default: a second or two


def run(
    file: Path, out: Path, *, key: str | None, subset: int | None, temperature: float, duplicates: float | None
) -> None:
    """Read, print, write."""
    began = time.monotonic()
    z = open_embeddings(file, key)
    if subset is not None:
        checks.integer(subset, "--subset", 1, len(z))
    threshold, most = (DUPLICATE, QUICK) if duplicates is None else (duplicates, None)
    checks.number(threshold, "--duplicates", "above 0 and at most 1", lambda x: 0 < x <= 1)
    progress, stem = (shown_share if sys.stderr is not None and sys.stderr.isatty() else None), name_of(file)
    found = diagnose(z, temperature=temperature, progress=progress)
    pairs = near_duplicates(z, threshold=threshold, most=most, progress=progress)
    print(f"{found.table(shown(file))}\n{pairs.line()}")
    spectrum = out / f"{stem}_spectrum.csv"
    values = zip(found.spectrum.tolist(), found.centred_spectrum.tolist(), strict=True)
    write_csv(spectrum, ({"k": k, "eigenvalue": a, "centred": b} for k, (a, b) in enumerate(values, 1)))
    files = [spectrum, *drawn(spectrum.with_suffix(".png"), lambda path: found.plot(path, shown(file.name)))]
    files.append(out / f"{stem}_duplicates.csv")
    _write_pairs(files[-1], pairs)
    if subset is not None:
        files.append(out / f"{stem}_subset.npy")
        _write_subset(files[-1], z[:], subset)
    print(f"\nTook {time.monotonic() - began:.1f} s. Written: {', '.join(map(shown, files))}")


def name_of(file: Path) -> str:
    """What files about it are called: the folder, where it is a pattern of several files."""
    return (file if file.exists() else file.parent).absolute().stem


def shown_share(share: float) -> None:
    """A share of the work, on one line of a terminal."""
    print(f"\r{100 * share:3.0f} %", end="\r" if share >= 1 else "", file=sys.stderr, flush=True)


def _write_pairs(path: Path, pairs: Pairs) -> None:
    with replacing(path) as file:
        file.write(b"keep,duplicate,cosine\n")
        for (keep, other), cosine in zip(pairs.rows.tolist(), pairs.cosines.tolist(), strict=True):
            file.write(f"{keep},{other},{cosine:.6f}\n".encode())


def _write_subset(path: Path, z: torch.Tensor, subset: int) -> None:
    import numpy

    generator = torch.Generator().manual_seed(0)
    chosen = greedy_select(z, subset, candidates=min(64, len(z)), generator=generator)
    picks = z[chosen.indices]
    if bool(((picks.double().norm(dim=1) <= NORM_FLOOR) & (picks != 0).any(1)).any()):
        raise ValueError(f"--subset takes rows shorter than {NORM_FLOOR:g} for zero rows: scale the embeddings up")
    with replacing(path) as out:
        numpy.save(out, chosen.indices.numpy())
    print(f"subset of {subset}: R2 {float(chosen.effective_rank.reshape(-1)[-1]):.2f}")
