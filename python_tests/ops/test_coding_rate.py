"""Coding rate: the published formula, both sides of the determinant."""

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
    for rows in (z, torch.zeros_like(z), torch.ones_like(z)):
        for eps in (0.05, 0.5, 3.0):
            for unit in (True, False):
                found = sk.coding_rate(rows, eps=eps, normalize=unit, backend=backend)
                expected = published(normalize(rows, dim=-1) if unit else rows, eps)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
