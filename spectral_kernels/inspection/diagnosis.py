"""What a set of embeddings looks like, from two passes over its rows and a few samples."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spectral_kernels import checks
from spectral_kernels.ops.covariance import covariance
from spectral_kernels.ops.effective_rank import effective_rank, rank_of_spectrum
from spectral_kernels.ops.effective_rank.error import effective_rank_error
from spectral_kernels.ops.greedy import greedy_select
from spectral_kernels.theory.band import gradient_band

CHUNK = 2**25  # elements at a time: 128 MB in float32
SAMPLE = 4096
QUERIES = 512
BATCH, BATCHES = 256, 16
DUPLICATE = 0.98


@dataclass(frozen=True)
class Diagnosis:
    """Of rows scaled to unit length.

    Attributes:
        rows, dim, dtype: of the file. zero_rows: rows of length 0, which have no direction.
        spectrum, centred_spectrum: (d,) float64 eigenvalues of the second moment and of the covariance, descending.
        ranks: effective rank by name; those of the centred rows by "centred ...".
        rank_error: jackknife standard error of R₂; of a sample of 4096 and scaled by √(sample/rows) where there are more.
        mean_cosine: ‖mean‖², the mean cosine of two rows drawn with replacement.
        uniformity: ln E e^{−2‖x−y‖²} (Wang & Isola 2020) of two rows of a sample of 4096.
        duplicate_share: share of rows that have another row within cosine 0.98, of `queries` rows drawn, each compared
            with all rows; duplicate_error: its standard error, 0 where all rows were compared.
        batch_ranks, greedy_ranks: mean R₂ of 16 batches of 256, random and built by Greedy-64; None below 512 rows.
        batch_chi2: median χ² of the softmax weights in such random batches at `temperature`, of n = batch - 1 negatives.
    """

    rows: int
    dim: int
    dtype: str
    zero_rows: int
    spectrum: Tensor
    centred_spectrum: Tensor
    ranks: dict[str, float]
    rank_error: float
    mean_cosine: float
    uniformity: float
    duplicate_share: float
    duplicate_error: float
    queries: int
    temperature: float
    batch_ranks: float | None
    greedy_ranks: float | None
    batch_chi2: float | None


def diagnose(
    z: Tensor, *, temperature: float = 0.1, seed: int = 0, progress: Callable[[float], None] | None = None
) -> Diagnosis:
    """Diagnose embeddings (N, d), read twice in pieces of at most 128 MB; nothing of size N² is made.

    Args:
        z: float64, float32, bfloat16 or float16; may be memory-mapped.
        temperature: τ of the batches' softmax.
        seed: of the samples.
        progress: is told the share of the work that is done.

    Raises:
        ValueError: fewer than two rows; a row that holds NaN or Inf (the first one is named); only zero rows.
    """
    checks.floating(z, "embeddings", ndim=2)
    checks.positive(temperature, "temperature")
    rows, dim = z.shape
    if rows < 2:
        raise ValueError(f"embeddings must have at least 2 rows, got {rows}")
    tell = progress or (lambda share: None)
    generator = torch.Generator().manual_seed(seed)
    moment, mean, zero_rows = _moments(z, lambda share: tell(0.4 * share))
    if zero_rows == rows:
        raise ValueError(f"all {rows} embeddings are zero rows")
    centred = moment - torch.outer(mean, mean)
    values, centred_values = _eigenvalues(moment), _eigenvalues(centred)
    sample = _draw(z, SAMPLE, generator)
    error = float(effective_rank_error(sample)) * math.sqrt(len(sample) / rows)
    share, share_error, queries = _duplicates(z, generator, lambda part: tell(0.4 + 0.5 * part))
    batch_ranks, greedy_ranks, chi2 = _batches(z, temperature, generator)
    tell(1.0)
    return Diagnosis(
        rows=rows, dim=dim, dtype=str(z.dtype).removeprefix("torch."), zero_rows=zero_rows,
        spectrum=values, centred_spectrum=centred_values,
        ranks=_ranks(values, centred_values, rows), rank_error=error, mean_cosine=float(mean @ mean),
        uniformity=_uniformity(sample), duplicate_share=share, duplicate_error=share_error, queries=queries,
        temperature=temperature, batch_ranks=batch_ranks, greedy_ranks=greedy_ranks, batch_chi2=chi2,
    )  # fmt: skip


def _pieces(z: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each piece, in float32, or float64 where z is."""
    step = max(1, CHUNK // z.shape[1])
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    for first in range(0, len(z), step):
        yield first, z[first : first + step].to(dtype)


def _moments(z: Tensor, tell: Callable[[float], None]) -> tuple[Tensor, Tensor, int]:
    """Second moment (d, d) and mean (d,) of the unit rows in float64, and the number of zero rows."""
    moment = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64)
    total, zero_rows = torch.zeros(z.shape[1], dtype=torch.float64), 0
    for first, piece in _pieces(z):
        lengths = torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64)
        if not bool(lengths.isfinite().all()):
            bad = (~piece.isfinite().all(1)).nonzero()
            if len(bad):
                raise ValueError(f"row {first + int(bad[0])} of the embeddings holds NaN or Inf")
        zero_rows += int((lengths == 0).sum())
        moment += len(piece) * covariance(piece, center=False, normalize=True).double()
        weights = torch.where(lengths > 0, 1 / lengths.clamp(min=1e-300), 0.0)
        total += (weights.to(piece.dtype) @ piece).double()
        tell((first + len(piece)) / len(z))
    return moment / len(z), total / len(z), zero_rows


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
    found["RankMe"] = float(rank_of_spectrum(values.sqrt(), 1.0))
    return found


def _draw(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, or all, in float64."""
    if len(z) <= count:
        return z.double()
    return z[torch.randperm(len(z), generator=generator)[:count].sort().values].double()


def _uniformity(sample: Tensor) -> float:
    cosines = normalize(sample, dim=1) @ normalize(sample, dim=1).mT
    rows, columns = torch.triu_indices(len(sample), len(sample), 1)
    return float((-4 * (1 - cosines[rows, columns])).exp().mean().log())


def _duplicates(z: Tensor, generator: torch.Generator, tell: Callable[[float], None]) -> tuple[float, float, int]:
    """Share of rows with another one within `DUPLICATE`, its standard error, and of how many rows."""
    exact = len(z) <= SAMPLE
    queries = torch.arange(len(z)) if exact else torch.randperm(len(z), generator=generator)[:QUERIES].sort().values
    unit = normalize(z[queries].to(torch.float32), dim=1)
    nearest = torch.full((len(queries),), -1.0)
    for first, piece in _pieces(z):
        cosines = unit @ normalize(piece.float(), dim=1).mT
        own = (queries >= first) & (queries < first + len(piece))
        cosines[own.nonzero().squeeze(1), queries[own] - first] = -1.0
        nearest = torch.maximum(nearest, cosines.amax(1))
        tell((first + len(piece)) / len(z))
    share = float((nearest >= DUPLICATE).double().mean())
    return share, 0.0 if exact else math.sqrt(share * (1 - share) / len(queries)), len(queries)


def _batches(
    z: Tensor, temperature: float, generator: torch.Generator
) -> tuple[float | None, float | None, float | None]:
    if len(z) < 2 * BATCH:
        return None, None, None
    ranks, greedy, chi2 = [], [], []
    for _ in range(BATCHES):
        batch = z[torch.randint(len(z), (2 * BATCH,), generator=generator).unique()[:BATCH]].float()
        ranks.append(float(effective_rank(batch, order=2)))
        chi2.append(float(gradient_band(batch, batch, temperature=temperature).chi2.median()))
        chosen = greedy_select(z, BATCH, candidates=64, generator=generator).indices
        greedy.append(float(effective_rank(z[chosen].float(), order=2)))
    return sum(ranks) / BATCHES, sum(greedy) / BATCHES, sum(chi2) / BATCHES
