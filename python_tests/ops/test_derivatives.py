"""Derivatives that the kernels do not have: second ones, forward mode, torch.func. All are those of the reference."""

import math
from collections.abc import Callable

import pytest
import torch
from registry import DEVICE
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import spectral_kernels as sk

BACKENDS = ("reference", "cpp") if DEVICE.type == "cpu" else ("reference", "triton")

# scalar functions of rows (7, 4) or, where rows are fewer than features, (4, 7)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "order 2": lambda z: sk.effective_rank(z, order=2),
    "order 2, centred, unbiased": lambda z: sk.effective_rank(z, order=2, center=True, unbiased=True),
    "order 2 of raw rows": lambda z: sk.effective_rank(z, order=2, normalize=False),
    "order 1": lambda z: sk.effective_rank(z),
    "order 3": lambda z: sk.effective_rank(z, order=3),
    "RankMe": lambda z: sk.rankme(z),
    "batches": lambda z: sk.batch_effective_rank(z, torch.tensor([[0, 1, 2, 3], [1, 3, 2, 0]])).sum(),
    "batches, order 1": lambda z: sk.batch_effective_rank(z, torch.tensor([[0, 1, 2, 3]]), order=1).sum(),
    "coding rate": lambda z: sk.coding_rate(z),
    "covariance": lambda z: sk.covariance(z, normalize=True).square().sum(),
    "spectrum": lambda z: sk.spectrum(z).square().sum(),
    "whiten": lambda z: sk.whiten(z, shrinkage=0.1).sin().sum(),
    "whiten by zca": lambda z: sk.whiten(z, shrinkage=0.1, method="zca").sin().sum(),
    "whiten by iteration": lambda z: sk.whiten(z, shrinkage=0.1, method="newton_schulz").sin().sum(),
    "info_nce": lambda z: sk.info_nce(z, z.flip(0), temperature=0.5),
    "info_nce, queue": lambda z: sk.info_nce(z, z.flip(0), queue=z.sin(), temperature=0.5),
    "info_nce, masked": lambda z: sk.info_nce(
        z[:-1],
        z.flip(0),
        mask=torch.eye(len(z), dtype=torch.bool)[1:],
        groups=torch.arange(len(z) - 1) // 2,
        temperature=z[0, 0].square() + 0.5,
    ),
    "info_nce, own negatives": lambda z: sk.info_nce(
        z, z.flip(0), negatives=torch.stack([z.sin(), z.roll(1, 0)], 1), temperature=z[0, 0].square() + 0.5
    ),
    "nt_xent, groups": lambda z: sk.nt_xent(
        z, z.roll(1, 1), groups=torch.arange(len(z)) // 2, temperature=z[0, 0].square() + 0.5
    ),
    "sigmoid_loss": lambda z: sk.sigmoid_loss(z, z.flip(0), temperature=z[0, 0].square() + 0.5, bias=z[0, 1]),
    "nt_xent": lambda z: sk.nt_xent(z, z.roll(1, 0), temperature=0.5),
}


def rows(n: int = 7, d: int = 4) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", ((7, 4), (4, 7)))
def test_second_derivatives(name: str, backend: str, shape: tuple[int, int]) -> None:
    z = rows(*shape).requires_grad_()
    with sk.use_backend(backend):
        assert torch.autograd.gradgradcheck(FUNCTIONS[name], z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_and_transforms(name: str, backend: str) -> None:
    function, z, tangent = FUNCTIONS[name], rows(), rows()
    leaf = z.clone().requires_grad_()
    with sk.use_backend(backend):
        (expected,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(jvp(function, (z,), (tangent,))[1], (expected * tangent).sum())
        torch.testing.assert_close(grad(function)(z), expected)
        torch.testing.assert_close(jacrev(function)(z), expected)
        torch.testing.assert_close(jacfwd(function)(z), expected)
        second = hessian(function)(z)
        torch.testing.assert_close(jacrev(jacrev(function))(z), second, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(second, second.permute(2, 3, 0, 1), rtol=1e-6, atol=1e-9)
        both = torch.stack((z, tangent))
        torch.testing.assert_close(vmap(grad(function))(both)[0], expected)
        torch.testing.assert_close(vmap(function)(both)[0], function(z))


def test_dual_numbers_without_torch_func() -> None:
    z, tangent = rows(), rows()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, tangent)
        found = torch.autograd.forward_ad.unpack_dual(sk.nt_xent(dual, z)).tangent
    torch.testing.assert_close(found, jvp(lambda x: sk.nt_xent(x, z), (z,), (tangent,))[1])


def test_third_derivative_of_a_kernels_result_in_float32() -> None:
    z = rows().requires_grad_()
    single = z.detach().float().requires_grad_()

    def third(x: Tensor) -> Tensor:
        value = sk.effective_rank(x, order=2)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        return gradient

    torch.testing.assert_close(third(single).double(), third(z), rtol=1e-3, atol=1e-3)


def test_norms_have_no_gradient_outside_transforms_and_the_right_one_inside() -> None:
    z, key = rows(), rows()
    assert not sk.info_nce_grad_norms(z.clone().requires_grad_(), key).requires_grad
    step = 1e-6 * torch.ones_like(z)
    numeric = (sk.info_nce_grad_norms(z + step, key) - sk.info_nce_grad_norms(z - step, key)).sum() / 2e-6
    found = jvp(lambda x: sk.info_nce_grad_norms(x, key).sum(), (z,), (torch.ones_like(z),))[1]
    torch.testing.assert_close(found, numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("order", (1.0, 3.0, math.inf))
def test_first_derivatives_where_eigenvalues_repeat(order: float) -> None:
    """Copies and orthonormal rows: through torch.func too the gradient is a number, and the kernel's."""
    z = rows()
    z[3:5] = z[2]
    for batch in (z, torch.eye(4, 7, dtype=torch.float64)):
        leaf = batch.clone().requires_grad_()
        if order == math.inf and batch is not z:
            continue  # the largest of equal eigenvalues has no derivative
        (expected,) = torch.autograd.grad(sk.effective_rank(leaf, order=order), leaf)
        torch.testing.assert_close(
            grad(lambda x: sk.effective_rank(x, order=order))(batch), expected, atol=1e-7, rtol=1e-6
        )


def test_second_derivatives_where_eigenvalues_repeat_are_right_or_refused() -> None:
    z = torch.eye(4, 7, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(sk.effective_rank(z, order=1), z, create_graph=True)
    with pytest.raises(RuntimeError, match="spectrum has no second derivative here"):
        torch.autograd.grad(gradient.sum(), z)
    # order 2 needs no eigenvalues; nor do zeros, as of copies, do harm
    assert torch.autograd.gradgradcheck(lambda x: sk.effective_rank(x, order=2), z)
    copies = rows()
    copies[3:5] = copies[2]
    assert torch.autograd.gradgradcheck(lambda x: sk.effective_rank(x, order=3), copies.requires_grad_())


@pytest.mark.parametrize("method", ("zca", "newton_schulz"))
def test_whitening_differentiates_where_eigenvalues_repeat(method: str) -> None:
    z = rows(5, 9)
    z[1] = z[0]

    def function(x: Tensor) -> Tensor:
        return sk.whiten(x, method=method, shrinkage=0.1)

    assert torch.autograd.gradcheck(function, z.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, z)


def test_compiled_transforms() -> None:
    z = rows()
    function = FUNCTIONS["nt_xent"]
    torch.testing.assert_close(torch.compile(grad(function), fullgraph=True)(z), grad(function)(z))
    compiled = torch.compile(lambda x: jvp(function, (x,), (x,))[1], fullgraph=True)
    torch.testing.assert_close(compiled(z), jvp(function, (z,), (z,))[1])
