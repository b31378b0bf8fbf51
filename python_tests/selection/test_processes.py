"""Samplers in real processes of one torch.distributed group."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spectral_kernels import GreedyBatchSampler, MemoryBank, PoolBatchSampler, RandomBatchSampler

N, D, BATCH = 61, 8, 6


def _epoch(rank: int, world: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    bank = MemoryBank(N, D)
    bank.update(torch.arange(N), torch.randn(N, D, generator=torch.Generator().manual_seed(0)))
    for sampler in (
        RandomBatchSampler(N, BATCH, drop_last=False),
        GreedyBatchSampler(bank, BATCH, candidates=8, replacement=False, drop_last=False),
        PoolBatchSampler(bank, BATCH, draws=4, replacement=False, drop_last=False),
    ):
        assert (sampler.num_replicas, sampler.rank) == (world, rank)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            rows = torch.tensor([row for batch in sampler for row in batch])
            # as long on every rank, so that no rank waits for a gradient that never comes
            gathered = [torch.empty_like(rows) for _ in range(world)]
            dist.all_gather(gathered, rows)
            visits = torch.bincount(torch.cat(gathered), minlength=N)
            assert visits.min() == 1 and visits.sum() == -(-N // world) * world
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, 4))
def test_ranks_share_an_epoch(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_epoch, (world, str(tmp_path / "rendezvous")), nprocs=world)
