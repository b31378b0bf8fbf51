"""Which rows of an epoch belong to which rank, and the seeds that everything random is derived from."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from spectral_kernels import checks
from spectral_kernels.selection.memory_bank import MemoryBank


def derived_generator(*key: int) -> torch.Generator:
    """CPU generator seeded by a hash of the key, so that neighbouring keys share nothing."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def distinct_rows(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k distinct rows of [0, n), uniformly; O(k) where k is small beside n."""
    if n <= 4 * k:
        return torch.randperm(n, generator=generator)[:k]
    rows = torch.empty(0, dtype=torch.int64)
    while len(rows) < k:
        rows = torch.unique(torch.randint(n, (2 * k,), generator=generator))
    return rows[torch.randperm(len(rows), generator=generator)[:k]]


def process_group(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """num_replicas and rank, from torch.distributed where not given."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_replicas is None:
        num_replicas = torch.distributed.get_world_size() if running else 1
    if rank is None:
        rank = torch.distributed.get_rank() if running else 0
    checks.integer(num_replicas, "num_replicas", 1)
    checks.integer(rank, "rank", 0, num_replicas - 1)
    return num_replicas, rank


class ShardSampler(Sampler[int]):
    """The rows of one rank in one epoch, in random order.

    Every epoch a permutation of all n rows, seeded by (seed, epoch) and so the same on every rank,
    less the rows that are not active in the bank, is dealt out in turn: place p goes to rank
    p % num_replicas. Shards are equally long: with `drop_last` the rows at the end of the
    permutation that do not deal out evenly sit the epoch out, without it the last places are filled
    with its first rows (both as in `torch.utils.data.DistributedSampler`).
    """

    def __init__(
        self, n: int, num_replicas: int, rank: int, seed: int, drop_last: bool, bank: MemoryBank | None = None
    ) -> None:
        self.n, self.num_replicas, self.rank, self.seed = n, num_replicas, rank, seed
        self.drop_last, self.bank = drop_last, bank
        self.epoch = 0
        self._rows: tuple[tuple[int, int], Tensor] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = checks.integer(epoch, "epoch", 0)

    def rows(self) -> Tensor:
        """(len(self),) int64."""
        key = self.epoch, 0 if self.bank is None else self.bank.changes
        if self._rows is None or self._rows[0] != key:
            permutation = torch.randperm(self.n, generator=derived_generator(self.seed, self.epoch))
            if self.bank is not None and self.bank.num_active < self.n:
                permutation = permutation[self.bank.active.cpu()[permutation]]
            places = torch.arange(len(self)) * self.num_replicas + self.rank
            self._rows = key, permutation[places % len(permutation)]
        return self._rows[1]

    def __len__(self) -> int:
        n = self.n if self.bank is None else self.bank.num_active
        return n // self.num_replicas if self.drop_last else -(-n // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        yield from self.rows().tolist()
