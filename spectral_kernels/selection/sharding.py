"""Which rows of an epoch belong to which rank, and the seeds that everything random is derived from."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from spectral_kernels import checks
from spectral_kernels.selection.memory_bank import MemoryBank


def hashed_seed(key: str) -> int:
    """A seed from a hash of the key, so that neighbouring keys share nothing."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def derived_generator(*key: int) -> torch.Generator:
    """CPU generator for a key."""
    return torch.Generator().manual_seed(hashed_seed(repr(key)))


def distinct_rows(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k distinct rows of [0, n), uniformly; O(k) where k is small beside n."""
    if n <= 4 * k:
        return torch.randperm(n, generator=generator)[:k]
    rows = torch.empty(0, dtype=torch.int64)
    while len(rows) < k:
        rows = torch.unique(torch.randint(n, (2 * k,), generator=generator))
    return rows[torch.randperm(len(rows), generator=generator)[:k]]


class ShardSampler(Sampler[int]):
    """The rows of one rank in one epoch, in random order.

    Every epoch a permutation of all n rows, seeded by (seed, epoch) and so the same on every rank,
    less the rows that are not active in the bank, is dealt out in turn: place p goes to rank
    p % num_replicas. Shards are equally long: with `drop_last` the rows at the end of the
    permutation that do not deal out evenly sit the epoch out, without it the last places are filled
    with its first rows (both as in `torch.utils.data.DistributedSampler`).

    Ranks that are not given are those of torch.distributed's process group whenever they are asked
    for, 1 and 0 without one: a sampler may be made before the group.

    An epoch that has begun keeps the rows that it was dealt out from, whatever is retired or admitted
    meanwhile; the length is that of a shard of the rows active now.

    Iterated itself, it begins with the present epoch, and each further time takes the next one, until
    that is set or the batch sampler begins one; `epoch` does not move.

    Attributes:
        epoch: the one that was set or begun last.
        begun: whether batches of it were requested since it was set.
        dealt: (n,) bool, the rows that were active as it began; None without a bank.
    """

    def __init__(
        self,
        n: int,
        num_replicas: int | None,
        rank: int | None,
        seed: int,
        drop_last: bool,
        bank: MemoryBank | None = None,
    ) -> None:
        if num_replicas is not None:
            num_replicas = checks.integer(num_replicas, "num_replicas", 1)
        if rank is not None:
            rank = checks.integer(rank, "rank", 0, None if num_replicas is None else num_replicas - 1)
        self.n, self.seed, self.drop_last, self.bank = n, seed, drop_last, bank
        self._given = num_replicas, rank
        self.epoch, self.begun = 0, False
        self.dealt: Tensor | None = None
        self._passes = 0
        self._rows: tuple[tuple[int, ...], Tensor | None, Tensor] | None = None

    @property
    def num_replicas(self) -> int:
        """Ranks that share the rows."""
        given = self._given[0]
        if given is not None:
            return given
        return torch.distributed.get_world_size() if _group_runs() else 1

    @property
    def rank(self) -> int:
        """Whose rows these are.

        Raises:
            ValueError: out of [0, num_replicas), or neither given nor to be had from a group.
        """
        rank, replicas = self._given[1], self.num_replicas
        if rank is None:
            if not _group_runs() and replicas > 1:
                raise ValueError(
                    f"num_replicas = {replicas} is given, but neither rank nor a process group to ask for it"
                )
            rank = torch.distributed.get_rank() if _group_runs() else 0
        return checks.integer(rank, "rank", 0, replicas - 1)

    def share_among(self, num_replicas: int, rank: int) -> None:
        """The processes that a trainer has for data, where none were given: other ones than the group's where it has a mesh."""
        if self._given == (None, None):
            self._given = num_replicas, rank

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.begun = checks.integer(epoch, "epoch", 0), False
        self._passes = 0

    def begin(self) -> None:
        """Begin the epoch that was set, or else the next one."""
        if self.begun:
            self.epoch += 1
        self.go_on(self._active())

    def go_on(self, dealt: Tensor | None) -> None:
        """Go on with the present epoch, which was dealt out from these rows."""
        # the bank replaces its mask, and does not write to it
        self.begun, self.dealt, self._passes = True, dealt, 0

    def rows(self, epoch: int | None = None) -> Tensor:
        """(r,) int64, of the present epoch where none is named."""
        epoch = self.epoch if epoch is None else epoch
        active = self.dealt if self.begun and epoch == self.epoch else self._active()
        key = epoch, self.num_replicas, self.rank
        if self._rows is None or self._rows[0] != key or self._rows[1] is not active:
            self._rows = key, active, self.deal(epoch, active)
        return self._rows[2]

    def deal(self, epoch: int, active: Tensor | None) -> Tensor:
        """The rank's rows of an epoch, (r,) int64, of the rows in a mask (n,) that is not all False; None is all."""
        permutation = torch.randperm(self.n, generator=derived_generator(self.seed, epoch))
        if active is not None:
            permutation = permutation[active.cpu()[permutation]]
        places = torch.arange(self.share(len(permutation))) * self.num_replicas + self.rank
        return permutation[places % len(permutation)]

    def share(self, rows: int) -> int:
        """How many of so many rows a rank gets."""
        return rows // self.num_replicas if self.drop_last else -(-rows // self.num_replicas)

    def _active(self) -> Tensor | None:
        return None if self.bank is None else self.bank.active

    def __len__(self) -> int:
        return self.share(self.n if self.bank is None else self.bank.num_active)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch + self._passes
        self._passes += 1
        yield from self.rows(epoch).tolist()


def _group_runs() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
