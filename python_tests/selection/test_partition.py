"""Without replacement: every row once, and no batch that pays for the others."""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
import torch
from sampler_helpers import bank_of
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.selection import GreedyBatchSampler, PoolBatchSampler
from spectral_kernels.selection.partition import by_commonness, from_strata
from spectral_kernels.selection.sharding import derived_generator

N, D = 1024, 16


def pools(seed: int) -> Iterator[tuple[str, Tensor]]:
    """Embeddings (N, D) of several kinds."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, D, generator=g)
    scale = torch.arange(1, D + 1).float()
    for power in (0.0, 0.5, 1.0, 2.0):
        yield f"spectrum 1/k^{power}", noise * scale**-power
    centers = torch.randn(12, D, generator=g)
    yield "clusters", centers[torch.randint(12, (N,), generator=g)] + 0.1 * noise
    uneven = torch.multinomial(torch.logspace(0, -2, 12), N, True, generator=g)
    yield "clusters of 100:1", centers[uneven] + 0.1 * noise
    copies = noise * scale**-0.5
    copies[: N // 2] = copies[0] + 0.01 * noise[: N // 2]
    yield "half of them near-duplicates", copies[torch.randperm(N, generator=g)]
    few = torch.eye(D)[torch.randint(3, (N,), generator=g)] + torch.eye(D)[3] + 0.02 * noise
    outliers = torch.rand(N, generator=g) < 0.05
    few[outliers] = noise[outliers]
    yield "few directions and outliers", few
    yield "a large mean", 0.1 * noise + torch.eye(D)[0]


POOLS = dict(pools(0))


def ranks(z: Tensor, batches: list[list[int]]) -> Tensor:
    return torch.tensor([float(sk.effective_rank(z[batch], order=2)) for batch in batches])


@cache
def random_rank(name: str, rows: int, size: int) -> float:
    """Mean over random batches of that size."""
    z, g = POOLS[name][:rows], torch.Generator().manual_seed(1)
    return float(ranks(z, [torch.randperm(len(z), generator=g)[:size].tolist() for _ in range(60)]).mean())


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize(
    "kind", ("greedy 4", "greedy 64", "greedy None", "logdet 16", "pool balanced", "pool high"), ids=lambda kind: kind
)
@pytest.mark.parametrize(("batch_size", "cut"), ((64, 0), (128, 126)))
def test_no_batch_is_far_below_random_ones(name, kind, batch_size, cut):
    """Also the last, which has 2 rows where 126 are cut off."""
    z = POOLS[name][: N - cut]
    bank, (how, which) = bank_of(z), kind.split()
    options = {"replacement": False, "drop_last": False}
    if how == "pool":
        sampler = PoolBatchSampler(bank, batch_size, policy=which, **options)
    else:
        objective = "logdet" if how == "logdet" else "effective_rank"
        sampler = GreedyBatchSampler(bank, batch_size, candidates=eval(which), objective=objective, **options)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(z)))
    assert [len(batch) for batch in batches] == [batch_size] * (len(z) // batch_size) + [2] * (cut > 0)
    relative = torch.cat([ranks(z, [batch]) / random_rank(name, len(z), len(batch)) for batch in batches])
    assert relative.min() > 0.9
    # more diverse than random, where that can be
    if how == "greedy" and name.startswith(("spectrum 1/k^0", "clusters")):
        assert relative.mean() > 1.01


@pytest.mark.parametrize("name", ("spectrum 1/k^0.5", "clusters"))
def test_no_log_determinant_is_far_below_random_ones(name):
    """Raised to the end of an epoch, it would leave its last batches without the rare directions."""
    z = torch.nn.functional.normalize(POOLS[name], dim=1).double()

    def values(batches):
        eye = torch.eye(D, dtype=torch.float64)
        return torch.stack([torch.logdet(eye + z[batch].T @ z[batch] / 1e-3) for batch in batches])

    sampler = GreedyBatchSampler(bank_of(z.float()), 64, candidates=16, objective="logdet", replacement=False)
    own, random = values(list(sampler)), values(torch.randperm(N, generator=derived_generator(0)).split(64))
    assert own.min() > random.min()
    assert own.mean() > random.mean()


def test_batches_of_a_low_policy_stay_alike():
    bank = bank_of(POOLS["clusters"])
    own = ranks(POOLS["clusters"], list(PoolBatchSampler(bank, 64, policy="low", replacement=False)))
    assert own.max() < 1.15 * own.min()


def test_commonness_is_that_of_the_second_moment():
    z = torch.nn.functional.normalize(torch.randn(300, 5), dim=1)
    rows = torch.randperm(300)[:200]
    right = (z[rows] @ z[rows].T).square().mean(1)
    got = by_commonness(z, rows)
    assert sorted(got.tolist()) == sorted(rows.tolist())
    value = torch.zeros(300).index_put((rows,), right)
    assert bool((value[got].diff() > -1e-5).all())
    same = torch.ones(300, 5) / 5**0.5
    assert torch.equal(by_commonness(same, rows), rows), "ties stay in order"
    z[rows[7]] = torch.nan
    with pytest.raises(ValueError, match=f"pool row {int(rows[7])} holds NaN or Inf"):
        by_commonness(z, rows)


@pytest.mark.parametrize("m", (1, 5, None))
@pytest.mark.parametrize(("rows", "k"), ((40, 8), (43, 8), (8, 8), (9, 8), (5, 1)))
def test_strata_are_a_partition(rows, k, m):
    order = torch.randperm(rows)
    draws = from_strata(order, k, m, derived_generator(0))
    assert draws.shape == (k, -(-rows // k) if m is None else m)
    strata = [set(stratum) for stratum in draws.tolist()]
    assert sum(map(len, strata)) == len(set.union(*strata)), "no row in two"
    place = order.argsort()
    spans = sorted((int(place[stratum].min()), int(place[stratum].max())) for stratum in draws)
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    if m is None:
        assert set.union(*strata) == set(range(rows))


def test_strata_are_drawn_from_uniformly():
    order, trials = torch.arange(20), 4000
    for m, first in ((3, False), (None, True)):
        draws = torch.stack([from_strata(order, 4, m, derived_generator(seed)) for seed in range(trials)])
        counts = torch.bincount((draws[..., :1] if first else draws).flatten(), minlength=20)
        expected = counts.sum() / 20
        assert float(((counts - expected) ** 2 / expected).sum()) < 19 + 5 * (2 * 19) ** 0.5


@pytest.mark.parametrize("kind", ("greedy", "pool"))
def test_unseen_and_retired_rows_come_at_their_share(kind):
    z = POOLS["spectrum 1/k^1.0"][:512].clone()
    z[::8] = 0
    bank = bank_of(z)
    maker = GreedyBatchSampler if kind == "greedy" else PoolBatchSampler
    sampler = maker(bank, 64, replacement=False, min_seen=0.5, drop_last=False)
    counts = [sum(row % 8 == 0 for row in batch) for batch in sampler]
    assert counts == [8] * 8
    sampler = maker(bank_of(POOLS["spectrum 1/k^1.0"][:512]), 64, replacement=False, drop_last=False)
    handed = []
    for batch in sampler:
        handed += batch
        if len(handed) == 64:
            gone = torch.tensor([row for row in range(512) if row not in handed][:40])
            sampler.bank.retire(gone)
        if len(handed) == 256:
            sampler.bank.admit(gone[:10])
            sampler.bank.update(gone[:10], torch.randn(10, D))
    assert sorted(handed) == list(range(512)), "an epoch has the rows that were active as it began"
