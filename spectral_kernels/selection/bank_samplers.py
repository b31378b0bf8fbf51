"""Batch samplers that choose by a memory bank's embeddings: the best of several batches, and greedy ones."""

import math
import warnings
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._selection import Selection
from spectral_kernels.ops.greedy import greedy_select, greedy_select_among
from spectral_kernels.ops.pool import best_draw, pool_select
from spectral_kernels.selection.batch_sampler import BaseBatchSampler
from spectral_kernels.selection.memory_bank import MemoryBank
from spectral_kernels.selection.partition import by_commonness, from_strata
from spectral_kernels.selection.progress import Progress
from spectral_kernels.selection.sharding import derived_generator, distinct_rows
from spectral_kernels.selection.wrapped import refuse_sampler


class _BankBatchSampler(BaseBatchSampler):
    """A sampler that reads a bank: which rows are left to it, and what it does while the bank is cold."""

    def __init__(
        self, bank: MemoryBank | Tensor, batch_size: int, min_seen: float, replacement: bool, **shared: Any
    ) -> None:
        refuse_sampler(bank)
        if not isinstance(bank, MemoryBank):
            if not hasattr(bank, "__array__") and not hasattr(bank, "__dlpack__"):
                raise ValueError(f"bank must be a MemoryBank, or embeddings (n, d), got {type(bank).__name__}")
            bank = MemoryBank.from_embeddings(checks.floating(bank, "bank", ndim=2))
        min_seen = checks.share(min_seen, "min_seen")
        super().__init__(bank, batch_size, replacement=replacement, records=not replacement, **shared)
        self.bank, self.min_seen = bank, min_seen
        self._warned = False

    def _begin(self, progress: Progress) -> None:
        every = torch.ones(self.n, dtype=torch.bool, device=self.bank.device)
        if len(progress.shard) < self.n:
            progress.within = torch.zeros_like(every)
            progress.within[progress.shard.to(self.bank.device)] = True
        progress.left = progress.within
        if not self.replacement:
            progress.left = every if progress.within is None else progress.within.clone()
            progress.left[progress.taken_rows(progress.batch).to(self.bank.device)] = False

    def _choose(self, progress: Progress, generator: torch.Generator) -> Tensor:
        cold, left = self._is_cold(progress), progress.left
        if self.replacement:
            return self._in_turn(progress) if cold else self._select(progress, generator).cpu()
        assert left is not None
        if cold:
            rows = progress.shard[left.cpu()[progress.shard]][: self._size(progress)]
        else:
            rows = self._share_out(progress, left, generator).cpu()
        left[rows.to(left.device)] = False
        return rows

    @abstractmethod
    def _select(self, progress: Progress, generator: torch.Generator) -> Tensor:
        """Rows of a batch, of all of the shard, chosen by their embeddings."""

    @abstractmethod
    def _select_from(self, order: Tensor, size: int, last: bool, generator: torch.Generator) -> Selection:
        """Rows of a batch, one of each stratum of an order; `last`: of the second half of the epoch's batches."""

    def _share_out(self, progress: Progress, left: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of a batch of a partition: like the rows left, but for what makes it more diverse (partition.py)."""
        rows = len(progress.shard)
        size, rows_left = self._size(progress), rows - progress.batch * self.batch_size
        explored = self._explored(progress, size, rows_left, generator)
        size -= len(explored)
        if size == 0:
            return explored
        batches_left = -(-rows_left // self.batch_size)
        order = self._order(progress, left, batches_left)
        last = batches_left <= max(4, rows // self.batch_size // 2)
        spare = len(order) - size
        if 0 < spare < size and not self.drop_last:
            # the last batch is shorter, and the more at the mercy of its rows: it is chosen now, and this one is the others
            kept = self._select_from(order, spare, last, generator).indices
            order = order[~torch.isin(order, kept)]
        self.last_selection = selection = self._select_from(order, size, last, generator)
        return torch.cat((selection.indices, explored))

    def _order(self, progress: Progress, left: Tensor, batches_left: int) -> Tensor:
        """Seen rows that are left, by commonness: looked at anew whenever half of the batches have gone."""
        seen, orders = self.bank.seen & left, progress.orders
        if orders and batches_left & (batches_left - 1):
            order = orders[-1][1].to(self.bank.device)
            order = order[seen[order]]
            if len(order) == int(seen.sum()):
                return order
        rows = progress.shard.to(self.bank.device)
        order = self._sorted(rows[seen[rows]])  # equal ones in the epoch's order
        orders.append((progress.batch, order))
        return order

    def _sorted(self, rows: Tensor) -> Tensor:
        return by_commonness(self.bank.embeddings, rows)

    def _explored(self, progress: Progress, size: int, rows_left: int, generator: torch.Generator) -> Tensor:
        """Random rows left that have no embedding, those retired meanwhile too: their share of the batch, rounded up."""
        if self._is_full(progress):
            return torch.empty(0, dtype=torch.int64, device=self.bank.device)
        unseen = ~self.bank.seen
        unseen = (unseen if progress.left is None else unseen & progress.left).nonzero()[:, 0]
        fresh = -(-size * len(unseen) // rows_left)
        return unseen[distinct_rows(len(unseen), fresh, generator).to(unseen.device)]

    def _is_full(self, progress: Progress) -> bool:
        """Whether all rows of the epoch have an embedding, as far as the counts tell: the bank is not scanned."""
        return self.bank.active is progress.active and self.bank.num_seen == self.bank.num_active

    def _is_cold(self, progress: Progress) -> bool:
        rows = len(progress.shard)
        if self._is_full(progress):
            seen = rows
        elif progress.within is None:
            seen = self.bank.num_seen
        else:
            seen = int((self.bank.seen & progress.within).sum())
        least = max(self.batch_size, math.ceil(self.min_seen * rows))
        if seen >= least:
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the memory bank is cold: {seen} of {rows} rows have an embedding; "
                f"batches are random until {least} have one",
                stacklevel=5,
            )
        return True


class PoolBatchSampler(_BankBatchSampler):
    """The best of several random batches by effective rank (docs/theory.md §5, `pool_select`).

    With `replacement` every batch is chosen from all rows of the rank's shard: its rows are
    distinct, batches overlap, and an epoch need not visit every row: the first visits about 63 % of
    them, as drawing with replacement does; `coverage` tells.

    Without, an epoch is a partition: each row of the shard at most once, exactly once with
    `drop_last=False`. The second moments of its batches then average to that of all rows, so they
    cannot all be high, nor all low as random draws go. So that early batches take nothing from later
    ones, each candidate batch is like the rows left (partition.py). With `"balanced"` and `"high"` no
    batch falls far below random ones; `"low"` takes the least diverse of such candidates, and is
    lower by little. For batches that are really low draw with replacement.

    While the bank is cold batches are the ordinary shuffled ones, the same as
    `RandomBatchSampler`'s, and a warning says so once. Unseen rows of a bank that is warm are drawn
    like any other, without replacement at their share of the rows left (rounded up), and do not count
    in a batch's effective rank.

    Args:
        bank: embeddings to choose by, one row per sample of the data set: a bank, or, where they are known up front and stay
            as they are, the embeddings (n, d) themselves, a tensor or an array (`MemoryBank.from_embeddings`).
        batch_size: rows per batch.
        draws: candidate batches.
        policy: `"low"`, `"balanced"`, `"high"`, or a quantile in [0, 1].
        window: (lo, hi) in units of effective rank, such as an `EffectiveRankWindow`. May be set
            anew between batches.
        order: of the effective rank.
        min_seen: the bank is cold while less than this share of the shard's rows, or fewer than
            batch_size, have an embedding.
        replacement: see above.
        drop_last: leave out an incomplete last batch, and the rows that do not deal out evenly over
            the ranks. With replacement all batches are full, and it decides between floor and ceil
            for their number.
        seed: the same on every rank.
        num_replicas, rank: None asks torch.distributed when they are needed; 1 and 0 without a process group.

    Attributes:
        sampler: the rows of the rank's shard, in the epoch's order.
        coverage, visited: share of the rows handed out so far, and which, (n,) bool.
        last_selection: what `pool_select` returned for the last batch, its indices being rows of
            the bank; None where the batch was random.
        selection_seconds: time spent in choosing batches so far.

    Raises:
        ValueError: an argument out of range; batch_size above the rows of a shard, also as an epoch begins.
        RuntimeError: while iterating, the process group is another than when the epoch began, or
            without replacement a newer iteration has begun.
    """

    def __init__(
        self,
        bank: MemoryBank | Tensor,
        batch_size: int,
        *,
        draws: int = 16,
        policy: str | float = "balanced",
        window: tuple[float, float] | None = None,
        order: float = 2.0,
        min_seen: float = 0.9,
        replacement: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(
            bank,
            batch_size,
            min_seen,
            replacement,
            drop_last=drop_last,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        self.draws, self.policy, self.window, self.order = draws, policy, window, order
        # the op judges its own arguments; here, so that a bad one is met before the first epoch
        self._pool_select(torch.eye(2, device=self.bank.device), 1, derived_generator(seed))

    def _pool_select(self, pool: Tensor, size: int, generator: torch.Generator) -> Selection:
        return pool_select(
            pool,
            size,
            draws=self.draws,
            policy=self.policy,
            window=self.window,
            order=self.order,
            generator=generator,
        )

    def _select(self, progress: Progress, generator: torch.Generator) -> Tensor:
        shard = progress.shard
        # only the rows of the candidates are gathered: shuffling or masking a million rows would cost more
        rows = shard[distinct_rows(len(shard), min(len(shard), self.draws * self.batch_size), generator)]
        selection = self._pool_select(self.bank.gather(rows), self.batch_size, generator)
        chosen = rows.to(selection.indices.device)[selection.indices]
        self.last_selection = replace(selection, indices=chosen)
        return chosen

    def _select_from(self, order: Tensor, size: int, last: bool, generator: torch.Generator) -> Selection:
        draws = from_strata(order, size, self.draws, generator).T.contiguous()
        return best_draw(self.bank.embeddings, draws, policy=self.policy, window=self.window, order=self.order)


class GreedyBatchSampler(_BankBatchSampler):
    """Diverse batches, built a row at a time (Greedy-m, docs/theory.md §5, `greedy_select`).

    With `replacement` every batch is built from all rows of the rank's shard: its rows are
    distinct, batches overlap, and common rows are passed over, many of them for long: of 4,096 fixed
    embeddings of 128 features that fall as 1/√k, batches of 256 with 64 candidates hold about three
    in ten in 3 epochs and under six in ten in 20 (python_tests/selection/test_coverage.py). `coverage` tells.

    Without, an epoch is a partition: each row of the shard at most once, exactly once with
    `drop_last=False`. The second moments of its batches then average to that of all rows, so a gain
    over random batches is small: their effective rank cannot all exceed that of all rows. So that
    early batches take nothing from later ones, each is like the rows left: it takes one row of each
    of batch_size strata, and the best of m within each (partition.py). Log-determinants are raised in
    the first half of an epoch's batches; in the second half, where it would cost the last ones, the
    effective rank. No batch falls far below random ones, where the batch has rows enough to hold its
    share of each cluster.

    While the bank is cold batches are the ordinary shuffled ones, the same as
    `RandomBatchSampler`'s, and a warning says so once. Unseen rows of a bank that is warm take the
    share of the batch that they have of the rows left (rounded up), drawn at random, and the rest
    is built greedily: no row stays unseen for good.

    Args:
        bank: embeddings to choose by, one row per sample of the data set: a bank, or, where they are known up front and stay
            as they are, the embeddings (n, d) themselves, a tensor or an array (`MemoryBank.from_embeddings`).
        batch_size: rows per batch.
        candidates: m, random rows looked at in each step; None looks at every row (without
            replacement of the step's stratum).
        objective: `"effective_rank"` or `"logdet"`.
        min_seen, replacement, drop_last, seed, num_replicas, rank: as in `PoolBatchSampler`.

    Attributes:
        sampler, coverage, visited, selection_seconds: as in `PoolBatchSampler`.
        last_selection: what `greedy_select` returned for the last batch, of the rows built
            greedily; None where all were random.

    Raises:
        ValueError, RuntimeError: as in `PoolBatchSampler`.
    """

    def __init__(
        self,
        bank: MemoryBank | Tensor,
        batch_size: int,
        *,
        candidates: int | None = 64,
        objective: str = "effective_rank",
        min_seen: float = 0.9,
        replacement: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(
            bank,
            batch_size,
            min_seen,
            replacement,
            drop_last=drop_last,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        self.candidates, self.objective = candidates, objective
        # the op judges its own arguments; here, so that a bad one is met before the first epoch
        self._greedy_select(torch.eye(2, device=self.bank.device), 1, None, derived_generator(seed))

    def _greedy_select(self, pool: Tensor, k: int, valid: Tensor | None, generator: torch.Generator) -> Selection:
        return greedy_select(
            pool, k, candidates=self.candidates, objective=self.objective, valid=valid, generator=generator
        )

    def _select(self, progress: Progress, generator: torch.Generator) -> Tensor:
        explored = self._explored(progress, self.batch_size, len(progress.shard), generator)
        size = self.batch_size - len(explored)
        if size == 0:
            return explored
        self.last_selection = selection = self._greedy_select(self.bank.embeddings, size, progress.within, generator)
        return torch.cat((selection.indices, explored))

    def _select_from(self, order: Tensor, size: int, last: bool, generator: torch.Generator) -> Selection:
        every = self.candidates is None or self.candidates * size >= len(order)
        draws = from_strata(order, size, None if every else self.candidates, generator)
        objective = "effective_rank" if last else self.objective
        return greedy_select_among(self.bank.embeddings, draws, objective=objective)
