"""Batch samplers: random, the best of several random batches, greedy from a bank, and greedy from a live pool.

What all of them share:

**Ranks.** The rows are dealt out anew every epoch (`ShardSampler`): shards are disjoint, equally
long, and all rows together but for the rows that do not deal out evenly. A rank chooses within its
own shard, without communication.

**Seeds.** Batch t draws from a generator derived from (seed, epoch, rank, t). It does not depend on
which batches this process made before, so an interrupted epoch resumes with the batches that would
have come, given the same bank. Without `set_epoch` every epoch has the same seeds.

**Streams.** An epoch is dealt out from the rows that are active in the bank as it begins; rows
retired or admitted meanwhile count from the next one on, and `len` follows them at once.

**DataLoader workers** make the loader draw batches ahead: the bank is then a few steps older than
the batch, and `state_dict(consumed=...)` must be told how many batches the training loop has really
used.
"""

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from spectral_kernels import checks
from spectral_kernels.ops.greedy import Selection, greedy_select
from spectral_kernels.ops.pool import pool_select
from spectral_kernels.selection.memory_bank import MemoryBank
from spectral_kernels.selection.sharding import ShardSampler, derived_generator, distinct_rows, process_group


@dataclass
class _Progress:
    """How far an epoch has come. taken: the batches so far, recorded only where later ones depend on them."""

    epoch: int
    batch: int = 0
    taken: list[Tensor] = field(default_factory=list)

    def taken_rows(self, batches: int) -> Tensor:
        """All rows of the first batches, int64."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *self.taken[:batches]])


class _BatchSampler(Sampler[list[int]], ABC):
    """Sharding, seeding, resuming and timing; a subclass chooses the rows of a batch in `_choose`."""

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        drop_last: bool,
        replacement: bool,
        records: bool,
        seed: int,
        num_replicas: int | None,
        rank: int | None,
        bank: MemoryBank | None,
    ) -> None:
        checks.integer(batch_size, "batch_size", 1)
        checks.integer(seed, "seed", 0)
        self.num_replicas, self.rank = process_group(num_replicas, rank)
        self.sampler = ShardSampler(n, self.num_replicas, self.rank, seed, drop_last, bank)
        self._check_size(batch_size)
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.drop_last, self.replacement, self._records = bool(drop_last), bool(replacement), records
        self.last_selection: Selection | None = None
        self.selection_seconds = 0.0
        self._progress = _Progress(0)
        self._resumes = False

    def _check_size(self, batch_size: int) -> None:
        if batch_size > len(self.sampler):
            raise ValueError(f"batch_size = {batch_size} exceeds the {len(self.sampler)} rows of a rank's shard")

    @property
    def epoch(self) -> int:
        """The epoch whose batches come next."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; an epoch that was loaded keeps its place, so a resumed loop calls this as usual."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        rows = len(self.sampler)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if not self._resumes or self._progress.epoch != self.epoch:
            self._progress = _Progress(self.epoch)
        self._resumes = False
        progress = self._progress
        began = time.perf_counter()
        self._check_size(self.batch_size)
        shard, batches = self.sampler.rows(), len(self)
        self._begin(shard, progress.taken_rows(progress.batch))
        while progress.batch < batches:
            if self._records and progress is not self._progress:
                raise RuntimeError("this iteration over the batch sampler was superseded by a newer one")
            self.last_selection = None
            key = (self.seed, progress.epoch, self.rank, progress.batch)
            rows = self._choose(shard, progress.batch, derived_generator(*key))
            if self._records:
                progress.taken.append(rows)
            chosen: list[int] = rows.tolist()
            progress.batch += 1
            self.selection_seconds += time.perf_counter() - began
            yield chosen
            began = time.perf_counter()

    def _begin(self, shard: Tensor, taken: Tensor) -> None:
        """Start on the rows of an epoch, of which `taken` have been handed out before."""

    @abstractmethod
    def _choose(self, shard: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """Rows (batch_size,) int64 of a batch, on the CPU."""

    def _size(self, shard: Tensor, batch: int) -> int:
        """Rows of a batch: fewer than batch_size only at the end of an epoch that is a partition."""
        if self.replacement:
            return self.batch_size
        return min(self.batch_size, len(shard) - batch * self.batch_size)

    def _in_turn(self, shard: Tensor, batch: int) -> Tensor:
        """Rows of a batch of an ordinary shuffled epoch."""
        places = batch * self.batch_size + torch.arange(self._size(shard, batch))
        return shard[places % len(shard)]

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where the epoch stands, small and safe for `torch.load(weights_only=True)`.

        Each rank saves its own. The bank is not part of it, nor is `selection_seconds`.

        Args:
            consumed: batches of this epoch that the training loop has used; None takes those handed
                out, which is more than that under a DataLoader with workers.

        Raises:
            ValueError: consumed is more than were handed out.
        """
        progress = self._progress if self._progress.epoch == self.epoch else _Progress(self.epoch)
        batch = progress.batch
        if consumed is not None:
            batch = checks.integer(consumed, "consumed", 0, progress.batch)
        taken = progress.taken_rows(batch)
        return {**self._identity(), "epoch": progress.epoch, "batch": batch, "taken": taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken: the next iteration yields the rest of that epoch
        (nothing, when it had ended).

        Raises:
            ValueError: an entry is missing or malformed, or belongs to a sampler with other
                arguments.
        """
        identity = self._identity()
        missing = {*identity, "epoch", "batch", "taken"} - set(state)
        if missing:
            raise ValueError(f"the state of the batch sampler lacks {', '.join(sorted(missing))}")
        for name, own in identity.items():
            if state[name] != own:
                raise ValueError(f"{name} of the state is {state[name]!r}, but this batch sampler has {own!r}")
        epoch = checks.integer(state["epoch"], "epoch of the state", 0)
        batch = checks.integer(state["batch"], "batch of the state", 0, len(self))
        taken = state["taken"]
        expected = 0 if not self._records else min(batch * self.batch_size, len(self.sampler))
        if not isinstance(taken, Tensor) or taken.dtype != torch.int64 or taken.shape != (expected,):
            raise ValueError(f"taken of the state must be {expected} rows, got {taken!r}")
        if expected:
            checks.row_indices(taken, "taken of the state", self.n, 1)
        self.sampler.set_epoch(epoch)
        batches = torch.split(taken.cpu(), self.batch_size) if expected else ()
        self._progress = _Progress(epoch, batch, list(batches))
        self._resumes = True

    def _identity(self) -> dict[str, Any]:
        names = ("n", "batch_size", "drop_last", "replacement", "seed", "num_replicas", "rank")
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in names}}


class RandomBatchSampler(_BatchSampler):
    """The ordinary shuffled epoch: every row of the rank's shard once.

    Args:
        rows: number of rows, or the bank whose active rows are meant; the embeddings are not looked at.
        batch_size: rows per batch.
        drop_last: leave out an incomplete last batch, and the rows that do not deal out evenly over
            the ranks; other ones every epoch.
        seed: of the shuffling, the same on every rank.
        num_replicas, rank: None asks torch.distributed, or is 1 and 0 without it.

    Attributes:
        sampler: the rows of the rank's shard, in the epoch's order.
        last_selection: None.
        selection_seconds: time spent in choosing batches so far.

    Raises:
        ValueError: an argument out of range; batch_size above the rows of a shard.
    """

    def __init__(
        self,
        rows: int | MemoryBank,
        batch_size: int,
        *,
        drop_last: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        n = rows.n if isinstance(rows, MemoryBank) else checks.integer(rows, "rows", 1)
        super().__init__(
            n,
            batch_size,
            drop_last=drop_last,
            replacement=False,
            records=False,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            bank=rows if isinstance(rows, MemoryBank) else None,
        )

    def _choose(self, shard: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        return self._in_turn(shard, batch)


class _BankBatchSampler(_BatchSampler):
    """A sampler that reads a bank: which rows are left to it, and what it does while the bank is cold."""

    def __init__(
        self,
        bank: MemoryBank,
        batch_size: int,
        *,
        min_seen: float,
        drop_last: bool,
        replacement: bool,
        seed: int,
        num_replicas: int | None,
        rank: int | None,
    ) -> None:
        if not isinstance(bank, MemoryBank):
            raise ValueError(f"bank must be a MemoryBank, got {type(bank).__name__}")
        if isinstance(min_seen, bool) or not isinstance(min_seen, int | float) or not 0 <= min_seen <= 1:
            raise ValueError(f"min_seen must be a share in [0, 1], got {min_seen!r}")
        super().__init__(
            bank.n,
            batch_size,
            drop_last=drop_last,
            replacement=replacement,
            records=not replacement,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            bank=bank,
        )
        self.bank, self.min_seen = bank, float(min_seen)
        self._warned = False
        # masks (n,) on the bank's device; None is every row, so that the bank is read as it stands
        self._shard: Tensor | None = None
        self._left: Tensor | None = None

    def _begin(self, shard: Tensor, taken: Tensor) -> None:
        device = self.bank.device
        self._shard = None
        if self.num_replicas > 1 or self.bank.num_active < self.n:
            self._shard = torch.zeros(self.n, dtype=torch.bool, device=device)
            self._shard[shard.to(device)] = True
        self._left = self._shard
        if not self.replacement:
            every = torch.ones(self.n, dtype=torch.bool, device=device)
            self._left = every if self._shard is None else self._shard.clone()
            self._left[taken.to(device)] = False

    def _choose(self, shard: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        if not self._is_cold():
            rows = self._select(shard, batch, generator).cpu()
        elif self.replacement:
            rows = self._in_turn(shard, batch)
        else:
            rows = self._rows_left(shard)[: self._size(shard, batch)]
        if not self.replacement and self._left is not None:
            self._left[rows.to(self._left.device)] = False
        return rows

    @abstractmethod
    def _select(self, shard: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """Rows of a batch, of those left, chosen by their embeddings."""

    def _rows_left(self, shard: Tensor) -> Tensor:
        """Rows of the shard that may still be chosen, in the epoch's order."""
        return shard if self.replacement or self._left is None else shard[self._left.cpu()[shard]]

    def _is_cold(self) -> bool:
        seen = self.bank.num_seen
        if self._shard is not None and seen < self.bank.num_active:
            seen = int((self.bank.seen & self._shard).sum())
        rows = len(self.sampler)
        least = max(self.batch_size, math.ceil(self.min_seen * rows))
        if seen >= least:
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the memory bank is cold: {seen} of {rows} rows have an embedding; "
                f"batches are random until {least} have one",
                stacklevel=4,
            )
        return True


class PoolBatchSampler(_BankBatchSampler):
    """The best of several random batches by effective rank (theory.md §5, `pool_select`).

    With `replacement` every batch is chosen from all rows of the rank's shard: its rows are
    distinct, batches overlap, and an epoch need not visit every row. Without, an epoch is a
    partition: each row of the shard at most once, exactly once with `drop_last=False`; the
    candidates of a batch are then drawn from the rows left, and the last batch takes what there is.

    While the bank is cold batches are the ordinary shuffled ones, the same as
    `RandomBatchSampler`'s, and a warning says so once. Unseen rows of a bank that is warm are drawn
    like any other and do not count in a batch's effective rank.

    Args:
        bank: embeddings to choose by, one row per sample of the data set.
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
        num_replicas, rank: None asks torch.distributed, or is 1 and 0 without it.

    Attributes:
        sampler: the rows of the rank's shard, in the epoch's order.
        last_selection: what `pool_select` returned for the last batch, its indices being rows of
            the bank; None where the batch was random.
        selection_seconds: time spent in choosing batches so far.

    Raises:
        ValueError: an argument out of range; batch_size above the rows of a shard.
    """

    def __init__(
        self,
        bank: MemoryBank,
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
            min_seen=min_seen,
            drop_last=drop_last,
            replacement=replacement,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        self.draws, self.policy, self.window, self.order = draws, policy, window, order
        # the op judges its own arguments; here, so that a bad one is met before the first epoch
        self._pool_select(torch.eye(2, device=bank.device), 1, derived_generator(seed))

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

    def _select(self, shard: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        # only the rows of the candidates are gathered: shuffling or masking a million rows would cost more
        left = self._rows_left(shard)
        size = self._size(shard, batch)
        rows = left[distinct_rows(len(left), min(len(left), self.draws * size), generator)]
        selection = self._pool_select(self.bank.gather(rows), size, generator)
        chosen = rows.to(selection.indices.device)[selection.indices]
        self.last_selection = replace(selection, indices=chosen)
        return chosen


class GreedyBatchSampler(_BankBatchSampler):
    """Diverse batches, built a row at a time (Greedy-m, theory.md §5, `greedy_select`).

    With `replacement` every batch is built from all rows of the rank's shard: its rows are
    distinct, batches overlap, and an epoch need not visit every row. Without, an epoch is a
    partition: each row of the shard at most once, exactly once with `drop_last=False`; later
    batches of an epoch then choose among what the earlier ones left.

    While the bank is cold batches are the ordinary shuffled ones, the same as
    `RandomBatchSampler`'s, and a warning says so once. Unseen rows of a bank that is warm take the
    share of the batch that they have of the rows left (rounded up), drawn at random, and the rest
    is built greedily: no row stays unseen for good.

    Args:
        bank: embeddings to choose by, one row per sample of the data set.
        batch_size: rows per batch.
        candidates: m, random rows looked at in each step; None looks at every row.
        objective: `"effective_rank"` or `"logdet"`.
        window: (lo, hi) in units of effective rank, such as an `EffectiveRankWindow`. May be set
            anew between batches.
        min_seen: the bank is cold while less than this share of the shard's rows, or fewer than
            batch_size, have an embedding.
        replacement: see above.
        drop_last: leave out an incomplete last batch, and the rows that do not deal out evenly over
            the ranks. With replacement all batches are full, and it decides between floor and ceil
            for their number.
        seed: the same on every rank.
        num_replicas, rank: None asks torch.distributed, or is 1 and 0 without it.

    Attributes:
        sampler: the rows of the rank's shard, in the epoch's order.
        last_selection: what `greedy_select` returned for the last batch, of the rows built
            greedily; None where all were random.
        selection_seconds: time spent in choosing batches so far.

    Raises:
        ValueError: an argument out of range; batch_size above the rows of a shard.
    """

    def __init__(
        self,
        bank: MemoryBank,
        batch_size: int,
        *,
        candidates: int | None = 64,
        objective: str = "effective_rank",
        window: tuple[float, float] | None = None,
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
            min_seen=min_seen,
            drop_last=drop_last,
            replacement=replacement,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        self.candidates, self.objective, self.window = candidates, objective, window
        # the op judges its own arguments; here, so that a bad one is met before the first epoch
        self._greedy_select(torch.eye(2, device=bank.device), 1, None, derived_generator(seed))

    def _greedy_select(self, pool: Tensor, k: int, valid: Tensor | None, generator: torch.Generator) -> Selection:
        return greedy_select(
            pool,
            k,
            candidates=self.candidates,
            objective=self.objective,
            window=self.window,
            valid=valid,
            generator=generator,
        )

    def _select(self, shard: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        unseen, size = self._unseen(), self._size(shard, batch)
        rows_left = len(shard) - (0 if self.replacement else batch * self.batch_size)
        fresh = -(-size * len(unseen) // rows_left)
        explored = unseen[distinct_rows(len(unseen), fresh, generator).to(unseen.device)]
        if fresh == size:
            return explored
        selection = self._greedy_select(self.bank.embeddings, size - fresh, self._left, generator)
        self.last_selection = selection
        return torch.cat((selection.indices, explored))

    def _unseen(self) -> Tensor:
        """Rows left that have no embedding."""
        if self.bank.num_seen == self.bank.num_active:
            return torch.empty(0, dtype=torch.int64, device=self.bank.device)
        unseen = ~self.bank.seen
        return (unseen if self._left is None else unseen & self._left).nonzero()[:, 0]


class LiveBatchSampler(_BatchSampler):
    """Greedy batches from a live pool: for each, random rows are embedded as the model is now, and the batch is built of them.

    Against `GreedyBatchSampler` nothing is ever stale or cold, for a forward pass over `pool` batches a step (theory.md §5).
    The rows of a batch are distinct, batches overlap, and an epoch need not visit every row.

    Args:
        rows: number of rows, or the bank whose active rows are meant.
        batch_size: rows per batch.
        embed: from rows (k,) int64 on the CPU to embeddings (k, d), zero rows where there is none. Called in the process that
            iterates, without gradients.
        pool: rows embedded for a batch, in batches.
        candidates, objective, window: as in `greedy_select`; candidates None looks at the whole pool.
        drop_last: see `RandomBatchSampler`; batches are whole either way.
        seed, num_replicas, rank: as in `RandomBatchSampler`.

    Attributes:
        sampler, last_selection, selection_seconds: as in `GreedyBatchSampler`; the seconds count `embed` too.

    Raises:
        ValueError: an argument out of range; while iterating, embeddings that are not one per row or that hold NaN or Inf.
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
        window: tuple[float, float] | None = None,
        drop_last: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        checks.integer(pool, "pool", 1)
        super().__init__(
            rows.n if isinstance(rows, MemoryBank) else checks.integer(rows, "rows", 1),
            batch_size,
            drop_last=drop_last,
            replacement=True,
            records=False,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            bank=rows if isinstance(rows, MemoryBank) else None,
        )
        self.embed, self.pool = embed, pool
        self.candidates, self.objective, self.window = candidates, objective, window
        # the op judges its own arguments; here, so that a bad one is met before the first epoch
        self._greedy_select(torch.eye(2), 1, derived_generator(seed))

    def _greedy_select(self, z: Tensor, k: int, generator: torch.Generator) -> Selection:
        return greedy_select(
            z, k, candidates=self.candidates, objective=self.objective, window=self.window, generator=generator
        )

    def _choose(self, shard: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        size = min(len(shard), self.pool * self.batch_size)
        rows = shard[distinct_rows(len(shard), size, generator)]
        with torch.no_grad():
            z = self.embed(rows)
        checks.floating(z, "the embeddings of the live pool", ndim=2)
        if len(z) != size:
            raise ValueError(f"embed was given {size} rows and returned {len(z)} embeddings")
        selection = self._greedy_select(z, self.batch_size, generator)
        chosen = rows[selection.indices.cpu()]
        self.last_selection = replace(selection, indices=chosen)
        return chosen
