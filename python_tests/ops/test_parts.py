"""Sums over many programs (`add_parts`): every level of the tree, and counters that are 0 again."""

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.kernels import sums

TREES = ((1, 1), (2, 3), (8, 9), (9, 12), (64, 73), (65, 77))


@pytest.mark.parametrize("splits, slots", TREES)
def test_size_of_the_tree(splits: int, slots: int) -> None:
    assert sums.part_slots(splits) == slots


@pytest.mark.parametrize("center", (False, True))
@pytest.mark.parametrize("n, d, batches", ((20000, 5, 1), (1500, 16, 3), (1300, 129, 1), (40, 2100, 2)))
def test_ranks_of_many_parts(n: int, d: int, batches: int, center: bool) -> None:
    z = torch.randn(batches, n, d) + 1
    exact = sk.effective_rank(z.double(), order=2, center=center, backend="reference")
    found = sk.effective_rank(z, order=2, center=center, backend="triton")
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("n, d", ((1300, 129), (3000, 200), (9000, 65)))
def test_covariance_of_many_parts(n: int, d: int) -> None:
    z = torch.randn(n, d)
    exact = sk.covariance(z.double(), normalize=True, backend="reference")
    found = sk.covariance(z, normalize=True, backend="triton")
    assert (found - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert torch.equal(found, found.mT)


def test_counters_are_zero_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a stream keeps its counters."""
    kept: dict[int, torch.Tensor] = {}
    for module in ("row_tiles", "tiles"):
        monkeypatch.setattr(
            f"spectral_kernels.kernels.{module}.counters",
            lambda like, count: kept.setdefault(count, torch.zeros(count, dtype=torch.int32)),
        )
    z = torch.randn(1500, 130)
    once = sk.effective_rank(z, order=2, backend="triton"), sk.covariance(z, backend="triton")
    again = sk.effective_rank(z, order=2, backend="triton"), sk.covariance(z, backend="triton")
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert kept and not any(part.any() for part in kept.values())
