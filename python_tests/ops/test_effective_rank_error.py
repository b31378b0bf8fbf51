"""The jackknife error of the order-2 effective rank."""

import pytest
import torch

import spectral_kernels as sk


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("center", (False, True))
@pytest.mark.parametrize("shape", ((6, 3), (2, 9, 20), (33, 5)))
def test_is_what_leaving_out_gives(
    shape: tuple[int, ...], center: bool, normalize: bool, unbiased: bool, dtype: torch.dtype
) -> None:
    z = (torch.randn(shape, dtype=torch.float64) + 0.2).to(dtype)
    n = shape[-2]
    keep = [[j for j in range(n) if j != i] for i in range(n)]
    options = {"center": center, "normalize": normalize, "unbiased": unbiased}
    ranks = torch.stack([sk.effective_rank(z[..., rows, :].double(), order=2, **options) for rows in keep], -1)
    expected = ((n - 1) * ranks.var(-1, correction=0)).sqrt()
    found = sk.effective_rank_error(z, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-7 if dtype == torch.float64 else 1e-5, atol=1e-9)


@pytest.mark.parametrize("unbiased", (False, True))
def test_is_the_scatter_or_a_little_more(unbiased: bool) -> None:
    z = torch.randn(400, 64, 16) * torch.arange(1, 17) ** -0.5
    seen = float(sk.effective_rank(z, order=2, unbiased=unbiased).std())
    assert 0.9 * seen < float(sk.effective_rank_error(z, unbiased=unbiased).mean()) < 1.4 * seen


def test_degenerate_batches() -> None:
    assert sk.effective_rank_error(torch.ones(5, 3)) == 0
    assert sk.effective_rank_error(torch.ones(5, 3), center=True) == 0
    assert sk.effective_rank_error(torch.zeros(5, 3)) == 0
    assert sk.effective_rank_error(torch.eye(5), unbiased=True) == torch.inf


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="z must have at least 5 rows with center=True, unbiased=True, got 4"):
        sk.effective_rank_error(torch.randn(4, 3), center=True, unbiased=True)
    bad = torch.randn(6, 3)
    bad[4, 0] = torch.nan
    with pytest.raises(ValueError, match="z row 4 holds NaN or Inf"):
        sk.effective_rank_error(bad)
