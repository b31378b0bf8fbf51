"""Moments of rows that are read in pieces, in float64, of rows of any scale."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_kernels.ops._rows import is_negligible, read_rows


@dataclass(frozen=True)
class Moments:
    """Float64 moments of n rows.

    Attributes:
        second, covariance: (d, d), of the unit rows; a covariance that is rounding noise is 0. mean: (d,), theirs.
        raw: (d, d), second moment of the rows as they are, but for a common factor.
        zero_rows: rows of length 0, which stay zero.
    """

    second: Tensor
    covariance: Tensor
    mean: Tensor
    raw: Tensor
    zero_rows: int


def moments(pieces: Iterable[tuple[int, Tensor]], d: int, tell: Callable[[int], None]) -> Moments:
    """Merge the moments of pieces (first row, float64 rows (n, d)).

    Each piece is centred on its own mean, and merging adds what the means differ by (Chan, Golub & LeVeque 1983): nothing
    cancels where rows are nearly equal.

    Args:
        tell: is told the number of rows that are done.

    Raises:
        ValueError: a row that holds NaN or Inf; the first one is named.
    """
    scatter, raw = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    mean = torch.zeros(d, dtype=torch.float64)
    done, zero_rows, scale = 0, 0, 0.0
    for first, x in pieces:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=1)
        bad = (~largest.isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"row {first + int(bad[0])} of the embeddings holds NaN or Inf")
        zero_rows += int((largest == 0).sum())
        widest = float(largest.max())
        if widest > scale:
            raw *= (scale / widest) ** 2
            scale = widest
        if scale > 0:
            scaled = x / scale
            raw.addmm_(scaled.mT, scaled)
        unit = read_rows(x, True)
        own = unit.mean(0)
        unit -= own
        scatter.addmm_(unit.mT, unit)
        n, shift = len(x), own - mean
        scatter += torch.outer(shift, shift) * (done * n / (done + n))
        mean += shift * (n / (done + n))
        done += n
        tell(done)
    covariance = scatter / done
    second = covariance + torch.outer(mean, mean)
    if bool(is_negligible(covariance.trace(), second.trace())):
        covariance = torch.zeros_like(covariance)
    return Moments(second, covariance, mean, raw, zero_rows)
