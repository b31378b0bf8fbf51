"""Batch sampler that embeds the rows it chooses from as the model is now."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._selection import Selection
from spectral_kernels.ops.greedy import greedy_select
from spectral_kernels.selection.batch_sampler import BaseBatchSampler
from spectral_kernels.selection.memory_bank import MemoryBank
from spectral_kernels.selection.progress import Progress
from spectral_kernels.selection.sharding import derived_generator, distinct_rows


class LiveBatchSampler(BaseBatchSampler):
    """Greedy batches from a live pool: for each, random rows are embedded as the model is now, and the batch is built of them.

    Against `GreedyBatchSampler` nothing is ever stale or cold, for a forward pass over `pool` batches a step
    (docs/theory.md §5).
    The rows of a batch are distinct, batches overlap, and an epoch need not visit every row; `coverage` tells.

    Args:
        rows: number of rows, or the bank whose active rows are meant.
        batch_size: rows per batch.
        embed: from rows (k,) int64 on the CPU to embeddings (k, d), zero rows where there is none. Called in the process that
            iterates, without gradients.
        pool: rows embedded for a batch, in batches.
        candidates, objective: as in `greedy_select`; candidates None looks at the whole pool.
        drop_last: see `RandomBatchSampler`; batches are whole either way.
        seed, num_replicas, rank: as in `RandomBatchSampler`.

    Attributes:
        sampler, coverage, visited, last_selection, selection_seconds: as in `GreedyBatchSampler`; the
            seconds count `embed` too.

    Raises:
        ValueError: an argument out of range; while iterating, embeddings that are not one per row or that hold NaN or Inf.
        RuntimeError: as in `RandomBatchSampler`.
    """

    def __init__(
        self,
        rows: int | MemoryBank,
        batch_size: int,
        embed: Callable[[Tensor], Tensor],
        *,
        pool: int = 4,
        candidates: int | None = 64,
        objective: str = "effective_rank",
        drop_last: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        pool = checks.integer(pool, "pool", 1)
        super().__init__(
            rows, batch_size, replacement=True, drop_last=drop_last, seed=seed, num_replicas=num_replicas, rank=rank
        )
        self.embed, self.pool = embed, pool
        self.candidates, self.objective = candidates, objective
        # the op judges its own arguments; here, so that a bad one is met before the first epoch
        self._greedy_select(torch.eye(2), 1, derived_generator(seed))

    def _greedy_select(self, z: Tensor, k: int, generator: torch.Generator) -> Selection:
        return greedy_select(z, k, candidates=self.candidates, objective=self.objective, generator=generator)

    def _choose(self, progress: Progress, generator: torch.Generator) -> Tensor:
        shard = progress.shard
        size = min(len(shard), self.pool * self.batch_size)
        rows = shard[distinct_rows(len(shard), size, generator)]
        with torch.no_grad():
            z = self.embed(rows)
        z = checks.floating(z, "the embeddings of the live pool", ndim=2)
        if len(z) != size:
            raise ValueError(f"embed was given {size} rows and returned {len(z)} embeddings")
        selection = self._greedy_select(z, self.batch_size, generator)
        chosen = rows[selection.indices.cpu()]
        self.last_selection = replace(selection, indices=chosen)
        return chosen
