"""Whitening before the loss, as in training: every method, large and small batches, low temperatures, bf16, duplicates."""

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.ops.whitening import METHODS

D = 32


def rows(kind: str, n: int) -> Tensor:
    """2n projections, the first views first, as an anisotropic encoder makes them."""
    generator = torch.Generator().manual_seed(n)
    spectrum = torch.arange(1, D + 1) ** -1.0
    first = torch.randn(n, D, generator=generator) * spectrum
    if kind == "duplicates":
        first = first[torch.arange(n) % max(1, n // 8)]
    second = first + 0.1 * torch.randn(n, D, generator=generator) * spectrum
    if kind == "collapsed":
        first, second = 1 + 1e-3 * first, 1 + 1e-3 * second
    return torch.cat([first, second])


def step(
    z: Tensor, method: str, temperature: float, backend: str | None = None, amp: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss and gradient at the projections; with amp, projections come out of a bf16 layer."""
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = torch.nn.functional.linear(z, torch.eye(D)) if amp else z
        white = sk.Whitening(D, method=method, backend=backend).to(z.dtype)(out)
        loss = sk.nt_xent(*white.chunk(2), temperature=temperature, backend=backend)
    (gradient,) = torch.autograd.grad(loss.double(), z)
    return loss.detach().double(), gradient.double()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["random", "duplicates", "collapsed"])
@pytest.mark.parametrize("n", [5, 12, 129, 1024])  # 10 and 24 rows are fewer than 32 features
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_steps_are_those_of_float64(method: str, kind: str, n: int, temperature: float) -> None:
    z = rows(kind, n)
    exact_loss, exact = step(z.double(), method, temperature, "reference")
    loss, gradient = step(z, method, temperature)
    plain_loss, plain = step(z, method, temperature, "reference")
    assert bool(gradient.isfinite().all()) and bool(loss.isfinite())
    assert error(gradient, exact) <= 3 * error(plain, exact) + 2e-4
    assert abs(loss - exact_loss) <= 3 * abs(plain_loss - exact_loss) + 2e-5 / temperature


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_8192(method: str) -> None:
    z = rows("duplicates", 8192)
    exact_loss, exact = step(z.double(), method, 0.01, "reference")
    loss, gradient = step(z, method, 0.01)
    assert error(gradient, exact) <= 2e-3
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["random", "duplicates", "collapsed"])
@pytest.mark.parametrize("n", [12, 256])
def test_under_bf16_autocast(method: str, kind: str, n: int) -> None:
    """What is given is bf16, so that the gradient is compared with float64's of the same rounded rows."""
    z = rows(kind, n)
    loss, gradient = step(z, method, 0.1, amp=True)
    assert bool(gradient.isfinite().all()) and bool(loss.isfinite())
    if kind == "random":
        exact_loss, exact = step(z.bfloat16().double(), method, 0.1, "reference")
        assert error(gradient, exact) < 0.05
        assert float(loss) == pytest.approx(float(exact_loss), rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_one_row_over_and_over(method: str) -> None:
    """No spread at all: the loss is that of unrelated rows, and no gradient is NaN."""
    z = torch.ones(64, D)
    loss, gradient = step(z, method, 0.01)
    assert bool(gradient.isfinite().all()) and bool(loss.isfinite())


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("center", (False, True))
def test_gradient_of_few_rows_in_half_precision(n: int, center: bool) -> None:
    """Most of it cancels: what is left must not be the rounding of the result."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(n, 16, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(n, 16, generator=generator)
    (found,) = torch.autograd.grad(sk.whiten(z, shrinkage=0.01, center=center), z, grad.bfloat16())
    exact = z.detach().double().requires_grad_()
    white = sk.whiten(exact, shrinkage=0.01, center=center, backend="reference")
    (expected,) = torch.autograd.grad(white, exact, grad.bfloat16().double())
    assert float((found.double() - expected).abs().max()) <= 0.01 * float(expected.abs().max()) + 1e-6


@pytest.mark.parametrize("method", ("cholesky", "zca", "newton_schulz"))
def test_a_result_that_the_gradient_needs_may_not_be_written_over(method: str) -> None:
    z = torch.randn(64, 5, requires_grad=True)
    y = sk.whiten(z, method=method, backend="cpp")
    with torch.no_grad():
        y.mul_(2)
    if method != "cholesky":
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
