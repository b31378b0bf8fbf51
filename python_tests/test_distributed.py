"""What is spread over processes equals what one process computes: real processes of a gloo group."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import spectral_kernels as sk
from spectral_kernels.distributed import (
    ShardedMemoryBank,
    distributed_covariance,
    distributed_effective_rank,
    gather_rows,
    gathered_info_nce,
    sharded_greedy_select,
)

D = 12


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, D, generator=generator) * torch.arange(1, D + 1) ** -0.5 + 0.5).to(dtype)


def shard_of(pool: Tensor, rank: int, world: int) -> Tensor:
    """Uneven: the first rank has fewer rows."""
    cuts = [0, *(len(pool) * (2 * r + 1) // (2 * world) for r in range(1, world)), len(pool)]
    return pool[cuts[rank] : cuts[rank + 1]]


def losses(rank: int, world: int) -> None:
    """Gradients of the parameters, averaged over ranks, are those of one process; so are the gradient norms."""
    first, second = rows(8 * world, 1), rows(8 * world, 2)
    part = slice(8 * rank, 8 * rank + 8)
    for name in ("nt_xent", "info_nce"):
        loss: Callable[..., Tensor] = getattr(sk, name)
        encoder = nn.Linear(D, 6, dtype=torch.float64)
        nn.init.constant_(encoder.bias, 0.1)
        nn.init.orthogonal_(encoder.weight, generator=torch.Generator().manual_seed(0))
        whole = loss(encoder(first), encoder(second), temperature=0.1)
        expected = torch.autograd.grad(whole, list(encoder.parameters()))
        parallel = nn.parallel.DistributedDataParallel(encoder)
        views = (
            gather_rows(parallel(torch.cat([first[part], second[part]]))[half]) for half in (slice(8), slice(8, 16))
        )
        mine = loss(*views, temperature=0.1)
        mine.backward()
        torch.testing.assert_close(mine.detach(), whole.detach(), rtol=1e-12, atol=0)
        for parameter, gradient in zip(encoder.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    queue = rows(33, 3)
    for name, given in (("nt_xent", None), ("info_nce", None), ("info_nce", queue)):
        exact = sk.info_nce_grad_norms(first, second, queue=given, temperature=0.05, loss=name, backend="reference")
        gathered = (gather_rows(first[part]), gather_rows(second[part]))
        norms = sk.info_nce_grad_norms(*gathered, queue=given, temperature=0.05, loss=name)
        torch.testing.assert_close(norms, exact, rtol=1e-12, atol=0)


def gathered(rank: int, world: int) -> None:
    """Keys of all ranks as negatives: losses and gradients, a learned temperature's too, are those of one process."""
    first, second = rows(8 * world, 1), rows(8 * world, 2)
    groups = torch.arange(8 * world) % 11
    part = slice(8 * rank, 8 * rank + 8)
    same = groups[:, None] == groups
    order = [*range(8 * rank, 8 * rank + 8), *(i for i in range(8 * world) if i // 8 != rank)]
    for given, mine in (
        ({}, {}),
        ({"groups": groups}, {"groups": groups[part]}),
        ({"mask": same}, {"mask": same[part][:, order]}),
        ({"symmetric": True, "groups": groups}, {"symmetric": True, "groups": groups[part].int()}),
    ):
        model = sk.InfoNCELoss(0.2, learnable_temperature=True).double()
        model.encoder = nn.Linear(D, 6, dtype=torch.float64)
        nn.init.constant_(model.encoder.bias, 0.1)
        nn.init.orthogonal_(model.encoder.weight, generator=torch.Generator().manual_seed(0))
        whole = sk.info_nce(
            model.encoder(first), model.encoder(second), temperature=model.temperature, reduction="none", **given
        )
        expected = torch.autograd.grad(whole.mean(), list(model.parameters()))
        query, key = model.encoder(first[part]), model.encoder(second[part])
        loss = gathered_info_nce(query, key, temperature=model.temperature, reduction="none", **mine)
        torch.testing.assert_close(loss.detach(), whole.detach()[part], rtol=1e-12, atol=0)
        loss.mean().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            dist.all_reduce(parameter.grad)  # as DistributedDataParallel does
            torch.testing.assert_close(parameter.grad / world, gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="mask does not go with symmetric here"):
        gathered_info_nce(first[part], second[part], mask=same[part], symmetric=True)
    alone = gathered_info_nce(first[rank : rank + 1], second[rank : rank + 1], reduction="none")
    torch.testing.assert_close(alone, sk.info_nce(first[:world], second[:world], reduction="none")[rank : rank + 1])


def statistics(rank: int, world: int) -> None:
    pool = rows(61, 4)
    mine = shard_of(pool, rank, world)
    for center in (True, False):
        for normalize in (True, False):
            options = {"center": center, "normalize": normalize}
            whole = pool.clone().requires_grad_()
            expected = sk.covariance(whole, correction=1, **options)
            weights = torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            (expected * weights).sum().backward()
            part = mine.clone().requires_grad_()
            found = distributed_covariance(part, correction=1, **options)
            torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)
            # every rank's loss is the whole one: the sum of them, which the all-reduce differentiates, is `world` times it
            (found * weights).sum().backward()
            assert whole.grad is not None and part.grad is not None
            torch.testing.assert_close(part.grad / world, shard_of(whole.grad, rank, world), rtol=1e-9, atol=1e-12)
            for order in (1.0, 2.0, math.inf):
                exact = sk.effective_rank(pool, order=order, **options)
                value = distributed_effective_rank(mine, order=order, **options)
                torch.testing.assert_close(value, exact, rtol=1e-9, atol=0)
    far = rows(61, 4, torch.float32) + 1e5  # a large mean does not cancel
    exact = sk.covariance(far.double())
    found = distributed_covariance(shard_of(far, rank, world))
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def hard_statistics(rank: int, world: int) -> None:
    """Nearly equal rows, ranks whose means differ, equal rows, any scale: what one process finds in float64."""
    base, noise = rows(1, 8), rows(61, 9) - 0.5
    for spread in (2e-4, 1e-6, 1e-7):
        for normalize in (True, False):
            pool = base + spread * noise
            pool[30:] += 3 * spread
            mine = shard_of(pool, rank, world)
            for order in (0.5, 1.0, 2.0, math.inf):
                right = sk.effective_rank(pool, order=order, center=True, normalize=normalize, backend="reference")
                found = distributed_effective_rank(mine, order=order, center=True, normalize=normalize)
                torch.testing.assert_close(found, right, rtol=1e-5, atol=0)
            narrow = pool.float()
            exact = sk.covariance(narrow.double(), normalize=False)
            found = distributed_covariance(shard_of(narrow, rank, world))
            assert float((found - exact).norm() / exact.norm()) < 2e-2 * 1e-6 / spread + 1e-5, spread
    for order in (0.0, 0.5, 1.0, 2.0, math.inf):
        equal = shard_of(base.expand(61, D), rank, world)
        assert float(distributed_effective_rank(equal, order=order, center=True)) == 0
        assert float(distributed_effective_rank(equal, order=order)) == pytest.approx(1)
        assert float(distributed_effective_rank(0 * equal, order=order)) == 0
    flat = shard_of(rows(61, 4)[:, :2] @ rows(2, 5), rank, world)
    for order, right in ((0.0, 2.0), (0.1, float(sk.effective_rank(rows(61, 4)[:, :2] @ rows(2, 5), order=0.1)))):
        assert float(distributed_effective_rank(flat, order=order)) == pytest.approx(right, rel=1e-6)
    pool = rows(61, 4)
    for scale in (1e20, 1e-20, 1e160, 1e-160):
        scaled = (shard_of(pool, rank, world) * scale).to(torch.float32 if 1e-30 < scale < 1e30 else torch.float64)
        for order in (1.0, 2.0):
            right = sk.effective_rank(pool, order=order, normalize=False).to(scaled.dtype)
            found = distributed_effective_rank(scaled, order=order, normalize=False)
            torch.testing.assert_close(found, right, rtol=1e-5, atol=0)
    for center in (True, False):
        with pytest.raises(ValueError, match=f"correction must be below the {world} rows of all ranks, got {world}"):
            distributed_covariance(rows(1, rank), center=center, correction=world)


def greedy(rank: int, world: int) -> None:
    for dtype in (torch.float64, torch.float32):
        pool = rows(200, 6, dtype)
        pool[40:60] = pool[:20]  # ties
        pool[100:110] = 0
        for options in (
            {"candidates": 8}, {"candidates": 3, "objective": "logdet"}, {"candidates": 16},
            {"candidates": None}, {"candidates": None, "objective": "logdet"}, {"candidates": 1},
        ):  # fmt: skip
            for seed in range(3):
                for k in (1, 30, 195):
                    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
                    expected = sk.greedy_select(pool, k, generator=generators[0], backend="reference", **options)
                    found = sharded_greedy_select(shard_of(pool, rank, world), k, generator=generators[1], **options)
                    assert found.indices.tolist() == expected.indices.tolist(), (options, seed, k)
                    torch.testing.assert_close(found.objective, expected.objective, rtol=1e-5, atol=1e-7)
                    if options["candidates"] is not None:
                        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def bank(rank: int, world: int) -> None:
    sharded, whole = ShardedMemoryBank(41, D), sk.MemoryBank(41, D)
    generator = torch.Generator().manual_seed(7)
    for step in range(5):
        batch = torch.randperm(41, generator=generator)[: 8 * world].reshape(world, 8)
        z = rows(8 * world, step, torch.float32).reshape(world, 8, D)
        sharded.update(batch[rank], z[rank])
        whole.update(batch.reshape(-1), z.reshape(-1, D))
    part = slice(sharded.first, sharded.first + len(sharded.local))
    assert torch.equal(sharded.local.embeddings, whole.embeddings[part])
    assert torch.equal(sharded.local.seen, whole.seen[part])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = sk.greedy_select(whole.embeddings, 10, candidates=8, generator=generators[0])
    found = sharded.greedy_select(10, candidates=8, generator=generators[1])
    assert torch.equal(found.indices, expected.indices)


PARTS = {function.__name__: function for function in (losses, gathered, statistics, hard_statistics, greedy, bank)}


def _process(rank: int, world: int, rendezvous: str, parts: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for name in parts:
        PARTS[name](rank, world)
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (2, str(tmp_path / "rendezvous"), tuple(PARTS)), nprocs=2)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (4, str(tmp_path / "rendezvous"), tuple(PARTS)), nprocs=4)
