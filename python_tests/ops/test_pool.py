"""Pool selector: the definition, its policies and windows."""

import pytest
import torch
from registry import BACKENDS, generator
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.ops.pool import best_draw


def by_definition(pool: Tensor, draws: Tensor) -> Tensor:
    """R₂ of each draw of rows, from its eigenvalues."""
    x = torch.nn.functional.normalize(pool[draws], dim=-1)
    values = torch.linalg.eigvalsh(x.mT @ x)
    return values.sum(-1).square() / values.square().sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "d", "size", "count"), [(40, 5, 8, 7), (23, 12, 3, 1), (9, 1, 9, 4), (60, 33, 20, 16)]
)
def test_definition(rows: int, d: int, size: int, count: int, backend: str) -> None:
    pool = torch.randn(rows, d, dtype=torch.float64)
    draws = torch.stack([torch.randperm(rows)[:size] for _ in range(count)])
    ranks = by_definition(pool, draws)
    order = ranks.argsort()
    middle = float(ranks.mean())
    # some are inside, and none at the edge
    reach = 1.001 * float((ranks - middle).abs().median()) + 1e-6
    around, inside = (middle - reach, middle + reach), [draw for draw in order if abs(ranks[draw] - middle) <= reach]
    for policy, window, expected in (
        ("low", None, order[0]),
        ("balanced", None, order[round(0.5 * (count - 1))]),
        ("high", None, order[-1]),
        (0.75, None, order[round(0.75 * (count - 1))]),
        ("balanced", around, (ranks - middle).abs().argmin()),
        ("low", around, inside[0]),
        ("high", around, inside[-1]),
        # of none inside, the nearest
        ("low", (99, 99), order[-1]),
    ):
        chosen = best_draw(pool, draws, policy=policy, window=window, order=2.0, backend=backend)
        torch.testing.assert_close(chosen.effective_rank, ranks, rtol=1e-9, atol=0)
        torch.testing.assert_close(ranks[(draws == chosen.indices).all(1)][0], ranks[expected], rtol=1e-9, atol=0)


def test_draws_are_rows_without_repetition() -> None:
    pool = torch.eye(12)
    assert sk.pool_select(pool, 12, draws=3).indices.unique().numel() == 12
    # of one row each, every draw has another until all have been drawn
    ranks = sk.pool_select(torch.cat([torch.zeros(1, 4), torch.ones(11, 4)]), 1, draws=12).effective_rank
    assert int((ranks == 0).sum()) == 1


def test_the_pick_is_one_of_the_draws_that_the_generator_gives() -> None:
    pool = torch.randn(400, 16)
    pool[200:] *= torch.tensor([1.0] + [0.1] * 15)
    picks = {
        policy: sk.pool_select(pool, 32, draws=9, policy=policy, generator=generator())
        for policy in ("low", "balanced", "high", 0.25)
    }
    ranks = picks["low"].effective_rank
    assert ranks.shape == (9,) and all(torch.equal(pick.effective_rank, ranks) for pick in picks.values())
    for policy, quantile in (("low", 0.0), ("balanced", 0.5), ("high", 1.0), (0.25, 0.25)):
        indices = picks[policy].indices
        assert indices.shape == (32,) and indices.unique().numel() == 32
        expected = ranks.sort().values[round(8 * quantile)]
        assert sk.effective_rank(pool[indices], order=2).item() == pytest.approx(expected.item(), rel=1e-5)
