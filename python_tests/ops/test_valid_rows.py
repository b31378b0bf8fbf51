"""Counting and finding the rows that a mask leaves."""

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.ops._selection import ValidRows


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 123, 1000])
@pytest.mark.parametrize("share", [0.02, 0.6, 1.0])
def test_rows_are_those_of_nonzero(n: int, share: float) -> None:
    mask = torch.rand(3, n, generator=torch.Generator().manual_seed(n)) < share
    mask[:, -1] = True
    rows = ValidRows(mask)
    assert torch.equal(rows.count[:, 0], mask.sum(-1))
    least = int(rows.count.min())
    found = rows.row(torch.arange(least).expand(3, least))
    for batch in range(3):
        assert torch.equal(found[batch], mask[batch].nonzero()[:least, 0])
    strided = mask.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(ValidRows(strided).row(torch.zeros(3, 1, dtype=torch.int64)), found[:, :1])


def test_draws_are_uniform_over_the_valid_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, valid = torch.randn(40, 4, generator=generator), torch.arange(40) % 4 == 1
    first = torch.cat([sk.greedy_select(pool, 1, valid=valid, generator=generator).indices for _ in range(600)])
    counts = torch.bincount(first, minlength=40)
    assert bool((counts[~valid] == 0).all())
    assert bool((counts[valid] > 30).all()) and bool((counts[valid] < 100).all())  # 60 each
