"""Distinct rows and derived seeds: what the samplers' randomness rests on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectral_kernels.selection.sharding import derived_generator, distinct_rows


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**63))
def test_rows_are_distinct(n, k, seed):
    k = min(n, k)
    rows = distinct_rows(n, k, derived_generator(seed))
    assert rows.dtype == torch.int64
    assert rows.shape == (k,)
    assert len(set(rows.tolist())) == k
    assert set(rows.tolist()) <= set(range(n))


@pytest.mark.parametrize(("n", "k"), [(12, 4), (40, 4)])
def test_rows_are_uniform(n, k):
    """Every row equally often, and in every place: chi-squared below its mean plus five deviations."""
    generator = derived_generator(1)
    trials = 4000
    places = torch.stack([distinct_rows(n, k, generator) for _ in range(trials)])
    for counts in (torch.bincount(places.flatten(), minlength=n), torch.bincount(places[:, 0], minlength=n)):
        expected = counts.sum() / n
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert chi_squared < n - 1 + 5 * (2 * (n - 1)) ** 0.5


def test_seeds_of_neighbouring_keys_differ():
    keys = [
        (seed, epoch, rank, batch) for seed in range(4) for epoch in range(4) for rank in range(4) for batch in range(4)
    ]
    assert len({derived_generator(*key).initial_seed() for key in [*keys, (0, 1), (1, 0), (0,), (1,)]}) == len(keys) + 4
