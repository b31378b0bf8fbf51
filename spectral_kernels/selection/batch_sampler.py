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
have come, given the same bank.

**Streams.** An epoch is dealt out from the rows that are active in the bank as it begins; rows
retired or admitted meanwhile count from the next one on, and `len` follows them at once.

**DataLoader workers** make the loader draw batches ahead: the bank is then a few steps older than
the batch, and `state_dict(consumed=...)` must be told how many batches the training loop has really
used.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from spectral_kernels import checks
from spectral_kernels.ops._selection import Selection
from spectral_kernels.selection.memory_bank import MemoryBank
from spectral_kernels.selection.sharding import ShardSampler, derived_generator


@dataclass
class Progress:
    """How far an epoch has come.

    Attributes:
        epoch, ranks, batch: which one, under which num_replicas and rank, and how many batches of it were handed out.
        taken: the batches so far, recorded only where later ones depend on them.
        orders: (batch, rows): what `partition.by_commonness` said as that batch was chosen.
        fresh: of each batch since this process began or resumed, the rows never handed out before.
    """

    epoch: int
    ranks: tuple[int, int]
    batch: int = 0
    taken: list[Tensor] = field(default_factory=list)
    orders: list[tuple[int, Tensor]] = field(default_factory=list)
    fresh: list[Tensor] = field(default_factory=list)

    def taken_rows(self, batches: int) -> Tensor:
        """All rows of the first batches, int64."""
        return _joined(self.taken[:batches])

    def order_left(self, batches: int) -> Tensor:
        """The order that holds after the first batches, less their rows; empty where there is none."""
        orders = [rows.cpu() for made, rows in self.orders if made < batches]
        if not orders:
            return _joined([])
        return orders[-1][~torch.isin(orders[-1], self.taken_rows(batches))]


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows])


class BaseBatchSampler(Sampler[list[int]], ABC):
    """Sharding, seeding, epochs, coverage, resuming and timing; a subclass chooses the rows of a batch in `_choose`."""

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
        batch_size = checks.integer(batch_size, "batch_size", 1)
        seed = checks.integer(seed, "seed", 0)
        self.sampler = ShardSampler(n, num_replicas, rank, seed, drop_last, bank)
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.drop_last, self.replacement, self._records = bool(drop_last), bool(replacement), records
        self._check_size()
        self.last_selection: Selection | None = None
        self.selection_seconds = 0.0
        self.visited = torch.zeros(n, dtype=torch.bool)
        self._progress = Progress(0, (1, 0))
        self._resumes = False

    def _check_size(self) -> None:
        if self.batch_size > len(self.sampler):
            raise ValueError(f"batch_size = {self.batch_size} exceeds the {len(self.sampler)} rows of a rank's shard")

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

    def __len__(self) -> int:
        rows = len(self.sampler)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # nothing runs before the first batch is requested: a DataLoader with workers calls iter twice
        began = time.perf_counter()
        progress = self._enter()
        shard, batches = self.sampler.rows(), len(self)
        self._begin(shard, progress.taken_rows(progress.batch))
        while progress.batch < batches:
            if self._records and progress is not self._progress:
                raise RuntimeError("this iteration over the batch sampler was superseded by a newer one")
            self._check_group(progress)
            self.last_selection = None
            key = (self.seed, progress.epoch, progress.ranks[1], progress.batch)
            rows = self._choose(shard, progress.batch, derived_generator(*key))
            if self._records:
                progress.taken.append(rows)
            progress.fresh.append(rows[~self.visited[rows]])
            self.visited[rows] = True
            chosen: list[int] = rows.tolist()
            progress.batch += 1
            self.selection_seconds += time.perf_counter() - began
            yield chosen
            began = time.perf_counter()

    def _enter(self) -> Progress:
        """Begin an epoch, or go on with the one that was loaded."""
        if self._resumes and self._progress.epoch == self.epoch:
            self._check_group(self._progress)
            self.sampler.begun = True
        else:
            self._check_size()
            ranks = self.num_replicas, self.rank
            self.sampler.begin()
            self._progress = Progress(self.epoch, ranks)
        self._resumes = False
        return self._progress

    def _check_group(self, progress: Progress) -> None:
        now = self.num_replicas, self.rank
        if now != progress.ranks:
            raise RuntimeError(
                f"epoch {progress.epoch} began as rank {progress.ranks[1]} of {progress.ranks[0]}, and this process is now "
                f"rank {now[1]} of {now[0]}: begin an epoch anew, as set_epoch does"
            )

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
        """Where the epoch stands, safe for `torch.load(weights_only=True)`: at most 9 bytes a row.

        Each rank saves its own. The bank is not part of it, nor is `selection_seconds`.

        Args:
            consumed: batches of this epoch that the training loop has used; None takes those handed
                out, which is more than that under a DataLoader with workers.

        Raises:
            ValueError: consumed is more than were handed out.
        """
        progress = self._progress
        if progress.epoch != self.epoch or not (self.sampler.begun or self._resumes):
            progress = Progress(self.epoch, (self.num_replicas, self.rank))
        batch = progress.batch
        if consumed is not None:
            batch = checks.integer(consumed, "consumed", 0, progress.batch)
        visited = self.visited.clone()
        visited[_joined(progress.fresh[max(0, len(progress.fresh) - (progress.batch - batch)) :])] = False
        return {
            **self._identity(progress.ranks),
            "epoch": progress.epoch,
            "batch": batch,
            "taken": progress.taken_rows(batch),
            "order": progress.order_left(batch),
            "visited": visited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken: the next iteration yields the rest of that epoch
        (nothing, when it had ended).

        Raises:
            ValueError: an entry is missing or malformed, or belongs to a sampler with other
                arguments or another rank or number of ranks.
        """
        ranks = self.num_replicas, self.rank
        identity = self._identity(ranks)
        missing = {*identity, "epoch", "batch", "taken", "order", "visited"} - set(state)
        if missing:
            raise ValueError(f"the state of the batch sampler lacks {', '.join(sorted(missing))}")
        for name, own in identity.items():
            if state[name] != own:
                raise ValueError(f"{name} of the state is {state[name]!r}, but this batch sampler has {own!r}")
        epoch = checks.integer(state["epoch"], "epoch of the state", 0)
        batch = checks.integer(state["batch"], "batch of the state", 0, len(self))
        expected = 0 if not self._records else min(batch * self.batch_size, len(self.sampler))
        taken = self._rows_of(state, "taken", expected, expected)
        order = self._rows_of(state, "order", 0, self.n - expected if expected else 0)
        visited = state["visited"]
        if not isinstance(visited, Tensor) or visited.dtype != torch.bool or visited.shape != (self.n,):
            raise ValueError(f"visited of the state must be a bool for each of {self.n} rows, got {visited!r}")
        self.sampler.set_epoch(epoch)
        batches = torch.split(taken, self.batch_size) if expected else ()
        self._progress = Progress(epoch, ranks, batch, list(batches), [(batch - 1, order)] if len(order) else [])
        self.visited = visited.cpu().clone()
        self._resumes = True

    def _rows_of(self, state: dict[str, Any], name: str, least: int, most: int) -> Tensor:
        rows = state[name]
        is_list = isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.ndim == 1
        if not is_list or not least <= len(rows) <= most:
            allowed = f"{most}" if least == most else f"at most {most}"
            raise ValueError(f"{name} of the state must be {allowed} rows, got {rows!r}")
        if len(rows):
            checks.row_indices(rows, f"{name} of the state", self.n, 1)
        listed: Tensor = rows.cpu()
        return listed

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
