"""torch.compile without a graph break, shapes dynamic; autocast; no_grad."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_kernels as sk

INDICES = torch.tensor([[0, 1, 2], [2, 3, 1]])

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "covariance": lambda z: sk.covariance(z, normalize=True),
    "spectrum": lambda z: sk.spectrum(z),
    "effective_rank": lambda z: sk.effective_rank(z),
    "effective_rank 2": lambda z: sk.effective_rank(z, order=2, center=True),
    "effective_rank unbiased": lambda z: sk.effective_rank(z, order=2, unbiased=True),
    "effective_rank inf": lambda z: sk.effective_rank(z, order=float("inf"), spectrum="singular"),
    "batch_effective_rank": lambda z: sk.batch_effective_rank(z, INDICES),
    "batch_effective_rank 1": lambda z: sk.batch_effective_rank(z, INDICES, order=1.0),
    "whiten": lambda z: sk.whiten(z, shrinkage=0.01),
    "whiten zca": lambda z: sk.whiten(z, shrinkage=0.01, method="zca"),
    "info_nce": lambda z: sk.info_nce(z, z.roll(1, 0)),
    "info_nce queue": lambda z: sk.info_nce(z, z.roll(1, 0), queue=z[:2], reduction="none"),
    "nt_xent": lambda z: sk.nt_xent(z, z.roll(1, 1)),
    "forced": lambda z: _forced(z),
}
SELECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "greedy_select": lambda z: sk.greedy_select(z, 3).indices,
    "greedy_select all": lambda z: sk.greedy_select(z, 3, candidates=None, start=0).effective_rank,
    "greedy_select valid": lambda z: sk.greedy_select(z, 2, valid=z[:, 0] < 99).indices,
    "pool_select": lambda z: sk.pool_select(z, 3, draws=2).indices,
    "pool_select window": lambda z: sk.pool_select(z, 3, draws=2, policy=0.5, window=(1.0, 2.0)).indices,
}


def _forced(z: Tensor) -> Tensor:
    with sk.use_backend("reference"):
        return sk.covariance(z)


@pytest.mark.parametrize("name", CALLS)
def test_differentiable_ops_compile(name: str) -> None:
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n, d in ((7, 5), (9, 4), (6, 11)):
        z = torch.randn(n, d, requires_grad=True)
        expected, got = call(z), compiled(z)
        torch.testing.assert_close(got, expected)
        weight = torch.randn_like(expected) if name != "spectrum" else torch.ones_like(expected)
        by_eager = torch.autograd.grad(expected, z, weight)[0]
        by_graph = torch.autograd.grad(got, z, weight)[0]
        torch.testing.assert_close(by_graph, by_eager)


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_compile(name: str) -> None:
    compiled = torch.compile(SELECTORS[name], fullgraph=True, dynamic=True)
    for n, d in ((7, 5), (9, 4)):
        z = torch.randn(n, d)
        assert compiled(z).isfinite().all()
    if name == "greedy_select all":
        torch.testing.assert_close(compiled(z), SELECTORS[name](z))


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    z = torch.randn(8, 6, requires_grad=True)
    expected = CALLS[name](z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = CALLS[name](z)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        got.sum().backward()
    inside, z.grad = z.grad, None
    expected.sum().backward()
    torch.testing.assert_close(inside, z.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(CALLS[name](z), expected)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_eager_code_goes_around_the_dispatcher(backend: str) -> None:
    """Unless there is something to differentiate."""
    z = torch.randn(16, 4)
    for wanted in (False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sk.covariance(z.requires_grad_(wanted), backend=backend)
        assert ("spectral_kernels::covariance" in {event.key for event in profile.key_averages()}) == wanted


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_dispatch_mode_sees_the_op_that_eager_code_goes_around(backend: str) -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    z = torch.randn(16, 4)
    with Seen() as seen:
        inside = sk.covariance(z, backend=backend)
    assert "spectral_kernels.covariance.default" in seen.names
    assert torch.equal(inside, sk.covariance(z, backend=backend))
    with FakeTensorMode() as mode:
        assert sk.covariance(mode.from_tensor(z), backend=backend).shape == (4, 4)
