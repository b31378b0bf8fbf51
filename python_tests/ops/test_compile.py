"""What torch.compile, torch.export and autocast make of the ops; no_grad; what the dispatcher sees of them."""

from collections.abc import Callable

import pytest
import torch
from modes import Watched
from test_derivatives import FUNCTIONS
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import spectral_kernels as sk

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    **FUNCTIONS,
    "effective_rank inf": lambda z: sk.effective_rank(z, order=float("inf"), spectrum="singular"),
    "info_nce queue": lambda z: sk.info_nce(z, z.roll(1, 0), queue=z[:2], reduction="none"),
    "info_nce mask": lambda z: sk.info_nce(
        z, z.roll(1, 0), mask=z[:, :1] > z[:, 0], symmetric=True, temperature=z[0, 0].abs() + 0.1
    ),
    "info_nce groups": lambda z: sk.info_nce(z, torch.cat([z.roll(1, 0), z]), groups=(z[:, 0] > 0).long()),
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
        weight = torch.randn_like(expected)
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


OF_A_NUMBER: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "nt_xent": lambda a, b, x: sk.nt_xent(a, b, temperature=x),
    "info_nce": lambda a, b, x: sk.info_nce(a, b, queue=b, temperature=x),
    "info_nce_grad_norms": lambda a, b, x: sk.info_nce_grad_norms(a, b, temperature=x),
    "whiten": lambda a, b, x: sk.whiten(a, shrinkage=x),
    "whiten, n < d": lambda a, b, x: sk.whiten(a[:6], shrinkage=x),
    "whiten by zca, n < d": lambda a, b, x: sk.whiten(a[:6], shrinkage=x, method="zca"),
}


@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_one_graph_for_many_numbers(name: str) -> None:
    function = OF_A_NUMBER[name]
    a, b = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True)
    for value in [0.1 + 0.01 * i for i in range(14)]:
        got, expected = compiled(a, b, value), function(a, b, value)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        if expected.requires_grad:
            torch.testing.assert_close(
                *(torch.autograd.grad(result.sum(), a)[0] for result in (got, expected)), rtol=1e-4, atol=1e-5
            )
    # Dynamo's first graph is of the very number that it meets
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("method", ("cholesky", "zca", "newton_schulz"))
def test_whitening_in_eval_mode(method: str) -> None:
    layer, z = sk.Whitening(16, method=method), torch.randn(64, 16)
    layer(3 * z + 1)
    layer.eval()
    exported = torch.export.export(layer, (z,)).module()
    torch.testing.assert_close(exported(z), layer(z))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(z), layer(z))


@pytest.mark.parametrize("n", (64, 8))
def test_whitening_in_training_mode_compiles(n: int) -> None:
    layer, compiled, z = sk.Whitening(16), sk.Whitening(16), torch.randn(n, 16)
    torch.testing.assert_close(torch.compile(compiled, fullgraph=True)(z), layer(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.running_covariance, layer.running_covariance, rtol=1e-4, atol=1e-5)


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


def test_autocast_promotes() -> None:
    z0, z1, queue = torch.randn(16, 8), torch.randn(16, 8), torch.randn(32, 8)
    half = z0.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in (
            (sk.info_nce(half, z1, queue=queue), sk.info_nce(half.float(), z1, queue=queue)),
            (
                sk.info_nce(half, half, queue=queue.double()),
                sk.info_nce(half.double(), half.double(), queue=queue.double()),
            ),
            (sk.nt_xent(z1, half), sk.nt_xent(z1, half.float())),
            (sk.nt_xent(half, z1.half()), sk.nt_xent(half.float(), z1.half().float())),
            (sk.info_nce_grad_norms(half, z1), sk.info_nce_grad_norms(half.float(), z1)),
            (sk.gradient_band(half, z1).upper, sk.gradient_band(half.float(), z1).upper),
        ):
            torch.testing.assert_close(got, expected)
    for call in (lambda: sk.info_nce(half, z1), lambda: sk.nt_xent(z1, half), lambda: sk.info_nce(z0, z1, queue=half)):
        with pytest.raises(ValueError, match=r"bfloat16, but|is torch.float32, but"):
            call()


def test_autocast_of_a_compiled_loss() -> None:
    linear, z, queue = torch.nn.Linear(8, 8), torch.randn(16, 8), torch.randn(32, 8)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = linear(x)
            return sk.info_nce(h, h, queue=queue)

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(z), loss(z), rtol=1e-2, atol=1e-2)


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
    seen: list[str] = []
    z = torch.randn(16, 4)
    with Watched(lambda function, _: seen.append(str(function))):
        inside = sk.covariance(z, backend=backend)
    assert "spectral_kernels.covariance.default" in seen
    assert torch.equal(inside, sk.covariance(z, backend=backend))
    with FakeTensorMode() as mode:
        assert sk.covariance(mode.from_tensor(z), backend=backend).shape == (4, 4)
