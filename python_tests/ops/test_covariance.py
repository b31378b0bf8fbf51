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
            for correction in [c for c in (0, 1, 5) if c < shape[-2]]:
                found = sk.covariance(z, center=center, normalize=unit, correction=correction, backend=backend)
                expected = by_definition(normalize(z, dim=-1) if unit else z, center, correction)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
