"""Of few rows with many features nothing of size d x d is made, forward or backward: the cost is that of the smaller side."""

import math

import pytest
import torch
from modes import Watched
from test_derivatives import FUNCTIONS

import spectral_kernels as sk
from spectral_kernels.ops.whitening import reference

N, D = 8, 1024

# a covariance is d x d
SCALARS = {name: function for name, function in FUNCTIONS.items() if name != "covariance"} | {
    f"{order}, centred": lambda z, o=order: sk.effective_rank(z, order=o, center=True) for order in (0.5, 1, math.inf)
}


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("name", SCALARS)
def test_nothing_is_d_by_d(name: str, backend: str) -> None:
    z = torch.randn(N, D, requires_grad=True)
    elements: list[int] = []
    with sk.use_backend(backend), Watched(lambda _, made: elements.extend(part.numel() for part in made)):
        SCALARS[name](z).backward()
    # rows, and blocks of 128 features of whitening by Cholesky
    assert max(elements) <= max(N * D, 128**2)


@pytest.mark.parametrize("n", (1, 3, 64, 200))
@pytest.mark.parametrize("method", ("cholesky", "zca", "newton_schulz"))
def test_whitening_of_few_rows_is_whitening(method: str, n: int) -> None:
    """Against the definition on d x d matrices."""
    z = torch.randn(2, n, 260, dtype=torch.float64) + 0.5
    z[:, n // 2] = z[:, 0]
    for center in (False, True):
        for shrinkage in (1e-4, 0.1, 1.0):
            leaf = z.clone().requires_grad_()
            y = sk.whiten(leaf, method=method, shrinkage=shrinkage, center=center)
            expected, *kept = reference.whiten(z, method, shrinkage, center)
            torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-8)
            grad = torch.randn_like(z)
            (gradient,) = torch.autograd.grad(y, leaf, grad)
            by_definition = reference.whiten_backward(grad, z, *kept, method, shrinkage, center)
            torch.testing.assert_close(gradient, by_definition, rtol=1e-5, atol=1e-6 * float(by_definition.abs().max()))
