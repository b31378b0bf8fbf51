"""Gradient variance over batches."""

import pytest
import torch
from torch import Tensor, nn

import spectral_kernels as sk


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def some_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(9, 4, generator=generator), torch.randn(9, 2, generator=generator)) for _ in range(count)]


def test_is_the_variance_of_stacked_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    gradients = []
    for batch in some_batches(7):
        model.zero_grad()
        squared_error(model, batch).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double())
    model.zero_grad()
    stacked = torch.stack(gradients)
    found = sk.gradient_variance(model, squared_error, iter(some_batches(7)))
    assert found.total == pytest.approx(float(stacked.var(0).sum()), rel=1e-9)
    assert found.norms == pytest.approx(stacked.norm(dim=1).tolist(), rel=1e-9)
    assert found.norm_of_mean == pytest.approx(float(stacked.mean(0).norm()), rel=1e-9)
    assert found.at_equal_norm == pytest.approx(found.total / stacked.norm(dim=1).mean().item() ** 2, rel=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sk.gradient_variance(model, squared_error, some_batches(3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_equal_batches_have_none() -> None:
    batch = some_batches(1)
    found = sk.gradient_variance(nn.Linear(4, 2), squared_error, batch * 5)
    assert found.total <= 1e-12 * found.mean_norm**2


def test_bad_input() -> None:
    linear = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="batches must hold at least 2, got 1"):
        sk.gradient_variance(linear, squared_error, some_batches(1))
    with pytest.raises(ValueError, match="model has no parameter"):
        sk.gradient_variance(nn.ReLU(), squared_error, some_batches(2))
    with pytest.raises(ValueError, match=r"loss must return a scalar, got shape \(9, 2\)"):
        sk.gradient_variance(linear, lambda model, batch: model(batch[0]), some_batches(2))
    bad = some_batches(2)
    bad[1][0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="the gradient of batch 1 holds NaN or Inf"):
        sk.gradient_variance(linear, squared_error, bad)
