"""Pairs of rows that nearly point the same way, found block against block."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.files.stored_rows import FileRows
from spectral_kernels.inspection.result import DUPLICATE
from spectral_kernels.ops._rows import read_rows

MOST = 200_000  # rows compared each with each
LISTED = 1_000_000  # pairs
TILE = 2048  # rows against as many: 16 MB of cosines
HELD = 2**24  # elements of the rows that all after them are compared with
ROUNDING = 1e-6  # of a cosine in float32


@dataclass(frozen=True)
class Pairs:
    """Near-duplicates.

    Attributes:
        rows: (k, 2) int64, the earlier row, which is the one to keep, and the later one; in order.
        cosines: (k,) float32.
        total: pairs found, of which `rows` lists at most 1,000,000.
        surplus: rows that have an earlier one within the threshold.
        compared, given: rows that were compared with each other, and rows there are.
        threshold: least cosine.
    """

    rows: Tensor
    cosines: Tensor
    total: int
    surplus: int
    compared: int
    given: int
    threshold: float

    def line(self) -> str:
        """Beneath the table of a diagnosis."""
        found = f"{self.total:,} within cosine {self.threshold:g}; {self.surplus:,} rows have an earlier one"
        if self.compared < self.given:
            found += f" (among {self.compared:,} rows drawn)"
        if self.total > len(self.rows):
            found += f"; {len(self.rows):,} pairs are listed"
        return f"near-duplicate pairs     {found}"


def near_duplicates(
    z: Tensor | FileRows,
    *,
    threshold: float = DUPLICATE,
    most: int | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Pairs:
    """All pairs of rows whose cosine is at least `threshold`, but for float32's rounding; zero rows are in none.

    Up to `most` rows each is compared with each; of more, as many random ones.

    Args:
        z: (N, d), float64, float32, bfloat16 or float16, on any device or in a file (`open_embeddings`); no NaN or Inf.
        threshold: above 0, at most 1.
        most: rows that are compared, None 200,000: the work grows with their square.
        seed: of the rows drawn.
        progress: is told the share of the work that is done.

    Raises:
        ValueError: wrong shape or dtype; threshold or most out of range.
    """
    if not isinstance(z, FileRows):
        z = checks.floating(z, "embeddings", ndim=2).detach()
    checks.number(threshold, "threshold", "above 0 and at most 1", lambda x: 0 < x <= 1)
    most, drawn = MOST if most is None else checks.integer(most, "most", 1), None
    if len(z) > most:
        drawn = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    n, d = (len(z) if drawn is None else most), z.shape[1]
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32

    def unit(first: int, last: int) -> Tensor:
        found = z[first:last] if drawn is None else z[drawn[first:last]]
        return read_rows(found.cpu(), True, wide).float()

    held, done, total, listed = max(1, HELD // (TILE * d)) * TILE, 0, 0, 0
    surplus = torch.zeros(n, dtype=torch.bool)
    rows, cosines = [torch.empty(0, 2, dtype=torch.int64)], [torch.empty(0)]
    # one for all tiles: glibc takes new memory for aligned blocks of this size, several times over
    products = torch.empty(TILE * TILE)
    for start in range(0, n, held):
        stop = min(start + held, n)
        own = torch.empty(stop - start, d)
        for first in range(start, stop, TILE):
            own[first - start : first + TILE - start] = unit(first, min(first + TILE, stop))
        for first in range(start, n, TILE):
            last = min(first + TILE, n)
            later = own[first - start : last - start] if last <= stop else unit(first, last)
            for before in range(0, min(len(own), last - start), TILE):
                here = own[before : before + TILE]
                found = torch.mm(here, later.mT, out=products[: len(here) * len(later)].view(len(here), len(later)))
                done += found.numel()
                if float(found.amax()) < threshold - ROUNDING:
                    continue
                pairs = (found >= threshold - ROUNDING).nonzero()
                values = found[pairs[:, 0], pairs[:, 1]]
                pairs += torch.tensor([start + before, first])
                ahead = pairs[:, 0] < pairs[:, 1]
                pairs, values = pairs[ahead], values[ahead]
                surplus[pairs[:, 1]] = True
                total += len(pairs)
                if listed < LISTED:
                    rows.append(pairs[: LISTED - listed])
                    cosines.append(values[: LISTED - listed])
                    listed += len(rows[-1])
            if progress is not None:
                progress(done / (n * (n + TILE) / 2 + TILE * TILE))
    pairs, values = torch.cat(rows), torch.cat(cosines).clamp(max=1.0)
    order = (pairs[:, 0] * n + pairs[:, 1]).argsort()
    pairs = pairs[order] if drawn is None else drawn[pairs[order]]
    return Pairs(pairs, values[order], total, int(surplus.sum()), n, len(z), float(threshold))
