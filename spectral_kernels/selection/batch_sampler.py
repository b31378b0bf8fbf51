"""What all batch samplers share, and the ordinary one: shuffled epochs.

**Ranks.** The rows are dealt out anew every epoch (`ShardSampler`): shards are disjoint, equally
long, and all rows together but for the rows that do not deal out evenly. A rank chooses within its
own shard, without communication. Ranks that are not given are read from torch.distributed's process
group whenever they are needed, so a sampler may be made before the group.

**Epochs.** Each iteration is a new epoch: the one set by `set_epoch`, where that was called since the
last one began, else the next. It begins, and counts, as its first batch is requested, however many
more are. After `load_state_dict` the rest of the epoch loaded comes first.

**Seeds.** Batch t draws from a generator derived from (seed, epoch, rank, t). It does not depend on
which batches this process made before, so an interrupted epoch resumes with the batches that would
have come, given what the bank would have held at each of them.

**Streams.** An epoch is dealt out from the rows that are active in the bank as it begins; rows
retired or admitted meanwhile count from the next one on, and `len` follows them at once. The rows of
the epoch are part of the state: resumed, it is the same one, however the bank has changed.

**DataLoader workers** make the loader draw batches ahead: the bank is then a few steps older than
the batch, and `state_dict(consumed=...)` must be told how many batches the training loop has really
used.
"""

import time
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._selection import Selection
from spectral_kernels.selection.memory_bank import MemoryBank
from spectral_kernels.selection.progress import Progress
from spectral_kernels.selection.sharding import ShardSampler, derived_generator
from spectral_kernels.selection.state import complete, described, row_mask, rows_among
from spectral_kernels.selection.wrapped import TrainersBatchSampler, refuse_sampler


class BaseBatchSampler(TrainersBatchSampler):
    """Sharding, seeding, epochs, coverage, resuming and timing; a subclass chooses the rows of a batch in `_choose`."""

    def __init__(
        self,
        rows: int | MemoryBank,
        batch_size: int,
        *,
        replacement: bool,
        records: bool = False,
        drop_last: bool,
        seed: int,
        num_replicas: int | None,
        rank: int | None,
    ) -> None:
        super().__init__()
        refuse_sampler(rows)
        n, bank = (rows.n, rows) if isinstance(rows, MemoryBank) else (checks.integer(rows, "rows", 1), None)
        batch_size = checks.integer(batch_size, "batch_size", 1)
        seed = checks.integer(seed, "seed", 0)
        self.sampler = ShardSampler(n, num_replicas, rank, seed, drop_last, bank)
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.drop_last, self.replacement, self._records = bool(drop_last), bool(replacement), records
        self._check_size(len(self.sampler))
        self.last_selection: Selection | None = None
        self.selection_seconds = 0.0
        self.visited = torch.zeros(n, dtype=torch.bool)
        self._progress = Progress(0, (1, 0))
        self._resumes = False

    def _check_size(self, rows: int) -> None:
        if self.batch_size > rows:
            raise ValueError(f"batch_size = {self.batch_size} exceeds the {rows} rows of a rank's shard")

    @property
    def num_replicas(self) -> int:
        """Ranks that share the rows: as given, else of the process group there is now."""
        return self.sampler.num_replicas

    @property
    def rank(self) -> int:
        """This process among them."""
        return self.sampler.rank

    @property
    def epoch(self) -> int:
        """The epoch that was set, loaded or begun last."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its beginning; an epoch that was loaded keeps its place, so a
        resumed loop calls this as usual.
        """
        self.sampler.set_epoch(epoch)

    @property
    def coverage(self) -> float:
        """Share of the data set's active rows that this sampler has handed out, in [0, 1].

        Counted since it was made, over epochs and through `state_dict`; `reset_coverage` begins anew. A row is a slot of the
        bank. Each rank counts its own: the union of `visited` over the ranks is what all of them have seen.
        """
        bank = self.sampler.bank
        if bank is None or bank.num_active == self.n:
            return int(self.visited.sum()) / self.n
        return int((self.visited & bank.active.cpu()).sum()) / bank.num_active

    def reset_coverage(self) -> None:
        """Forget which rows were handed out."""
        self.visited = torch.zeros_like(self.visited)
        self._progress.fresh = [rows[:0] for rows in self._progress.fresh]

    def _length(self) -> int:
        return self._batches(len(self.sampler))

    def _share_among(self, num_replicas: int, rank: int) -> None:
        self.sampler.share_among(num_replicas, rank)

    def _batches(self, rows: int) -> int:
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def _epoch(self) -> Iterator[Tensor]:
        began = time.perf_counter()
        progress = self._enter()
        self._begin(progress)
        while progress.batch < self._batches(len(progress.shard)):
            if self._records and progress is not self._progress:
                raise RuntimeError("this iteration over the batch sampler was superseded by a newer one")
            self._check_group(progress)
            self.last_selection = None
            key = (self.seed, progress.epoch, progress.ranks[1], progress.batch)
            rows = self._choose(progress, derived_generator(*key))
            if self._records:
                progress.taken.append(rows)
            progress.fresh.append(rows[~self.visited[rows]])
            self.visited[rows] = True
            progress.batch += 1
            self.selection_seconds += time.perf_counter() - began
            yield rows
            began = time.perf_counter()

    def _enter(self) -> Progress:
        """Begin an epoch, or go on with the one that was loaded."""
        if self._resumes and self._progress.epoch == self.epoch:
            self._check_group(self._progress)
            self.sampler.go_on(self._progress.active)
        else:
            self._check_size(len(self.sampler))
            ranks = self.num_replicas, self.rank
            self.sampler.begin()
            self._progress = Progress(self.epoch, ranks, self.sampler.dealt, self.sampler.rows())
        self._resumes = False
        return self._progress

    def _check_group(self, progress: Progress) -> None:
        now = self.num_replicas, self.rank
        if now != progress.ranks:
            raise RuntimeError(
                f"epoch {progress.epoch} began as rank {progress.ranks[1]} of {progress.ranks[0]}, and this process is now "
                f"rank {now[1]} of {now[0]}: begin an epoch anew, as set_epoch does"
            )

    def _begin(self, progress: Progress) -> None:
        """Start on an epoch, or on the rest of one."""

    @abstractmethod
    def _choose(self, progress: Progress, generator: torch.Generator) -> Tensor:
        """Rows (batch_size,) int64 of the next batch, on the CPU."""

    def _size(self, progress: Progress) -> int:
        """Rows of a batch: fewer than batch_size only at the end of an epoch that is a partition."""
        if self.replacement:
            return self.batch_size
        return min(self.batch_size, len(progress.shard) - progress.batch * self.batch_size)

    def _in_turn(self, progress: Progress) -> Tensor:
        """Rows of a batch of an ordinary shuffled epoch."""
        places = progress.batch * self.batch_size + torch.arange(self._size(progress))
        return progress.shard[places % len(progress.shard)]

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where the epoch stands, safe for `torch.load(weights_only=True)`: at most 10 bytes a row.

        Of an epoch that has not begun `active` is None: it is dealt out from the rows that are active
        as it begins. Each rank saves its own. The bank is not part of it, nor are `last_selection` and
        `selection_seconds`.

        Args:
            consumed: batches of this epoch that the training loop has used; None takes those handed
                out, which is more than that under a DataLoader with workers.

        Raises:
            ValueError: consumed is more than were handed out, or fewer than the state that was loaded had.
        """
        progress = self._progress
        if progress.epoch != self.epoch or not (self.sampler.begun or self._resumes):
            progress = Progress(self.epoch, (self.num_replicas, self.rank))
        batch = progress.batch
        if consumed is not None:
            batch = checks.integer(consumed, "consumed", batch - len(progress.fresh), batch)
        visited = self.visited.clone()
        visited[progress.fresh_rows(batch)] = False
        return {
            **self._identity(progress.ranks),
            "epoch": progress.epoch,
            "batch": batch,
            "active": None if progress.active is None else progress.active.to("cpu", copy=True),
            "taken": progress.taken_rows(batch),
            "order": progress.order_left(batch),
            "visited": visited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken: the next iteration yields the rest of that epoch
        (nothing, when it had ended).

        Raises:
            ValueError: an entry is missing or malformed, or belongs to a sampler with other
                arguments or another rank or number of ranks; the sampler is then as it was.
        """
        ranks = self.num_replicas, self.rank
        identity = self._identity(ranks)
        complete(state, "batch sampler", {*identity, "epoch", "batch", "active", "taken", "order", "visited"})
        for name, own in identity.items():
            if type(state[name]) is not type(own) or state[name] != own:
                raise ValueError(f"{name} of the state is {described(state[name])}, but this batch sampler has {own!r}")
        epoch = checks.integer(state["epoch"], "epoch of the state", 0)
        progress = Progress(epoch, ranks, batch=checks.integer(state["batch"], "batch of the state", 0))
        progress.active = self._loaded_active(state["active"], progress.batch)
        begun = progress.active is not None or progress.batch > 0
        if begun:
            progress.shard = self.sampler.deal(epoch, progress.active)
        checks.integer(progress.batch, "batch of the state", 0, self._batches(len(progress.shard)))
        left = torch.zeros(self.n, dtype=torch.bool)
        left[progress.shard] = True
        expected = min(progress.batch * self.batch_size, len(progress.shard)) if self._records else 0
        taken = rows_among(state["taken"], "taken", left, expected, expected)
        left[taken] = False
        order = rows_among(state["order"], "order", left, 0, len(progress.shard) - expected if expected else 0)
        visited = row_mask(state["visited"], "visited", self.n)
        if expected:
            progress.taken = list(torch.split(taken, self.batch_size))
        if len(order):
            progress.orders = [(progress.batch - 1, order)]
        self.sampler.set_epoch(epoch)
        if begun:
            self.sampler.go_on(progress.active)
        self._progress, self._resumes = progress, begun
        self.visited, self.last_selection = visited, None

    def _loaded_active(self, active: Any, batch: int) -> Tensor | None:
        """The rows that an epoch was dealt out from, None where that is not to be known."""
        if self.sampler.bank is None:
            if active is not None:
                raise ValueError(f"active of the state must be None without a bank, got {described(active)}")
            return None
        if active is None and batch == 0:
            return None
        mask = row_mask(active, "active", self.n)
        if self.sampler.share(int(mask.sum())) < self.batch_size:
            raise ValueError(f"active of the state leaves a rank fewer rows than batch_size = {self.batch_size}")
        return mask

    def _identity(self, ranks: tuple[int, int]) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("n", "batch_size", "drop_last", "replacement", "seed")}
        return {"kind": type(self).__name__, **own, "num_replicas": ranks[0], "rank": ranks[1]}


class RandomBatchSampler(BaseBatchSampler):
    """The ordinary shuffled epoch: every row of the rank's shard once.

    Args:
        rows: number of rows, or the bank whose active rows are meant; the embeddings are not looked at.
        batch_size: rows per batch.
        drop_last: leave out an incomplete last batch, and the rows that do not deal out evenly over
            the ranks; other ones every epoch.
        seed: of the shuffling, the same on every rank.
        num_replicas, rank: None asks torch.distributed when they are needed; 1 and 0 without a process group.

    Attributes:
        sampler: the rows of the rank's shard, in the epoch's order.
        coverage, visited: share of the rows handed out so far, and which, (n,) bool.
        last_selection: None.
        selection_seconds: time spent in choosing batches so far.

    Raises:
        ValueError: an argument out of range; batch_size above the rows of a shard, also as an epoch begins.
        RuntimeError: while iterating, the process group is another than when the epoch began.
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
        super().__init__(
            rows, batch_size, replacement=False, drop_last=drop_last, seed=seed, num_replicas=num_replicas, rank=rank
        )

    def _choose(self, progress: Progress, generator: torch.Generator) -> Tensor:
        return self._in_turn(progress)
