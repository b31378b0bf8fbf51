"""Ranks that are not given are those of the process group there is when they are needed."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sampler_helpers import make, warm_bank

from spectral_kernels.selection import RandomBatchSampler

N, ODD, BATCH = 24, 61, 4


@pytest.fixture
def group(monkeypatch):
    """Sets the process group: (size, rank), or None for none."""
    now = {"group": None}
    monkeypatch.setattr(dist, "is_initialized", lambda: now["group"] is not None)
    monkeypatch.setattr(dist, "get_world_size", lambda: now["group"][0])
    monkeypatch.setattr(dist, "get_rank", lambda: now["group"][1])
    return lambda size_and_rank: now.update(group=size_and_rank)


def rows(sampler) -> set[int]:
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return {row for batch in batches for row in batch}


def test_a_sampler_made_before_the_group(group):
    shards = []
    for rank in range(3):
        group(None)
        sampler = RandomBatchSampler(N, BATCH)
        assert (sampler.num_replicas, sampler.rank, len(sampler)) == (1, 0, 6)
        group((3, rank))
        assert (sampler.num_replicas, sampler.rank, len(sampler), len(sampler.sampler)) == (3, rank, 2, 8)
        state = sampler.state_dict()
        assert (state["num_replicas"], state["rank"]) == (3, rank)
        shards.append(rows(sampler))
        assert shards[-1] == set(sampler.sampler.rows().tolist()) == set(sampler.sampler)
    assert set.union(*shards) == set(range(N))
    group(None)
    assert rows(sampler) == set(range(N)), "the group is gone: the next epoch is of one process"


def test_given_ranks_stay(group):
    sampler = RandomBatchSampler(N, BATCH, num_replicas=2, rank=1)
    alone = rows(sampler)
    group((3, 0))
    sampler.set_epoch(0)
    assert (sampler.num_replicas, sampler.rank) == (2, 1)
    assert rows(sampler) == alone
    # one given, the other of the group
    assert RandomBatchSampler(N, BATCH, num_replicas=6).rank == 0
    group(None)
    with pytest.raises(ValueError, match="num_replicas = 6 is given, but neither rank nor a process group"):
        next(iter(RandomBatchSampler(N, BATCH, num_replicas=6)))
    with pytest.raises(ValueError, match="rank must be between 0 and 0, got 1"):
        next(iter(RandomBatchSampler(N, BATCH, rank=1)))


def test_a_batch_above_a_shard_is_known_with_the_group(group):
    sampler = RandomBatchSampler(N, 16)
    group((2, 1))
    with pytest.raises(ValueError, match="batch_size = 16 exceeds the 12 rows of a rank's shard"):
        next(iter(sampler))
    group(None)
    next(iter(sampler))
    assert sampler.epoch == 0, "an epoch that could not begin is not one"


def test_a_group_that_changes_in_an_epoch(group):
    message = "epoch 0 began as rank 0 of 1, and this process is now rank 1 of 2"
    for kind in ("random", "greedy partition"):
        sampler = make(kind, warm_bank(N), BATCH)
        group(None)
        iterator = iter(sampler)
        next(iterator)
        state = sampler.state_dict()
        group((2, 1))
        with pytest.raises(RuntimeError, match=message):
            next(iterator)
        with pytest.raises(ValueError, match="num_replicas of the state is 1, but this batch sampler has 2"):
            sampler.load_state_dict(state)
        assert sampler.state_dict()["num_replicas"] == 1, "of whom the batches were"
        group(None)
        sampler.load_state_dict(state)
        group((2, 1))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                next(iter(sampler))
        sampler.set_epoch(1)
        assert len(rows(sampler)) == N // 2


def _epochs(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    samplers = [
        make(kind, warm_bank(ODD), 6, drop_last=False) for kind in ("random", "pool partition", "greedy partition")
    ]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for sampler in samplers:
        assert (sampler.num_replicas, sampler.rank) == (world, rank)
        for _ in range(2):
            rows = torch.tensor([row for batch in sampler for row in batch])
            # as long on every rank, so that no rank waits for a gradient that never comes
            gathered = [torch.empty_like(rows) for _ in range(world)]
            dist.all_gather(gathered, rows)
            visits = torch.bincount(torch.cat(gathered), minlength=ODD)
            assert visits.min() == 1 and visits.sum() == -(-ODD // world) * world
    dist.destroy_process_group()


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_processes_share_an_epoch(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_epochs, (world, str(tmp_path / "rendezvous")), nprocs=world)
