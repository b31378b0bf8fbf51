"""Memory banks, and samplers of every kind on them."""

import torch

from spectral_kernels.selection import GreedyBatchSampler, MemoryBank, PoolBatchSampler, RandomBatchSampler

D = 6


def warm_bank(n: int, unseen: list[int] | None = None, seed: int = 0) -> MemoryBank:
    bank = MemoryBank(n, D)
    z = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    z[unseen or []] = 0
    bank.update(torch.arange(n), z)
    return bank


def make(kind: str, bank: MemoryBank, batch_size: int, **options):
    if kind == "random":
        options.pop("replacement", None)
        return RandomBatchSampler(bank, batch_size, **options)
    if kind == "pool":
        return PoolBatchSampler(bank, batch_size, draws=3, **options)
    return GreedyBatchSampler(bank, batch_size, candidates=3, **options)


KINDS = ("random", "pool", "greedy")
ALL = [
    ("random", False),
    *((kind, replacement) for kind in ("pool", "greedy") for replacement in (True, False)),
]
