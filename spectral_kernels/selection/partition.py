"""Batches that share out the rows evenly: what greedy and pool samplers do without replacement.

The batches' second moments M_b = Σ xxᵀ/k average to that of all rows, M, however they are chosen: a batch of rare rows is paid
for by one of common rows. So each batch is made like the rows left. These are sorted by their *commonness*, xᵀMx, and cut into
as many strata as the batch has rows, of which each gives one: that fixes ⟨M_b, M⟩, the mean commonness of the batch. What is
then chosen within the strata for a high order-2 effective rank, 1/‖M_b‖², lowers ‖M_b − M‖², and later batches do not pay.
"""

import torch
from torch import Tensor

from spectral_kernels.ops._rows import accumulation_dtype

# rows read at a time, so that a large bank is not copied
CHUNK = 1 << 16


def by_commonness(embeddings: Tensor, rows: Tensor) -> Tensor:
    """Sort rows (r,) of embeddings (n, d), unit length, by x_jᵀM x_j, M their second moment; ties stay in order. O(r d²).

    Raises:
        ValueError: a row that holds NaN or Inf.
    """
    wide = accumulation_dtype(embeddings.dtype)
    chunks = rows.split(CHUNK)
    moment = embeddings.new_zeros(embeddings.shape[1], embeddings.shape[1], dtype=wide)
    for chunk in chunks:
        x = embeddings[chunk].to(wide)
        moment.addmm_(x.T, x)
    if not bool(moment.isfinite().all()):
        bad = rows[~embeddings[rows].isfinite().all(1)]
        raise ValueError(f"pool row {int(bad[0])} holds NaN or Inf")
    commonness = torch.cat([((x @ moment) * x).sum(1) for x in (embeddings[chunk].to(wide) for chunk in chunks)])
    return rows[commonness.argsort(stable=True)]


def from_strata(
    order: Tensor, k: int, m: int | None, generator: torch.Generator, edges: Tensor | None = None
) -> Tensor:
    """Cut an order (r,) into k strata and draw m rows from each, with replacement; None lists them all.

    The strata are as equal as may be, or between the `edges` (k + 1,).

    Returns:
        (k, m) or (k, ⌈r/k⌉), the strata in random order; where all are listed, each begins with a random row of its own, and
        shorter ones go round once more.
    """
    if edges is None:
        edges = torch.arange(k + 1) * len(order) // k
    strata = torch.randperm(k, generator=generator)
    low, size = edges[strata, None], (edges[1:] - edges[:-1])[strata, None]
    uniform = torch.rand(k, 1 if m is None else m, generator=generator, dtype=torch.float64)
    places = (uniform * size).long()
    if m is None:
        places = (places + torch.arange(int(size.max()))) % size
    return order[(low + places).to(order.device)]
