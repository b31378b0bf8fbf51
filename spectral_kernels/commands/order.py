"""`spectral-kernels order FILE`: the batches of an epoch, chosen by embeddings that are known up front."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.commands.inspect import name_of, shown_share
from spectral_kernels.files.embeddings import open_embeddings
from spectral_kernels.files.reading import FileError, one_line, read_bytes, read_csv, shown
from spectral_kernels.files.stored_rows import FileRows
from spectral_kernels.files.writing import replacing
from spectral_kernels.ops.effective_rank import batch_effective_rank
from spectral_kernels.selection import GreedyBatchSampler, MemoryBank
from spectral_kernels.selection.quotas import QuotaBatchSampler

HELP = """\
Choose the batches of an epoch by embeddings, each row once: diverse ones, which share out common
and rare rows evenly (GreedyBatchSampler without replacement). With --labels each batch also has
the labels' shares of the data set, within one row.

Writes row numbers, from 0: to .npy int64 (batches, B), a short last batch as the one line of
NAME_last.jsonl; to .jsonl a list for each batch. They are held in memory, as the embeddings are.

example:
  spectral-kernels order embeddings.npy --batch-size 256 --labels labels.txt --out batches.npy

  batches = numpy.load("batches.npy").tolist()
  loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches)
"""
PIECE = 2**22  # elements read at a time
LABELS = 2**30  # bytes
SHOWN = 64  # batches whose effective rank is taken


def run(file: Path, size: int, *, key: str | None, labels: Path | None, seed: int, out: Path | None) -> None:
    """Read, choose, write."""
    z = open_embeddings(file, key)
    checks.integer(size, "--batch-size", 1, len(z))
    checks.integer(seed, "--seed", 0)
    out = out or Path(f"{name_of(file)}_order.npy")
    if out.suffix not in (".npy", ".jsonl"):
        raise ValueError(f"--out must end in .npy or .jsonl, got {shown(out)}")
    classes = None if labels is None else read_labels(labels, len(z))
    bank = _bank_of(z, classes is not None)
    if bank.num_seen < size:
        raise ValueError(f"only {bank.num_seen} of {len(z)} rows are not zero: too few to choose batches of {size} by")
    options: dict[str, Any] = {"min_seen": 0.0, "drop_last": False, "seed": seed}
    sampler = (
        GreedyBatchSampler(bank, size, replacement=False, **options)
        if classes is None
        else QuotaBatchSampler(bank, size, classes, **options)
    )
    batches, tell = [], sys.stderr is not None and sys.stderr.isatty()
    for batch in sampler:
        batches.append(batch)
        if tell:
            shown_share(len(batches) / len(sampler))
    files = _write(out, batches, size)
    short = len(batches[-1]) if len(batches[-1]) < size else 0
    print(f"{len(batches) - bool(short):,} batches of {size}" + f" and one of {short}" * bool(short))
    print(f"effective rank R2 of a batch: {_ranks(bank, batches, size)}; shuffled: {_ranks(bank, None, size)}")
    print(f"Took {sampler.selection_seconds:.1f} s to choose. Written: {', '.join(map(shown, files))}")


def read_labels(path: Path, rows: int) -> Tensor:
    """(rows,) int64 of a file: .npy, or text with a whole number in each line (.csv: after a name or not).

    Raises:
        FileError: another kind of file or number of labels, or what is no whole number; names the line.
    """
    if path.suffix == ".npy":
        try:
            found = numpy.load(io.BytesIO(read_bytes(path, LABELS)), allow_pickle=False)
            if not isinstance(found, numpy.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
                raise ValueError(
                    f"its shape is {getattr(found, 'shape', None)}, its type {getattr(found, 'dtype', None)}"
                )
            labels = torch.from_numpy(found.astype(numpy.int64))
        except (FileError, FileNotFoundError):
            raise
        except Exception as error:  # what is no .npy ends in errors of any kind
            raise FileError(path, f"must hold whole numbers, one a row: {one_line(error)}") from error
    elif path.suffix in (".csv", ".txt"):
        lines, values = read_csv(path), []
        for number, line in enumerate(lines, 1):
            try:
                (text,) = line
                value = int(text)
                if not -(2**63) <= value < 2**63:
                    raise ValueError
                values.append(value)
            except ValueError:
                if number > 1 or path.suffix == ".txt":
                    raise FileError(
                        path, f"must have one whole number a line, but line {number} is {line!r:.60}"
                    ) from None
        labels = torch.tensor(values, dtype=torch.int64)
    else:
        raise FileError(path, "must be .npy, .csv or .txt")
    if len(labels) != rows:
        raise FileError(path, f"holds {len(labels)} labels, but there are {rows} rows")
    return labels


def _bank_of(z: Tensor | FileRows, every: bool) -> MemoryBank:
    """A bank of the rows, read in pieces; with `every` zero rows, which have no direction, are given one, the same for all."""
    bank = MemoryBank(*z.shape, dtype=z.dtype)
    step = max(1, PIECE // bank.d)
    for first in range(0, bank.n, step):
        piece = z[first : first + step]
        bad = (~piece.isfinite().all(1)).nonzero()
        if len(bad):
            raise ValueError(f"row {first + int(bad[0])} of the embeddings holds NaN or Inf")
        bank.update(torch.arange(first, first + len(piece)), piece)
    zero = (~bank.seen).nonzero()[:, 0]
    if every and len(zero):
        bank.update(zero, torch.ones(len(zero), bank.d))
    return bank


def _ranks(bank: MemoryBank, batches: list[list[int]] | None, size: int) -> str:
    """Mean and least of some of the full batches, or of as many shuffled ones."""
    full = bank.n // size
    places = torch.linspace(0, full - 1, min(full, SHOWN)).round().long()
    if batches is None:
        rows = torch.randperm(bank.n, generator=torch.Generator().manual_seed(0))[: full * size].reshape(full, size)[
            places
        ]
    else:
        rows = torch.tensor([batches[place] for place in places.tolist()])
    ranks = batch_effective_rank(bank.embeddings, rows)
    return f"{float(ranks.mean()):.2f}, least {float(ranks.min()):.2f}"


def _write(out: Path, batches: list[list[int]], size: int) -> list[Path]:
    full = [batch for batch in batches if len(batch) == size]
    if out.suffix == ".jsonl":
        full = []
    else:
        with replacing(out) as file:
            numpy.save(file, numpy.array(full, dtype=numpy.int64))
    lines = batches[len(full) :]
    path = out if out.suffix == ".jsonl" else out.with_name(f"{out.stem}_last.jsonl")
    if lines:
        with replacing(path) as file:
            file.writelines(json.dumps(batch).encode() + b"\n" for batch in lines)
    else:
        path.unlink(missing_ok=True)  # of an earlier call
    return [*([out] if full else []), *([path] if lines else [])]
