"""Memory banks, samplers of every kind on them, and the way of a state through a file."""

import io
from typing import Any

import torch
from helpers import saved
from torch import Tensor

from spectral_kernels.selection import (
    GreedyBatchSampler,
    LiveBatchSampler,
    MemoryBank,
    PoolBatchSampler,
    RandomBatchSampler,
)

D = 4
TABLE = torch.randn(120, D, generator=torch.Generator().manual_seed(0))
KINDS = ("random", "pool", "pool partition", "greedy", "greedy partition", "live")
PARTITIONS = ("random", "pool partition", "greedy partition")  # every row once in an epoch


def bank_of(z: Tensor) -> MemoryBank:
    bank = MemoryBank(*z.shape)
    bank.update(torch.arange(len(z)), z)
    return bank


def warm_bank(n: int, unseen: list[int] | None = None) -> MemoryBank:
    z = TABLE[:n].clone()
    z[unseen or []] = 0
    return bank_of(z)


def make(kind: str, rows: MemoryBank | int, batch_size: int, **options: Any):
    """A sampler; random and live ones, which read no embeddings of a bank, take no notice of `min_seen`."""
    name, partition = kind.partition(" ")[::2]
    if name in ("random", "live"):
        options.pop("min_seen", None)
    if name == "random":
        return RandomBatchSampler(rows, batch_size, **options)
    if name == "live":
        return LiveBatchSampler(rows, batch_size, lambda chosen: TABLE[chosen], pool=2, **options)
    if name == "pool":
        return PoolBatchSampler(rows, batch_size, replacement=not partition, **{"draws": 3, **options})
    return GreedyBatchSampler(rows, batch_size, replacement=not partition, **{"candidates": 3, **options})


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    return torch.load(io.BytesIO(saved(state)), weights_only=True)
