"""Second moments: of whole rows (row_tiles.py), of many wide ones (wide.py), or of tiles (tiles.py).

Sums are taken in a fixed order and both triangles written from one: results are symmetric to the bit and the same in every
run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_kernels.kernels import wide
from spectral_kernels.kernels.row_tiles import by_rows, row_products
from spectral_kernels.kernels.statistics import Statistics
from spectral_kernels.kernels.tiles import tile_products, tile_statistics


@dataclass(frozen=True)
class Moments:
    """The matrix (b, side, side), its mean (b, d) where the kernel took it, and the statistics of the rows, if a pass did."""

    matrix: Tensor
    mean: Tensor | None
    statistics: Statistics


def moments(
    z: Tensor, index: Tensor | None, center: bool, normalize: bool, *, acc: torch.dtype, precision: str = "ieee",
    count: int = 1, gram: bool = False, one_launch: bool = False,
) -> Moments:  # fmt: skip
    """XᵀX / count, or XXᵀ / count (gram), of normalised, centred rows: z (b, n, d), or a pool (N, d) with index (b, n).

    `one_launch`: where whole rows are read, the programs themselves add up their chunks.
    """
    use = by_rows(z, precision, acc)
    if not gram and use is not None:
        found = row_products(z, index, center, normalize, acc, precision, use, count=count, one_launch=one_launch)
        return Moments(*found, Statistics())
    if not gram and index is None and wide.suits(z, precision, acc):
        return Moments(*wide.moments(z, center, normalize, precision, count), Statistics())
    statistics = tile_statistics(z, index, center, normalize, acc, gram)
    matrix = tile_products(z, index, statistics, normalize, acc, precision=precision, count=count, gram=gram).matrix
    assert matrix is not None
    return Moments(matrix, None, statistics)
