"""What a set of embeddings looks like, from two passes over its rows and a few samples."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.files.stored_rows import FileRows
from spectral_kernels.inspection.moments import moments
from spectral_kernels.inspection.result import BATCH, DUPLICATE, Diagnosis
from spectral_kernels.ops._rows import read_rows
from spectral_kernels.ops.effective_rank import effective_rank, rank_of_spectrum, significant, singular
from spectral_kernels.ops.effective_rank.error import effective_rank_error
from spectral_kernels.ops.greedy import greedy_select
from spectral_kernels.theory.band import gradient_band

CHUNK = 2**22  # elements at a time: 16 MB in float32
SAMPLE, POOL = 4096, 16384
QUERIES = 512
BATCHES = 16


def diagnose(
    z: Tensor | FileRows, *, temperature: float = 0.1, seed: int = 0, progress: Callable[[float], None] | None = None
) -> Diagnosis:
    """Diagnose embeddings: effective ranks of every order, spectra, near-duplicates, what batches of them look like.

    They are read twice, in pieces of 16 MB; nothing of size N² is made. Rows of any scale.

    Args:
        z: (N, d), float64, float32, bfloat16 or float16; may be memory-mapped, or on any device, or in a file
            (`open_embeddings`).
        temperature: τ of the batches' softmax.
        seed: of the samples.
        progress: is told the share of the work that is done.

    Returns:
        `Diagnosis`, which prints as a table.

    Raises:
        ValueError: wrong shape or dtype; fewer than two rows; a row that holds NaN or Inf (the first one is named); only
            zero rows; temperature not above 0.
    """
    if not isinstance(z, FileRows):
        z = checks.floating(z, "embeddings", ndim=2).detach()
    checks.positive(temperature, "temperature")
    rows, dim = z.shape
    if rows < 2:
        raise ValueError(f"embeddings must have at least 2 rows, got {rows}")
    tell = progress or (lambda share: None)
    generator = torch.Generator().manual_seed(seed)
    found = moments(_pieces(z, torch.float64), dim, lambda done: tell(0.4 * done / rows))
    if found.zero_rows == rows:
        raise ValueError(f"all {rows} embeddings are zero rows")
    values, centred_values = _eigenvalues(found.second), _eigenvalues(found.covariance)
    sample = _draw(z, SAMPLE, generator)
    error = float(effective_rank_error(sample)) * math.sqrt(len(sample) / rows)
    share, share_error, queries = _duplicates(z, generator, lambda part: tell(0.4 + 0.5 * part))
    batch_ranks, greedy_ranks, chi2 = _batches(z, temperature, generator)
    tell(1.0)
    return Diagnosis(
        rows=rows, dim=dim, dtype=str(z.dtype).removeprefix("torch."), zero_rows=found.zero_rows,
        spectrum=values, centred_spectrum=centred_values,
        ranks=_ranks(values, centred_values, rows) | {"RankMe": _rankme(_eigenvalues(found.raw))}, rank_error=error,
        mean_cosine=float(found.mean @ found.mean),
        uniformity=_uniformity(sample), duplicate_share=share, duplicate_error=share_error, queries=queries,
        temperature=temperature, batch_ranks=batch_ranks, greedy_ranks=greedy_ranks, batch_chi2=chi2,
    )  # fmt: skip


def _pieces(z: Tensor | FileRows, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each piece."""
    # what is made of float64 rows takes several times the room, and so do cosines with the queries
    step = max(1, CHUNK // max(z.shape[1], QUERIES) // (2 if dtype == torch.float64 else 1))
    for first in range(0, len(z), step):
        yield first, z[first : first + step].cpu().to(dtype)


def _eigenvalues(matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.flip(0).clamp(min=0)


def _ranks(values: Tensor, centred: Tensor, rows: int) -> dict[str, float]:
    found = {}
    for prefix, spectrum in (("", values), ("centred ", centred)):
        for name, order in (("R1", 1.0), ("R2", 2.0), ("Rinf", math.inf)):
            found[prefix + name] = float(rank_of_spectrum(spectrum, order))
    # tr M² without the n terms i = j; rows of length 0 are in neither sum
    trace, squares = values.sum(), values.square().sum()
    pairs = (rows * squares - trace) / (rows - 1)
    found["R2 unbiased"] = float(trace.square() / pairs) if pairs > 0 else math.inf
    return found


def _rankme(raw: Tensor) -> float:
    """Of the eigenvalues of the raw rows' second moment; what is below its rounding would count, by its square root."""
    return float(rank_of_spectrum(singular(significant(raw)), 1.0))


def _draw(z: Tensor | FileRows, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """`count` rows, or all, as unit rows."""
    if len(z) <= count:
        return read_rows(z[:].cpu(), True, dtype)
    return read_rows(z[torch.randperm(len(z), generator=generator)[:count].sort().values].cpu(), True, dtype)


def _uniformity(sample: Tensor) -> float:
    total, n = 0.0, len(sample)
    for first in range(0, n, QUERIES):
        cosines = sample[first : first + QUERIES] @ sample[first:].mT
        total += float((-4 * (1 - cosines)).exp().triu(1).sum())
    return math.log(total / (n * (n - 1) / 2))


def _duplicates(
    z: Tensor | FileRows, generator: torch.Generator, tell: Callable[[float], None]
) -> tuple[float, float, int]:
    """Share of rows with another one within `DUPLICATE`, its standard error, and of how many rows."""
    exact = len(z) <= SAMPLE
    queries = torch.arange(len(z)) if exact else torch.randperm(len(z), generator=generator)[:QUERIES].sort().values
    unit = read_rows(z[queries].cpu(), True, torch.float64).float()
    nearest = torch.full((len(queries),), -1.0)
    # float64 rows may lie outside float32
    for first, piece in _pieces(z, torch.float64 if z.dtype == torch.float64 else torch.float32):
        cosines = unit @ read_rows(piece, True).float().mT
        own = (queries >= first) & (queries < first + len(piece))
        cosines[own.nonzero().squeeze(1), queries[own] - first] = -1.0
        nearest = torch.maximum(nearest, cosines.amax(1))
        tell((first + len(piece)) / len(z))
    share = float((nearest >= DUPLICATE).double().mean())
    return share, 0.0 if exact else math.sqrt(share * (1 - share) / len(queries)), len(queries)


def _batches(
    z: Tensor | FileRows, temperature: float, generator: torch.Generator
) -> tuple[float | None, float | None, float | None]:
    if len(z) < 2 * BATCH:
        return None, None, None
    pool = _draw(z, POOL, generator, torch.float64 if z.dtype == torch.float64 else torch.float32).float()
    ranks, greedy, chi2 = [], [], []
    for _ in range(BATCHES):
        batch = pool[torch.randperm(len(pool), generator=generator)[:BATCH]]
        ranks.append(float(effective_rank(batch, order=2)))
        chi2.append(float(gradient_band(batch, batch, temperature=temperature).chi2.median()))
        chosen = greedy_select(pool, BATCH, candidates=64, generator=generator).indices
        greedy.append(float(effective_rank(pool[chosen], order=2)))
    return sum(ranks) / BATCHES, sum(greedy) / BATCHES, sum(chi2) / BATCHES
