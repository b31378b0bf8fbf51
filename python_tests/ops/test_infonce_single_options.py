"""What each option of the losses promises by itself: own negatives, the sigmoid loss, temperatures, labels, errors, memory."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import spectral_kernels as sk

BACKENDS = ("reference", "cpp", "triton")


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    assert difference <= tolerance * expected.detach().double().abs().max(), difference


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_own_negatives(dtype: torch.dtype, tolerance: float) -> None:
    query, key, negatives = rows(9, 5, dtype=dtype), rows(9, 5, dtype=dtype), rows(9, 4, 5, dtype=dtype)
    temperature = torch.tensor(0.2, requires_grad=True)
    mask = torch.rand(9, 4) < 0.4
    mask[3] = True  # nothing left
    loss = sk.info_nce(query, key, negatives=negatives, mask=mask, temperature=temperature, reduction="none")
    u, v, w = (normalize(x.double(), dim=-1) for x in (query, key, negatives))
    logits = torch.cat([(u * v).sum(1, keepdim=True), (w @ u[:, :, None])[..., 0]], 1) / temperature.double()
    out = torch.cat([torch.zeros(9, 1, dtype=torch.bool), mask], 1)
    exact = cross_entropy(logits.masked_fill(out, -torch.inf), torch.zeros(9, dtype=torch.int64), reduction="none")
    assert loss[3] == 0 and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss, exact, min(tolerance, 1e-6))
    leaves = [query, key, negatives, temperature]
    found, expected = (torch.autograd.grad(x.sum(), leaves) for x in (loss, exact))
    for one, other in zip(found, expected, strict=True):
        close(one, other, max(tolerance, 1e-6))


def dense_sigmoid(query: Tensor, key: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    similarity = normalize(query.double(), dim=1) @ normalize(key.double(), dim=1).mT
    sign = 2 * torch.eye(len(query)) - 1
    return -logsigmoid(sign * (similarity / temperature.double() + bias.double())).sum() / len(query)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("strip", [1, 50, 1 << 22])
def test_sigmoid_loss(strip: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["spectral_kernels.ops.infonce.sigmoid"], "STRIP", strip)
    query, key = rows(13, 6, dtype=dtype), rows(13, 6, dtype=dtype)
    temperature, bias = nn.Parameter(torch.tensor([0.1])), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    leaves = [query, key, temperature, bias]
    exact = dense_sigmoid(query, key, temperature.reshape(()), bias)
    expected = torch.autograd.grad(exact, leaves)
    for backend in BACKENDS:
        loss = sk.sigmoid_loss(query, key, temperature=temperature, bias=bias, backend=backend)
        close(loss, exact, min(tolerance, 1e-6))
        for one, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            close(one, other, max(tolerance, 1e-6))
    assert sk.sigmoid_loss(query, key).item() == pytest.approx(
        dense_sigmoid(query, key, torch.tensor(0.1).double(), torch.tensor(-10.0)).item(), rel=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("loss", [sk.info_nce, sk.nt_xent])
def test_gradient_on_a_parameter_is_that_of_float64(loss: Callable[..., Tensor], backend: str) -> None:
    query, key = rows(700, 64, dtype=torch.float32), rows(700, 64, dtype=torch.float32)
    for value in (0.02, 0.07, 0.5, 3.0):
        for shape in ((), (1,), (1, 1)):
            temperature = nn.Parameter(torch.full(shape, value))
            loss(query, key, temperature=temperature, backend=backend).backward()
            wide = temperature.detach().double().reshape(()).requires_grad_()
            exact = loss(query.double(), key.double(), temperature=wide, backend="reference")
            assert temperature.grad is not None and temperature.grad.shape == shape
            close(temperature.grad, torch.autograd.grad(exact, wide)[0], 1e-5)


def test_a_float_and_a_tensor_without_gradient_are_the_same_call() -> None:
    query, key = rows(8, 5), rows(8, 5)
    for given in (
        torch.tensor(0.25),
        nn.Parameter(torch.tensor(0.25)).detach(),
        torch.tensor([0.25]),
        np.float64(0.25),
    ):
        for loss in (sk.info_nce, sk.nt_xent, sk.sigmoid_loss):
            assert torch.equal(loss(query, key, temperature=given), loss(query, key, temperature=0.25))


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_any_whole_type_and_masks_from_arrays(backend: str) -> None:
    query, key = rows(6, 5), rows(6, 5)
    labels = torch.tensor([0, 1, 1, 0, 2, 100])
    same = labels[:, None] == labels
    expected = sk.info_nce(query, key, mask=same, reduction="none", backend=backend)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        found = sk.info_nce(query, key, groups=labels.to(dtype), reduction="none", backend=backend)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        sk.info_nce(
            query, key, groups=labels.numpy(), mask=np.zeros((6, 6), dtype=bool), reduction="none", backend=backend
        ),
        expected,
    )
    # labels far apart, and a stride
    far = torch.stack([labels * (1 << 40), labels], 1)[:, 0]
    torch.testing.assert_close(sk.info_nce(query, key, groups=far, reduction="none", backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_left_is_a_loss_of_zero_without_a_gradient(backend: str) -> None:
    query, key, tau = rows(5, 3), rows(5, 3), torch.tensor(0.1, requires_grad=True)
    nothing = torch.zeros(5, dtype=torch.int64)
    for loss in (
        sk.info_nce(query, key, groups=nothing, symmetric=True, temperature=tau, backend=backend),
        sk.info_nce(query, key, queue=key, groups=nothing, queue_groups=nothing, temperature=tau, backend=backend),
        sk.info_nce(query, key, mask=torch.ones(5, 5, dtype=torch.bool), temperature=tau, backend=backend),
        sk.info_nce(query, key, negatives=key[:, None], mask=torch.ones(5, 1).bool(), temperature=tau, backend=backend),
        sk.nt_xent(query, key, groups=nothing, temperature=tau, backend=backend),
    ):
        assert float(loss) == 0
        for create_graph in (False, True):
            for gradient in torch.autograd.grad(loss, [query, key, tau], create_graph=create_graph, retain_graph=True):
                assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_masked_row_with_nan_is_named_too(backend: str, value: float) -> None:
    query, key = torch.randn(40, 5), torch.randn(140, 5)
    key[130, 2] = value
    everything = torch.ones(40, 140, dtype=torch.bool)
    with pytest.raises(ValueError, match="key row 130 holds NaN or Inf"):
        sk.info_nce(query, key, mask=everything, backend=backend)
    with pytest.raises(ValueError, match="queue row 130 holds NaN or Inf"):
        sk.info_nce(query, query, queue=key, mask=everything, backend=backend)


def test_a_mask_changed_before_the_backward_pass_is_refused() -> None:
    query, key, mask = rows(5, 3), rows(5, 3), torch.zeros(5, 5, dtype=torch.bool)
    loss = sk.info_nce(query, key, mask=mask)
    mask[0] = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


Z, N = torch.randn(6, 4), torch.randn(6, 2, 4)
LABELS = torch.arange(6)
ONES = torch.ones(6, 5)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mask shape": (lambda: sk.info_nce(Z, Z, mask=ONES.bool()), r"mask must be bool of shape \(6, 6\), .* \(6, 5\)"),
    "mask dtype": (lambda: sk.info_nce(Z, Z, mask=torch.ones(6, 6)), "mask must be bool .* got torch.float32"),
    "labels dtype": (lambda: sk.info_nce(Z, Z, groups=torch.ones(6)), "groups must be whole numbers, got torch.float32"),
    "labels shape": (lambda: sk.nt_xent(Z, Z, groups=torch.arange(5)), r"groups must have shape \(6,\), got shape \(5,\)"),
    "labels of more": (lambda: sk.info_nce(Z[:4], Z, groups=torch.arange(5)), r"groups must have shape \(4,\) or \(6,\)"),
    "queue labels": (lambda: sk.info_nce(Z, Z, queue=Z, groups=LABELS), "groups and queue_groups go together"),
    "labels of no queue": (lambda: sk.info_nce(Z, Z, queue_groups=LABELS), "queue_groups needs a queue"),
    "two kinds": (lambda: sk.info_nce(Z, Z, queue=Z, negatives=N), "negatives does not go with queue"),
    "symmetric queue": (lambda: sk.info_nce(Z, Z, queue=Z, symmetric=True), "symmetric does not go with queue"),
    "symmetric own": (lambda: sk.info_nce(Z, Z, negatives=N, symmetric=True), "symmetric does not go with negatives"),
    "labels of own": (lambda: sk.info_nce(Z, Z, negatives=N, groups=LABELS), "groups does not go with negatives"),
    "own of others": (lambda: sk.info_nce(Z, Z, negatives=N[:5]), "negatives are of 5 queries, but query has 6 rows"),
    "own shape": (lambda: sk.info_nce(Z, Z, negatives=Z), "negatives must have 3 dimensions"),
    "own NaN": (lambda: sk.info_nce(Z, Z, negatives=N / 0), "negatives batch 0 row 0 holds NaN or Inf"),
    "fewer keys": (lambda: sk.info_nce(Z, Z[:5]), "key has 5 rows, but query has 6"),
    "more keys, a queue": (lambda: sk.info_nce(Z[:5], Z, queue=Z), "key has 6 rows, but query has 5"),
    "more keys, both ways": (lambda: sk.info_nce(Z[:5], Z, symmetric=True), "key has 6 rows, but query has 5"),
    "temperature": (lambda: sk.info_nce(Z, Z, temperature=torch.tensor(-0.5)), "temperature must be .* above 0, got -0.5"),
    "temperature NaN": (
        lambda: sk.nt_xent(Z, Z, temperature=nn.Parameter(torch.tensor(torch.nan))), "temperature must be .* above 0, got nan",
    ),
    "temperatures": (lambda: sk.info_nce(Z, Z, temperature=torch.ones(2)), r"temperature must be one number, .* \(2,\)"),
    "bias": (lambda: sk.sigmoid_loss(Z, Z, bias=torch.inf), "bias must be a finite number, got inf"),
    "sigmoid rows": (lambda: sk.sigmoid_loss(Z, Z[:5]), "key has 5 rows, but query has 6"),
    "sigmoid NaN": (lambda: sk.sigmoid_loss(Z, Z / 0), "key row 0 holds NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


MEASURE = """
import resource, sys, torch, spectral_kernels as sk
kind = sys.argv[1]
b, d = 16384, 512
query, key = torch.randn(b, d).requires_grad_(), torch.randn(b, d).requires_grad_()
temperature = torch.nn.Parameter(torch.tensor(0.05))
how = {}
if kind == "mask":
    how = {"mask": torch.zeros(b, b, dtype=torch.bool)}
    how["mask"][:, ::7] = True
elif kind == "groups":
    how = {"groups": torch.arange(b) // 2}
call = sk.sigmoid_loss if kind == "sigmoid" else lambda *a, **k: sk.info_nce(*a, backend="cpp", **how, **k)
(sk.sigmoid_loss if kind == "sigmoid" else sk.info_nce)(query[:64], key[:64], temperature=temperature).backward()
query.grad = key.grad = temperature.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(query, key, temperature=temperature).backward()
assert query.grad is not None and temperature.grad is not None and temperature.grad.isfinite()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["groups", "mask", "sigmoid"])
def test_memory_at_16384_rows_of_512(kind: str) -> None:
    """Similarities would be 1 GiB: forward and backward take less than 0.5 GiB beside the inputs, gradients included."""
    done = subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5, done.stdout
