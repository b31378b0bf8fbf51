"""The CUDA kernel of greedy selection, run thread by thread on the host, against the reference."""

from types import ModuleType
from typing import Any

import pytest
import torch
from emulation_helpers import CHIP_LIMIT, load_emulation
from test_greedy import hard_pool
from torch import Tensor

from spectral_kernels.ops.greedy import reference


@pytest.fixture(scope="module")
def emulation() -> ModuleType:
    return load_emulation()


def seeds(pool: Tensor) -> Tensor:
    """Of the pools' keys."""
    return torch.randint(1 << 62, (len(pool),), generator=torch.Generator().manual_seed(pool.shape[1]))


def select(
    emulation: ModuleType, pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, k: int,
    objective: str = "effective_rank", normalize: bool = True, *, multiprocessors: int = 3, limit: int = CHIP_LIMIT,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:  # fmt: skip
    """Indices, ranks and objectives, and the plan: pools at a time, CTAs of each, whether by draw, rows kept.

    In two orders of the threads, which must not show.
    """

    def call(descending: bool) -> tuple[Any, ...]:
        found = emulation.greedy_select(
            pool.numpy(), start.numpy(), None if draws is None else draws.numpy(),
            None if valid is None else valid.numpy(), seeds(pool).numpy(), k, objective == "logdet", normalize,
            multiprocessors, limit, descending,
        )  # fmt: skip
        return tuple(torch.from_numpy(part) for part in found[:3]), found[3]

    (ascending, plan), (descending, _) = call(False), call(True)
    for part, again in zip(ascending, descending, strict=True):
        assert torch.equal(part, again)
    return ascending, plan


def check(
    emulation: ModuleType, pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, k: int,
    objective: str = "effective_rank", normalize: bool = True, **machine: int,
) -> tuple[Any, ...]:  # fmt: skip
    """Picks what the reference picks; returns the plan."""
    (indices, ranks, objectives), plan = select(
        emulation, pool, start, draws, valid, k, objective, normalize, **machine
    )  # fmt: skip
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
    emulation: ModuleType, objective: str, candidates: int | None, normalize: bool, shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    arguments = inputs(shape, dtype, 12, candidates, masked=True)
    multiprocessors = 4 * shape[0]
    _, members, by_draw, _ = check(emulation, *arguments, objective, normalize, multiprocessors=multiprocessors)
    assert members > 1
    assert by_draw == (candidates == 4)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("multiprocessors", (1, 3))
@pytest.mark.parametrize("n", (1, 5, 17, 40))
def test_it_takes_all_of_a_small_pool(emulation: ModuleType, n: int, multiprocessors: int, objective: str) -> None:
    """Of more than one row with zero rows at the end."""
    arguments = list(inputs((1, n, 3), torch.float32, n, None))
    arguments[0][:, n // 2 + 1 :] = 0
    arguments[0][:, -1] = 0 if n > 1 else 1
    check(emulation, *arguments, objective, multiprocessors=multiprocessors)


@pytest.mark.parametrize("candidates", (None, 6, 60))
@pytest.mark.parametrize("normalize", (True, False))
def test_ties_go_to_the_first_draw_or_the_lowest_key(
    emulation: ModuleType, normalize: bool, candidates: int | None
) -> None:
    rows = torch.randn(25, 4)
    pool = torch.cat([rows, 3 * rows if normalize else rows, rows, 0.1 * rows if normalize else rows])[None]
    _, start, draws, *_ = inputs((1, 100, 4), torch.float32, 24, candidates)
    check(emulation, pool, start, draws, None, 24, "effective_rank", normalize, multiprocessors=4)


@pytest.mark.parametrize("members", (1, 2, 4))
def test_near_ties_of_rows_in_different_ctas(emulation: ModuleType, members: int) -> None:
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
        check(emulation, pool, torch.tensor([[0]]), None, None, 30, multiprocessors=members)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("candidates", (4, 40))
def test_exhausted_draws(emulation: ModuleType, candidates: int, objective: str) -> None:
    pool, start, _, valid, k = inputs((1, 100, 8), torch.float32, 9, candidates, masked=True)
    pool[0, ::2] = 0
    draws = start[:, :1, None].expand(1, k, candidates).contiguous()
    check(emulation, pool, start, draws, valid, k, objective)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("candidates", (None, 3))
def test_rows_that_shared_memory_does_not_hold(
    emulation: ModuleType, candidates: int | None, dtype: torch.dtype, objective: str
) -> None:
    arguments = inputs((1, 150, 20), dtype, 20, candidates)
    *_, whole = check(emulation, *arguments, objective)
    for limit in range(0, CHIP_LIMIT, 512):
        try:
            *_, kept = check(emulation, *arguments, objective, limit=limit)
        except RuntimeError:
            continue
        if 0 < kept < whole:
            return
    pytest.fail("no limit splits the rows")


@pytest.mark.parametrize("multiprocessors", (1, 2, 5, 7))
def test_more_pools_than_fit_at_a_time(emulation: ModuleType, multiprocessors: int) -> None:
    arguments = inputs((5, 70, 6), torch.float32, 8, None, masked=True)
    groups, *_ = check(emulation, *arguments, multiprocessors=multiprocessors)
    assert groups == min(5, multiprocessors)
    check(emulation, *arguments, "logdet", multiprocessors=multiprocessors)


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("candidates", (None, 3, 40))
def test_fewer_rows_than_picks(emulation: ModuleType, candidates: int | None, objective: str) -> None:
    """What no row is left for is -1, with the rank and the objective of the picks before."""
    pool, start, draws, _, k = inputs((2, 70, 6), torch.float32, 30, candidates)
    valid = torch.zeros(2, 70, dtype=torch.bool)
    valid[0, ::9] = True
    (indices, ranks, objectives), _ = select(emulation, pool, start, draws, valid, k, objective)
    count = int(valid[0].sum())
    assert sorted(indices[0, :count].tolist()) == valid[0].nonzero()[:, 0].tolist()
    assert (indices[0, count:] == -1).all()
    assert (indices[1] == -1).all()
    assert (ranks[0, count:] == ranks[0, count - 1]).all() and (objectives[0, count:] == objectives[0, count - 1]).all()
    assert (ranks[1] == 0).all() and (objectives[1] == 0).all()


@pytest.mark.parametrize("candidates", (3, 40))
def test_rows_out_of_range_are_passed_over(emulation: ModuleType, candidates: int) -> None:
    pool, start, draws, valid, k = inputs((1, 100, 6), torch.float32, 10, candidates, masked=True)
    expected, _ = select(emulation, pool, start, draws, valid, k)
    huge = torch.tensor([-1, 100, -(2**62), 2**62])
    worse = torch.cat([draws, huge.expand(1, k, 4)], -1)
    found, _ = select(emulation, pool, torch.cat([huge[None], start], -1), worse.contiguous(), valid, k)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("kind", ("norms", "duplicates", "low rank", "clusters"))
def test_rows_that_differ_little_or_much(emulation: ModuleType, kind: str, objective: str) -> None:
    for seed in range(6):
        pool = hard_pool(kind, torch.Generator().manual_seed(seed))[None]
        n = pool.shape[1]
        candidates = (None, 8, 40)[seed % 3]
        k = min(12, n)
        draws = None if candidates is None else torch.randint(n, (1, k, candidates))
        check(emulation, pool, torch.zeros(1, 1, dtype=torch.int64), draws, None, k, objective, seed % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("scale", (1e-4, 1.0, 1e4))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("candidates", (None, 64))
def test_larger_pools(
    emulation: ModuleType, candidates: int | None, normalize: bool, scale: float, objective: str
) -> None:
    pool, *rest = inputs((1, 1500, 128), torch.float32, 20, candidates, masked=True)
    check(emulation, scale * pool, *rest, objective, normalize, multiprocessors=9)
