"""EffectiveRankWindow: validation, its use as a pair, and calibration against random batches."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import spectral_kernels as sk
from spectral_kernels.selection import EffectiveRankWindow

POOL = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))


@given(st.floats(), st.floats())
@example(0.0, float("inf"))
@example(1.0, 1.0)
def test_accepts_exactly_the_finite_ordered_pairs(lo, hi):
    if 0 <= lo <= hi < float("inf"):
        assert EffectiveRankWindow(lo, hi) == (lo, hi)
    else:
        with pytest.raises(ValueError, match="window must"):
            EffectiveRankWindow(lo, hi)


def test_is_what_the_pool_selector_takes():
    window = EffectiveRankWindow(4.5, 5)
    seed = torch.Generator
    chosen = sk.pool_select(POOL, 16, draws=64, window=window, generator=seed().manual_seed(1))
    again = sk.pool_select(POOL, 16, draws=64, window=(4.5, 5.0), generator=seed().manual_seed(1))
    assert torch.equal(chosen.indices, again.indices)
    assert window.lo <= sk.effective_rank(POOL[chosen.indices], order=2) <= window.hi
    with pytest.raises(ValueError, match="window must be a pair"):
        EffectiveRankWindow("a", 1.0)


def test_shares_of_what_random_batches_have():
    generator = torch.Generator().manual_seed(3)
    window = EffectiveRankWindow.around_random(POOL, 20, 0.5, 1.5, generator=generator)
    ranks = torch.stack([sk.effective_rank(POOL[torch.randperm(200)[:20]], order=2) for _ in range(100)])
    middle = float(ranks.median())
    assert window.lo == pytest.approx(0.5 * middle, rel=0.05)
    assert window.hi == pytest.approx(1.5 * middle, rel=0.05)


def test_calibration_refuses():
    with pytest.raises(ValueError, match="nothing to calibrate"):
        EffectiveRankWindow.around_random(torch.zeros(50, 4), 8, 0.9, 1.1)
    with pytest.raises(ValueError, match=r"window must satisfy 0 <= lo <= hi, got \(1.1, 0.9\)"):
        EffectiveRankWindow.around_random(POOL, 8, 1.1, 0.9)
    with pytest.raises(ValueError, match="batch_size must be between 1 and 200, got 201"):
        EffectiveRankWindow.around_random(POOL, 201, 0.9, 1.1)
