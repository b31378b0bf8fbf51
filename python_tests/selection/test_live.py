"""Batches from a live pool."""

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.selection import LiveBatchSampler

N, D, BATCH = 400, 10, 16


class Embedder:
    """Rows of a fixed table; remembers what it was asked for."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        # most rows alike, so that random batches are not diverse
        self.table = torch.randn(N, D, generator=generator) * torch.logspace(0, -1.5, D)
        self.asked: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append(rows)
        return self.table[rows]


@pytest.mark.parametrize("ranks", (1, 3))
@pytest.mark.parametrize("candidates", (None, 8))
def test_batches_come_from_the_pool(candidates: int | None, ranks: int) -> None:
    shards = []
    for rank in range(ranks):
        embed = Embedder()
        sampler = LiveBatchSampler(N, BATCH, embed, pool=3, candidates=candidates, num_replicas=ranks, rank=rank)
        batches = list(sampler)
        assert len(batches) == len(sampler) == N // ranks // BATCH == len(embed.asked)
        for batch, asked in zip(batches, embed.asked, strict=True):
            assert len(asked) == len(asked.unique()) == 3 * BATCH
            assert len(set(batch)) == BATCH
            assert set(asked.tolist()).issuperset(batch)
        shards.append(set(torch.cat(embed.asked).tolist()))
        assert sampler.last_selection is not None
        assert sampler.last_selection.indices.tolist() == batches[-1]
    assert sum(map(len, shards)) == len(set.union(*shards))


def test_batches_are_more_diverse_than_the_pool() -> None:
    embed = Embedder()
    batch = next(iter(LiveBatchSampler(N, BATCH, embed, pool=8, candidates=None)))
    ranks = [float(sk.effective_rank(embed.table[rows], order=2)) for rows in (batch, *embed.asked[0].chunk(8))]
    assert ranks[0] > max(ranks[1:])


def test_bad_arguments() -> None:
    embed = Embedder()
    with pytest.raises(ValueError, match="pool must be at least 1, got 0"):
        LiveBatchSampler(N, BATCH, embed, pool=0)
    with pytest.raises(ValueError, match="candidates"):
        LiveBatchSampler(N, BATCH, embed, candidates=0)
    with pytest.raises(ValueError, match="embed was given 64 rows and returned 63 embeddings"):
        next(iter(LiveBatchSampler(N, BATCH, lambda rows: embed(rows)[1:])))
    with pytest.raises(ValueError, match="NaN or Inf"):
        next(iter(LiveBatchSampler(N, BATCH, lambda rows: embed(rows) / 0)))
