"""Coding rate: the published formula, both sides of the determinant, its range."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import spectral_kernels as sk


def published(z: Tensor, eps: float) -> Tensor:
    """Of unit rows, as MCR²'s code has it: ½ log det(I + d/(nε²) ZᵀZ)."""
    n, d = z.shape[-2:]
    return 0.5 * torch.logdet(torch.eye(d, dtype=z.dtype) + d / (n * eps**2) * z.mT @ z)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("shape", [(50, 16), (3, 50, 16), (2, 8, 40), (16, 16), (1, 5), (7, 1), (2, 2, 20, 3)])
def test_published_formula(shape: tuple[int, ...], backend: str) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    for eps in (0.05, 0.5, 3.0):
        found = sk.coding_rate(z, eps=eps, backend=backend)
        torch.testing.assert_close(found, published(normalize(z, dim=-1), eps), rtol=1e-10, atol=1e-12)
        found = sk.coding_rate(z, eps=eps, normalize=False, backend=backend)
        torch.testing.assert_close(found, published(z, eps), rtol=1e-10, atol=1e-12)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)):
        rows = z.to(dtype)
        exact = published(normalize(rows.double(), dim=-1), 0.5)
        found = sk.coding_rate(rows, backend=backend)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=20 * tolerance, atol=1e-6)


def test_range() -> None:
    assert float(sk.coding_rate(torch.zeros(4, 8))) == 0
    white = torch.cat([torch.eye(8)] * 3)
    assert float(sk.coding_rate(white, eps=0.5)) == pytest.approx(4 * math.log(5), rel=1e-6)
    assert float(sk.coding_rate(torch.ones(40, 8), eps=0.5)) == pytest.approx(0.5 * math.log(1 + 8 * 4), rel=1e-6)
    values = torch.stack(
        [sk.coding_rate(torch.randn(300, 8) * torch.arange(1, 9) ** -power) for power in (0.0, 1.0, 2.0)]
    )
    assert bool((values.diff() < 0).all())


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_gradient(backend: str) -> None:
    for shape in ((2, 30, 6), (2, 5, 9)):
        z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(shape[0], dtype=torch.float64)
        (found,) = torch.autograd.grad((weight * sk.coding_rate(z, backend=backend)).sum(), z)
        (exact,) = torch.autograd.grad((weight * published(normalize(z, dim=-1), 0.5)).sum(), z)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    z = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: sk.coding_rate(z, backend=backend), z)


def test_bad_input() -> None:
    for eps in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps must be a finite number above 0"):
            sk.coding_rate(torch.ones(3, 2), eps=eps)
    with pytest.raises(ValueError, match="z row 1 holds NaN or Inf"):
        sk.coding_rate(torch.tensor([[1.0], [math.nan]]))
    for n in (2, 9):
        z = torch.ones(n, 5)
        z[1, 2] = math.inf
        with pytest.raises(ValueError, match="z row 1 holds NaN or Inf"):
            sk.coding_rate(z)
