"""Variance of a loss's gradient over batches, at fixed parameters (docs/theory.md §4)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GradientVariance:
    """What `gradient_variance` found; float64.

    Attributes:
        total: unbiased total variance Σ Var of the gradient over the batches, in squared units of the gradient.
        mean_norm: mean over batches of the gradient's norm ‖g‖.
        norm_of_mean: ‖mean gradient‖.
        norms: norm of each batch's gradient, in order.
    """

    total: float
    mean_norm: float
    norm_of_mean: float
    norms: tuple[float, ...]

    @property
    def at_equal_norm(self) -> float:
        """Total variance after scaling to a mean gradient norm of 1: total / mean_norm²; 0 where all gradients are 0."""
        return self.total / self.mean_norm**2 if self.mean_norm > 0 else 0.0


class Gradients:
    """Gradients that are added one by one, by Welford: the mean of squares minus the square of the mean would cancel."""

    def __init__(self) -> None:
        self._mean: Tensor | float = 0.0
        self._squares = 0.0
        self.norms: list[float] = []

    def add(self, parts: Iterable[Tensor]) -> float:
        """One gradient, all its parts; its norm."""
        gradient = torch.cat([part.detach().reshape(-1).double() for part in parts])
        self.norms.append(float(gradient.norm()))
        step = gradient - self._mean
        self._mean += step / len(self.norms)
        self._squares += float(step @ (gradient - self._mean))
        return self.norms[-1]

    def variance(self) -> GradientVariance:
        """Of at least two."""
        count = len(self.norms)
        norm_of_mean = float(torch.as_tensor(self._mean).norm())
        return GradientVariance(self._squares / (count - 1), sum(self.norms) / count, norm_of_mean, tuple(self.norms))


def gradient_variance(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> GradientVariance:
    """Total variance of the gradient of `loss(model, batch)` with respect to the model's parameters, over batches.

    Parameters and buffers (running statistics too), `.grad` and the training mode are afterwards what they were. Memory
    is three copies of the parameters, however many batches.

    Args:
        model: its parameters with `requires_grad` are what the gradient is of.
        loss: returns a scalar.
        batches: at least two.

    Raises:
        ValueError: no parameter, fewer than two batches, a loss that is no scalar, or a gradient that holds NaN or Inf
            (the batch is named).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter that requires a gradient")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = Gradients()
    try:
        with torch.enable_grad():
            for count, batch in enumerate(batches):
                value = loss(model, batch)
                if value.ndim:
                    raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
                parts = torch.autograd.grad(value, parameters, allow_unused=True)
                filled = (torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True))
                if not found.add(filled) < float("inf"):
                    raise ValueError(f"the gradient of batch {count} holds NaN or Inf")
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if len(found.norms) < 2:
        raise ValueError(f"batches must hold at least 2, got {len(found.norms)}")
    return found.variance()
