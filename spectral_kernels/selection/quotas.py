"""Greedy batches with the label quotas of the data set."""

from typing import Any

import torch
from torch import Tensor

from spectral_kernels.ops.greedy import greedy_select_among
from spectral_kernels.selection.bank_samplers import GreedyBatchSampler
from spectral_kernels.selection.memory_bank import MemoryBank
from spectral_kernels.selection.partition import from_strata
from spectral_kernels.selection.progress import Progress


class Quotas:
    """How many rows of each class each batch takes: its share of the batch's rows, rounded down or up.

    The short last batch's are settled first, so that what is left of each class can be dealt out in turn to the full ones.

    Args:
        counts: (C,) int64, rows of each class.
        batch_size: at most all rows.
    """

    def __init__(self, counts: Tensor, batch_size: int) -> None:
        n = int(counts.sum())
        self._full, rest = divmod(n, batch_size)
        self.last, rounding = counts * rest // n, counts * rest % n
        # rounded either way, it leaves the full batches a sum between those of their shares rounded down and up
        self.last[rounding.argsort(descending=True, stable=True)[: rest - int(self.last.sum())]] += 1
        self._ends = torch.cat((counts.new_zeros(1), (counts - self.last).cumsum(0)))

    def of(self, batch: int) -> Tensor:
        """(C,) int64 rows of each class in a batch."""
        if batch >= self._full:
            return self.last
        return ((self._ends + self._full - 1 - batch) // self._full).diff()


class QuotaBatchSampler(GreedyBatchSampler):
    """`GreedyBatchSampler` without replacement, whose batches hold each label's share of the rank's rows, within one row.

    The strata that a batch takes a row of each from lie within the classes.

    Args:
        bank: every row seen.
        labels: (n,) whole numbers.
        others: as of `GreedyBatchSampler`.
    """

    def __init__(self, bank: MemoryBank | Tensor, batch_size: int, labels: Tensor, **others: Any) -> None:
        super().__init__(bank, batch_size, replacement=False, **others)
        if labels.shape != (self.n,):
            raise ValueError(f"labels has shape {tuple(labels.shape)}, but there are {self.n} rows")
        if self.bank.num_seen < self.bank.num_active:
            raise ValueError("batches with label quotas need an embedding of every row")
        self._class = labels.to(self.bank.device).unique(return_inverse=True)[1]

    def _begin(self, progress: Progress) -> None:
        super()._begin(progress)
        classes = self._class[progress.shard.to(self.bank.device)]
        self._quotas = Quotas(classes.bincount(minlength=int(self._class.max()) + 1), self.batch_size)

    def _sorted(self, rows: Tensor) -> Tensor:
        order = super()._sorted(rows)
        return order[self._class[order].argsort(stable=True)]

    def _share_out(self, progress: Progress, left: Tensor, generator: torch.Generator) -> Tensor:
        rows = len(progress.shard)
        batches_left = -(-(rows - progress.batch * self.batch_size) // self.batch_size)
        order, quota = self._order(progress, left, batches_left), self._quotas.of(progress.batch)
        classes = self._class[order]
        sizes, wanted = classes.bincount(minlength=len(quota))[quota > 0], quota[quota > 0]
        order = order[quota[classes] > 0]
        # stratum j of the wanted ones of a class begins at j-th part of its rows
        own = torch.arange(len(wanted), device=quota.device).repeat_interleave(wanted)
        j = torch.arange(len(own), device=quota.device) - (wanted.cumsum(0) - wanted)[own]
        begins = (sizes.cumsum(0) - sizes)[own] + j * sizes[own] // wanted[own]
        edges = torch.cat((begins, begins.new_full((1,), len(order)))).cpu()
        last = batches_left <= max(4, rows // self.batch_size // 2)
        draws = from_strata(order, len(own), self.candidates, generator, edges)
        objective = "effective_rank" if last else self.objective
        self.last_selection = greedy_select_among(self.bank.embeddings, draws, objective=objective)
        return self.last_selection.indices
