"""Effective rank and spectrum: known values, the unbiased form, gradients of every order; the jackknife error of order 2."""

import math

import pytest
import torch

import spectral_kernels as sk

ORDERS = (0, 0.5, 1, 2, 3, math.inf)


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
def test_closed_forms(backend: str) -> None:
    values = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0], dtype=torch.float64)
    basis, turn = (torch.linalg.qr(torch.randn(n, 5, dtype=torch.float64)).Q for n in (64, 5))
    z = basis * (64 * values).sqrt() @ turn  # whose second moment has exactly these eigenvalues
    p = values[:4]
    expected = {
        0: 4.0,
        0.5: float(p.sqrt().sum() ** 2),
        1: math.exp(-float((p * p.log()).sum())),
        2: 1 / float((p * p).sum()),
        3: float((p**3).sum()) ** -0.5,
        math.inf: 2.0,
    }
    for order, rank in expected.items():
        got = sk.effective_rank(z, order=order, normalize=False, backend=backend)
        assert float(got) == pytest.approx(rank, rel=1e-6)
    rankme = p.sqrt() / p.sqrt().sum()
    got = sk.effective_rank(z, normalize=False, spectrum="singular", backend=backend)
    assert float(got) == pytest.approx(math.exp(-float((rankme * rankme.log()).sum())), rel=1e-6)
    got_values = sk.spectrum(z, normalize=False, backend=backend)
    torch.testing.assert_close(got_values, values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_without_spread_has_rank_0(order: float, backend: str) -> None:
    same = torch.randn(1, 7).expand(9, 7)
    wide = torch.randn(1, 17).expand(9, 17)
    for z in (same, wide, same.double() / 3):
        z = z.clone().requires_grad_()
        rank = sk.effective_rank(z, order=order, center=True, backend=backend)
        assert rank.item() == 0
        if order > 0:
            rank.backward()
            assert torch.equal(z.grad, torch.zeros_like(z))
        assert sk.effective_rank(z, order=order, backend=backend).item() == pytest.approx(1.0, rel=1e-5)
    assert sk.effective_rank(torch.zeros(4, 3), order=order, backend=backend).item() == 0


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("center", (False, True))
@pytest.mark.parametrize("spectrum", ("covariance", "singular"))
@pytest.mark.parametrize("shape", ((2, 7, 5), (2, 3, 5)), ids=("tall", "wide"))
def test_gradient(order: float, center: bool, spectrum: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def rank(rows: torch.Tensor) -> torch.Tensor:
        return sk.effective_rank(rows, order=order, center=center, spectrum=spectrum)

    assert torch.autograd.gradcheck(rank, z)


def test_gradient_over_batches_of_a_pool() -> None:
    indices = torch.tensor([[0, 1, 2, 3], [3, 3, 5, 6]])
    pool = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: sk.batch_effective_rank(rows, indices, order=1, center=True), pool)


@pytest.mark.parametrize("order", (1, 2, math.inf))
@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
def test_batches_of_a_pool_are_the_batches(order: float, backend: str) -> None:
    pool = torch.randn(50, 12)
    indices = torch.randint(50, (5, 20))
    got = sk.batch_effective_rank(pool, indices, order=order, backend=backend)
    torch.testing.assert_close(got, sk.effective_rank(pool[indices], order=order), rtol=1e-5, atol=0)


@pytest.mark.parametrize("center", (False, True))
def test_unbiased_does_not_depend_on_batch_size(center: bool) -> None:
    """Mean of the estimate of tr M² over many small batches, against the population's."""
    scale = torch.arange(1, 7, dtype=torch.float64) ** -0.5
    z = torch.randn(40_000, 8, 6, dtype=torch.float64) * scale + (3.0 if center else 0.0)
    rank = sk.effective_rank(z, order=2, center=center, normalize=False, unbiased=True)
    # R₂ = T²/E, so T²/R₂ is the estimate E of tr M² in the scale of T
    rows = z - z.mean(1, keepdim=True) if center else z
    trace = rows.square().sum((1, 2)) / (7 if center else 8)
    estimate = (trace.square() / rank).mean()
    plain = (trace.square() / sk.effective_rank(z, order=2, center=center, normalize=False)).mean()
    assert float(estimate) == pytest.approx(float(scale.pow(4).sum()), rel=0.03)
    assert float(plain) > 1.5 * float(scale.pow(4).sum())


def test_unbiased_rank_of_orthogonal_rows_is_infinite() -> None:
    assert sk.effective_rank(torch.eye(4), order=2, unbiased=True).item() == math.inf


def test_collapsed_batch_keeps_its_accuracy() -> None:
    """Nearly singular spectra, where float32 eigenvalues are off by percents or raise."""
    z = torch.randn(512, 20) @ torch.randn(20, 256)
    exact = sk.effective_rank(z.double(), spectrum="singular", backend="reference")
    for backend in ("reference", "cpp"):
        assert sk.effective_rank(z, spectrum="singular", backend=backend).item() == pytest.approx(
            exact.item(), rel=1e-4
        )
    nearly = torch.randn(1, 128) + 1e-7 * torch.randn(256, 128)
    for backend in ("reference", "cpp", "triton"):
        assert sk.effective_rank(nearly, backend=backend).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("center", (False, True))
@pytest.mark.parametrize("shape", ((6, 3), (2, 9, 20), (33, 5)))
def test_error_is_what_leaving_out_gives(
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


def test_error_of_degenerate_batches() -> None:
    assert sk.effective_rank_error(torch.ones(5, 3)) == 0
    assert sk.effective_rank_error(torch.ones(5, 3), center=True) == 0
    assert sk.effective_rank_error(torch.zeros(5, 3)) == 0
    assert sk.effective_rank_error(torch.eye(5), unbiased=True) == torch.inf
