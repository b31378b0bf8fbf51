"""Numbers that other packages' tests and READMEs state, or that follow by hand from the situations in them."""

import math

import pytest
import torch

import spectral_kernels as sk


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("n", [2, 8, 16])
def test_losses_of_one_direction(n: int, backend: str) -> None:
    """lightly's correlated embeddings: all logits are equal, so the loss is the logarithm of their number."""
    first, second = torch.rand(n, 1) + 0.1, torch.rand(n, 1) + 0.1
    first, second = torch.cat([first, 2 * first], 1), torch.cat([second, 2 * second], 1)
    for temperature in (0.1, 1.0, 7.0):
        loss = sk.nt_xent(first, second, temperature=temperature, backend=backend)
        assert float(loss) == pytest.approx(math.log(2 * n - 1), abs=1e-5)
        for size in (1, 2, 15, 17):
            queue = torch.tensor([[1.0, 2.0]]).expand(size, 2)
            loss = sk.info_nce(first, second, queue=queue, temperature=temperature, backend=backend)
            assert float(loss) == pytest.approx(math.log(size + 1), abs=1e-5)


def rows_of(kernel: torch.Tensor) -> torch.Tensor:
    """Unit rows whose similarities are a kernel's."""
    values, vectors = torch.linalg.eigh(kernel.double())
    return vectors * values.clamp(min=0).sqrt()


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_vendi_scores(backend: str) -> None:
    """Those of vendi-score's README."""
    samples = torch.tensor([0.0, 0, 10, 10, 20, 20], dtype=torch.float64)
    similar = rows_of((-(samples[:, None] - samples).abs()).exp())
    given = rows_of(torch.tensor([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]]))
    for rows, score in ((similar, 2.9999), (given, 2.1573)):
        assert float(sk.effective_rank(rows, order=1, backend=backend)) == pytest.approx(score, abs=1e-4)
