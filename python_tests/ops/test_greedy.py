"""Greedy selection: against brute force, across backends, and its rules one by one."""

import itertools
from typing import Any

import pytest
import torch
from process_helpers import run_python
from registry import BACKENDS, generator
from torch import Tensor

import spectral_kernels as sk


def logdet(rows: Tensor) -> float:
    unit = torch.nn.functional.normalize(rows.double())
    return float(torch.logdet(torch.eye(rows.shape[1]).double() + unit.mT @ unit / 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", (True, False))
def test_each_step_is_the_best_by_brute_force(normalize: bool, backend: str) -> None:
    pool = torch.randn(14, 5) * torch.rand(14, 1).add(0.2)
    chosen = sk.greedy_select(pool, 6, candidates=None, start=2, normalize=normalize, backend=backend)
    picked = [2]
    for step in range(1, 6):
        left = [i for i in range(14) if i not in picked]
        ranks = [float(sk.effective_rank(pool[[*picked, i]].double(), order=2, normalize=normalize)) for i in left]
        best = max(range(len(left)), key=lambda i: (ranks[i], -left[i]))
        picked.append(left[best])
        assert chosen.effective_rank[step].item() == pytest.approx(ranks[best], rel=1e-5)
    assert chosen.indices.tolist() == picked


@pytest.mark.parametrize("backend", BACKENDS)
def test_logdet_by_brute_force(backend: str) -> None:
    pool = torch.randn(12, 4)
    chosen = sk.greedy_select(pool, 7, candidates=None, start=0, objective="logdet", backend=backend)
    picked = [0]
    for step in range(1, 7):
        left = [i for i in range(12) if i not in picked]
        best = max(logdet(pool[[*picked, i]]) for i in left)
        picked.append(int(chosen.indices[step]))
        # near-ties are decided by rounding, so it is the objective that is compared
        assert logdet(pool[picked]) == pytest.approx(best, rel=1e-4)
        assert chosen.objective[step].item() == pytest.approx(logdet(pool[picked]), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_copies_tie(backend: str) -> None:
    """One of each is taken, and not always the same."""
    pool = torch.randn(5, 8).repeat(6, 1) * torch.tensor([3.0, 0.7, 1.0, 10.0, 1e3, 0.1]).repeat_interleave(5)[:, None]
    picked = set()
    for seed in range(5):
        chosen = sk.greedy_select(pool, 5, candidates=None, start=0, generator=generator(seed), backend=backend)
        assert sorted((chosen.indices % 5).tolist()) == [0, 1, 2, 3, 4]
        picked |= set(chosen.indices.tolist())
    assert len(picked) > 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_independent_pools(backend: str) -> None:
    pools = torch.randn(2, 3, 20, 4)
    together = sk.greedy_select(pools, 5, candidates=None, start=1, backend=backend)
    assert together.indices.shape == (2, 3, 5)
    for i, j in itertools.product(range(2), range(3)):
        alone = sk.greedy_select(pools[i, j], 5, candidates=None, start=1, backend=backend)
        assert torch.equal(together.indices[i, j], alone.indices)


def test_every_generator_device_and_none() -> None:
    pool = torch.randn(50, 4)
    torch.manual_seed(3)
    first = sk.greedy_select(pool, 5).indices
    torch.manual_seed(3)
    assert torch.equal(first, sk.greedy_select(pool, 5).indices)
    assert not torch.equal(first, sk.greedy_select(pool, 5).indices)


@pytest.mark.parametrize("path", ("avx2", "baseline"))
def test_narrower_instruction_sets_pick_the_same(path: str) -> None:
    script = """
import torch, spectral_kernels as sk
torch.manual_seed(0); p = torch.randn(600, 33)
for m in (None, 16):
    g = torch.Generator().manual_seed(1)
    print(sk.greedy_select(p, 50, candidates=m, generator=g, backend='cpp').indices.tolist())
"""
    wide, narrow = (run_python("-c", script, SPECTRAL_KERNELS_CPU_PATH=each).stdout for each in ("", path))
    assert wide == narrow


def picks_alike(pool: Tensor, k: int, backend: str = "cpp", seed: int = 3, **options: Any) -> Tensor:
    """Those of a backend, which are the reference's."""
    found, expected = (
        sk.greedy_select(pool, k, generator=generator(seed), backend=each, **options).indices
        for each in (backend, "reference")
    )
    assert torch.equal(found, expected)
    return found


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("candidates", (None, 64))
def test_cpp_picks_what_the_reference_picks(dtype: torch.dtype, candidates: int | None) -> None:
    """At the size of use, where a wrong bound or a missed near-tie would show."""
    pool = (torch.randn(1500, 48) * torch.arange(1, 49) ** -0.7).to(dtype)
    pool[700:1400] = pool[:700]
    picks_alike(pool, 130, candidates=candidates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", ["effective_rank", "logdet"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("d", [64, 130])
def test_draws_that_stay_stale_in_cpp_could_not_have_won(
    d: int, normalize: bool, objective: str, dtype: torch.dtype
) -> None:
    """Wide rows on a steep spectrum: within a block of picks the draws change places."""
    z = (torch.randn(700, d, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)).to(dtype)
    picks_alike(z, 100, candidates=64, objective=objective, normalize=normalize)


def hard_pool(kind: str, generator: torch.Generator) -> Tensor:
    """Up to 600 rows that float32 cannot tell apart by what they add."""
    n = int(torch.randint(2, 600, (), generator=generator))
    d = (1, 2, 5, 64, 123, 129)[int(torch.randint(6, (), generator=generator))]
    z = torch.randn(n, d, generator=generator)
    if kind == "norms":
        return z * torch.randn(n, 1, generator=generator).exp() ** 2
    if kind == "duplicates":
        return z[torch.randint(max(1, n // 50), (n,), generator=generator)]
    if kind == "low rank":
        return torch.randn(n, 2, generator=generator) @ torch.randn(2, d, generator=generator) + 1e-3 * z
    centres = z[torch.randint(min(3, n), (n,), generator=generator)]
    return 3 * (centres + 1e-3 * torch.randn(n, d, generator=generator))


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("kind", ("norms", "duplicates", "low rank", "clusters"))
def test_cpp_picks_from_float_rows_as_from_float64(kind: str, objective: str) -> None:
    """By log-determinant, gains may be a million times smaller than the numbers that they are left of."""
    for seed in range(30):
        pool = hard_pool(kind, generator(seed))
        options = {"candidates": (None, 8, 40)[seed % 3], "objective": objective, "normalize": False, "start": 0}
        narrow, wide = (
            sk.greedy_select(rows, min(100, len(pool)), generator=generator(seed), backend="cpp", **options)
            for rows in (pool, pool.double())
        )
        assert torch.equal(narrow.indices, wide.indices), f"seed {seed}"
        torch.testing.assert_close(narrow.objective.double(), wide.objective, rtol=1e-5, atol=0)


@pytest.mark.parametrize("candidates", (None, 8))
def test_cpp_logdet_of_tight_clusters_of_unit_rows(candidates: int | None) -> None:
    for seed in range(30):
        pool = hard_pool("clusters", generator(seed))
        reached = [
            sk.greedy_select(
                pool, min(16, len(pool)), candidates=candidates, objective="logdet", start=0, backend=backend,
                generator=generator(seed),
            ).objective
            for backend in ("cpp", "reference")
        ]  # fmt: skip
        torch.testing.assert_close(*reached, rtol=1e-4, atol=1e-6, msg=lambda text, s=seed: f"seed {s}: {text}")
