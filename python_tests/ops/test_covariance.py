"""Covariance and second moment: the definition, and torch's own."""

import pytest
import torch
from registry import BACKENDS
from torch import Tensor
from torch.nn.functional import normalize

import spectral_kernels as sk

SHAPES = ((30, 7), (3, 30, 7), (2, 5, 20), (1, 4), (9, 1), (2, 3, 17, 4))


def by_definition(z: Tensor, center: bool, correction: int) -> Tensor:
    """Σ (zᵢ − μ)(zᵢ − μ)ᵀ / (n − correction)."""
    x = z - z.mean(-2, keepdim=True) if center else z
    return torch.einsum("...ni,...nj->...ij", x, x) / (z.shape[-2] - correction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: tuple[int, ...], backend: str) -> None:
    z = torch.randn(shape, dtype=torch.float64) + 0.5
    for center in (True, False):
        for unit in (True, False):
            for correction in range(min(2, shape[-2])):
                found = sk.covariance(z, center=center, normalize=unit, correction=correction, backend=backend)
                expected = by_definition(normalize(z, dim=-1) if unit else z, center, correction)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_cov(backend: str) -> None:
    z = torch.randn(50, 6, dtype=torch.float64)
    for correction in (0, 1, 5):
        found = sk.covariance(z, correction=correction, backend=backend)
        torch.testing.assert_close(found, torch.cov(z.mT, correction=correction), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend: str) -> None:
    z = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 4, dtype=torch.float64)
    for center in (True, False):
        (found,) = torch.autograd.grad((weight * sk.covariance(z, center=center, backend=backend)).sum(), z)
        (expected,) = torch.autograd.grad((weight * by_definition(z, center, 0)).sum(), z)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
