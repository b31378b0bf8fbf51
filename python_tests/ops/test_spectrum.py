"""spectrum in C++: matrices on which a tridiagonal iteration splits, stalls or underflows."""

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk


def rows_of(moment: Tensor) -> Tensor:
    """d rows whose second moment is the given matrix, up to a factor of d."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp_min(0).sqrt().unsqueeze(1) * vectors.mT


def make(kind: str, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(d)
    if kind == "path":  # tridiagonal as it comes
        beside = torch.diag(torch.ones(d - 1).double(), 1)
        return 2 * torch.eye(d).double() + beside + beside.mT
    if kind == "blocks":
        blocks = [torch.randn(2, 2, dtype=torch.float64, generator=generator) for _ in range((d + 1) // 2)]
        x = torch.block_diag(*blocks)[:d, :d]
        return x.mT @ x
    if kind == "equal":
        return torch.eye(d).double()
    if kind == "graded":  # twelve orders of magnitude
        x = torch.randn(2 * d, d, dtype=torch.float64, generator=generator) * torch.logspace(0, -6, d).double()
        return x.mT @ x
    if kind == "small integers":
        x = torch.randint(-1, 2, (d + 3, d), generator=generator).double()
        return x.mT @ x
    x = torch.randn(max(1, d // 3), d, dtype=torch.float64, generator=generator)  # low rank
    return x.mT @ x


@pytest.mark.parametrize("kind", ["path", "blocks", "equal", "graded", "small integers", "low rank"])
def test_eigenvalues_are_lapack_s(kind: str) -> None:
    for d in (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 129):
        moment = make(kind, d)
        x = rows_of((moment + moment.mT) / 2)
        # 19 copies, at different scales: more than the lanes of a vector, and none in step with the others
        scales = 1.7 ** torch.arange(-9, 10).double()
        batch = x * scales[:, None, None]
        got = sk.spectrum(batch, normalize=False, backend="cpp")
        expected = torch.linalg.eigvalsh(x.mT @ x / d).flip(-1).clamp_min(0) * scales.square()[:, None]
        error = (got - expected).abs().amax(-1) / expected[:, 0]
        assert float(error.max()) <= 4e-15 * d**0.5, (kind, d)
