"""The CUDA kernel of greedy selection, run thread by thread on the host, against the reference."""

from typing import Any

import pytest
import torch
from emulation_helpers import CHIP_LIMIT, chip_select
from test_greedy import hard_pool
from torch import Tensor

from spectral_kernels.ops.greedy import reference


def seeds(pool: Tensor) -> Tensor:
    """Of the pools' keys."""
    return torch.randint(1 << 62, (len(pool),), generator=torch.Generator().manual_seed(pool.shape[1]))


def select(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, k: int,
    objective: str = "effective_rank", normalize: bool = True, **machine: int,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:  # fmt: skip
    """As `chip_select`, in two orders of the threads, which must not show."""
    (ascending, plan), (descending, _) = (
        chip_select(pool, start, draws, valid, seeds(pool), k, objective, normalize, descending=descending, **machine)
        for descending in (False, True)
    )
    for part, again in zip(ascending, descending, strict=True):
        assert torch.equal(part, again)
    return ascending, plan


def check(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, k: int,
    objective: str = "effective_rank", normalize: bool = True, **machine: int,
) -> tuple[Any, ...]:  # fmt: skip
    """Picks what the reference picks; returns the plan."""
    (indices, ranks, objectives), plan = select(pool, start, draws, valid, k, objective, normalize, **machine)
    expected, expected_ranks, expected_objectives = reference.greedy_select(
        pool, start, draws, valid, seeds(pool), k, objective, normalize
    )
    if objective == "logdet":
        # near-ties are decided by rounding: the objective reached is compared
        assert all(len(set(batch)) == len(batch) for batch in indices.tolist())
        torch.testing.assert_close(objectives, expected_objectives, rtol=1e-4, atol=1e-6)
        return plan
    assert indices.tolist() == expected.tolist()
    tolerance = 1e-12 if ranks.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ranks, expected_ranks, rtol=tolerance, atol=0)
    torch.testing.assert_close(objectives, expected_objectives, rtol=tolerance, atol=0)
    return plan


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, k: int, candidates: int | None, masked: bool = False
) -> tuple[Any, ...]:
    """pool, start, draws, valid, k of the op."""
    b, n, _ = shape
    pool = torch.randn(shape, dtype=torch.float64).to(dtype)
    start = torch.randint(n, (b, 3))
    draws = None if candidates is None else torch.randint(n, (b, k, candidates))
    valid = None
    if masked:
        valid = torch.rand(b, n) < 0.8
        valid[:, :k] = True
    return pool, start, draws, valid, k


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("candidates", (None, 4, 50))
@pytest.mark.parametrize(
    "normalize, shape, dtype",
    (
        (True, (1, 123, 5), torch.float32),
        (False, (2, 100, 33), torch.float64),
        (False, (1, 130, 129), torch.float32),
        (True, (1, 140, 6), torch.float64),
    ),
)
def test_it_picks_what_the_reference_picks(
    objective: str, candidates: int | None, normalize: bool, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    arguments = inputs(shape, dtype, 12, candidates, masked=True)
    multiprocessors = 4 * shape[0]
    _, members, by_draw, _ = check(*arguments, objective, normalize, multiprocessors=multiprocessors)
    assert members > 1
    assert by_draw == (candidates == 4)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("multiprocessors", (1, 3))
@pytest.mark.parametrize("n", (1, 5, 17, 40))
def test_it_takes_all_of_a_small_pool(n: int, multiprocessors: int, objective: str) -> None:
    """Of more than one row with zero rows at the end."""
    arguments = list(inputs((1, n, 3), torch.float32, n, None))
    arguments[0][:, n // 2 + 1 :] = 0
    arguments[0][:, -1] = 0 if n > 1 else 1
    check(*arguments, objective, multiprocessors=multiprocessors)


@pytest.mark.parametrize("members", (1, 2, 4))
def test_near_ties_of_rows_in_different_ctas(members: int) -> None:
    """Scores a third of the tolerance apart: the lowest row of each CTA's own best may not tie with the best of all."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        steps = 0.3e-6 * torch.randint(8, (128,), generator=generator, dtype=torch.float64)
        angle = torch.asin((0.5 * (1 + steps)).sqrt())
        pool = torch.zeros(1, 128, 128, dtype=torch.float64)
        rest = torch.arange(1, 128)
        pool[0, rest, 0] = angle.sin()[rest]
        pool[0, rest, rest] = angle.cos()[rest]
        pool[0, 0, 0] = 1
        check(pool, torch.tensor([[0]]), None, None, 30, multiprocessors=members)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("candidates", (4, 40))
def test_exhausted_draws(candidates: int, objective: str) -> None:
    pool, start, _, valid, k = inputs((1, 100, 8), torch.float32, 9, candidates, masked=True)
    pool[0, ::2] = 0
    draws = start[:, :1, None].expand(1, k, candidates).contiguous()
    check(pool, start, draws, valid, k, objective)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("candidates", (None, 3))
def test_rows_that_shared_memory_does_not_hold(candidates: int | None, dtype: torch.dtype, objective: str) -> None:
    arguments = inputs((1, 150, 20), dtype, 20, candidates)
    *_, whole = check(*arguments, objective)
    for limit in range(0, CHIP_LIMIT, 512):
        try:
            *_, kept = check(*arguments, objective, limit=limit)
        except RuntimeError:
            continue
        if 0 < kept < whole:
            return
    pytest.fail("no limit splits the rows")


@pytest.mark.parametrize("multiprocessors", (1, 2, 5, 7))
def test_more_pools_than_fit_at_a_time(multiprocessors: int) -> None:
    arguments = inputs((5, 70, 6), torch.float32, 8, None, masked=True)
    groups, *_ = check(*arguments, multiprocessors=multiprocessors)
    assert groups == min(5, multiprocessors)
    check(*arguments, "logdet", multiprocessors=multiprocessors)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("kind", ("norms", "duplicates", "low rank", "clusters"))
def test_rows_that_differ_little_or_much(kind: str, objective: str) -> None:
    for seed in range(6):
        pool = hard_pool(kind, torch.Generator().manual_seed(seed))[None]
        n = pool.shape[1]
        candidates = (None, 8, 40)[seed % 3]
        k = min(12, n)
        draws = None if candidates is None else torch.randint(n, (1, k, candidates))
        check(pool, torch.zeros(1, 1, dtype=torch.int64), draws, None, k, objective, seed % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("candidates", (None, 64))
@pytest.mark.parametrize("scale", (1e-4, 1.0, 1e4))
def test_larger_pools(scale: float, candidates: int | None, normalize: bool, objective: str) -> None:
    pool, *rest = inputs((1, 1500, 128), torch.float32, 20, candidates, masked=True)
    check(scale * pool, *rest, objective, normalize, multiprocessors=9)
