"""Of few rows with many features nothing of size d x d is made, forward or backward: the cost is that of the smaller side."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_kernels as sk

N, D = 8, 1024

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"order {order}": lambda z, o=order: sk.effective_rank(z, order=o) for order in (0.5, 1, 2, 3, math.inf)},
    "order 1, centred": lambda z: sk.effective_rank(z, center=True),
    "order 2, unbiased": lambda z: sk.effective_rank(z, order=2, unbiased=True),
    "RankMe": sk.rankme,
    "spectrum": lambda z: sk.spectrum(z).sum(),
    "batches, order 1": lambda z: sk.batch_effective_rank(z, torch.arange(N)[None], order=1).sum(),
    "batches, order 2": lambda z: sk.batch_effective_rank(z, torch.arange(N)[None], order=2).sum(),
    **{m: lambda z, m=m: sk.whiten(z, method=m).sin().sum() for m in ("cholesky", "zca", "newton_schulz")},
}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that torch makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return result


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_d_by_d(name: str, backend: str) -> None:
    z = torch.randn(N, D, requires_grad=True)
    with sk.use_backend(backend), Largest() as largest:
        FUNCTIONS[name](z).backward()
    # rows, and blocks of 128 features of whitening by Cholesky
    assert largest.elements <= max(N * D, 128**2)


@pytest.mark.parametrize("n", (1, 3, 64, 200))
@pytest.mark.parametrize("method", ("cholesky", "zca", "newton_schulz"))
def test_whitening_of_few_rows_is_whitening(method: str, n: int) -> None:
    """Against the definition on d x d matrices."""
    from spectral_kernels.ops.whitening import reference

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


def test_whitening_of_few_rows_refuses_as_of_many() -> None:
    with pytest.raises(ValueError, match=r"shrinkage = 0\.0 leaves the covariance singular"):
        sk.whiten(torch.randn(4, 9), shrinkage=0)
    bad = torch.randn(4, 9)
    bad[2, 3] = math.nan
    with pytest.raises(ValueError, match="z row 2 holds NaN or Inf"):
        sk.whiten(bad)
    assert not sk.whiten(torch.ones(4, 9), shrinkage=0).any()


def test_a_layer_meets_both_sides() -> None:
    layer = sk.Whitening(12, momentum=1.0)
    few = torch.randn(5, 12)
    layer(few)
    torch.testing.assert_close(layer.running_covariance, torch.cov(few.mT, correction=0))
    layer(torch.randn(50, 12))
