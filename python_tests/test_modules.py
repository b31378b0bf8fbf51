"""Layers and losses as modules."""

import pytest
import torch

import spectral_kernels as sk


@pytest.mark.parametrize("method", ("cholesky", "zca", "newton_schulz"))
def test_whitening_learns_running_statistics(method: str) -> None:
    layer = sk.Whitening(6, method=method, momentum=0.2)
    mix = torch.randn(6, 6)
    for _ in range(60):
        y = layer(torch.randn(512, 6) @ mix + 3.0)
        torch.testing.assert_close(sk.covariance(y), torch.eye(6), atol=0.02, rtol=0)
    layer.eval()
    y = layer(torch.randn(20_000, 6) @ mix + 3.0)
    torch.testing.assert_close(sk.covariance(y), torch.eye(6), atol=0.25, rtol=0)
    assert y.mean(0).abs().max() < 0.2
    torch.testing.assert_close(layer(y[:1]), layer(y[:2])[:1])


def test_whitening_keeps_gradients_dtype_and_state() -> None:
    layer = sk.Whitening(4)
    z = torch.randn(16, 4, dtype=torch.bfloat16, requires_grad=True)
    y = layer(z)
    assert y.dtype == torch.bfloat16
    y.float().pow(3).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()
    other = sk.Whitening(4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.running_covariance, layer.running_covariance)
    assert "method='cholesky'" in repr(layer)


def test_losses_are_the_functions() -> None:
    a, b, queue = torch.randn(8, 5), torch.randn(8, 5), torch.randn(20, 5)
    assert torch.equal(sk.NTXentLoss(0.3)(a, b), sk.nt_xent(a, b, temperature=0.3))
    assert torch.equal(sk.InfoNCELoss(0.3)(a, b), sk.info_nce(a, b, temperature=0.3))
    assert torch.equal(sk.InfoNCELoss(0.3)(a, b, queue), sk.info_nce(a, b, queue=queue, temperature=0.3))
    with pytest.raises(ValueError, match="temperature"):
        sk.NTXentLoss(0.0)


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
def test_loss_where_the_positive_has_all_but_won(backend: str) -> None:
    """A plain logsumexp minus the positive is 0 here, or off by percents; so are its gradients."""
    torch.manual_seed(1)
    query = torch.nn.functional.normalize(torch.randn(16, 32))
    key = query + 0.01 * torch.randn(16, 32)
    losses, grads = [], []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        q = query.to(dtype).requires_grad_()
        loss = sk.info_nce(q, key.to(dtype), temperature=0.05, reduction="none", backend=name)
        grads.append(torch.autograd.grad(loss.sum(), q)[0].double())
        losses.append(loss.double())
    assert losses[0].max() < 1e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 1e-4
