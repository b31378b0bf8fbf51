"""LARS (You, Gitman & Ginsburg 2017), the optimiser of SimCLR at large batches; torch has none."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step of each tensor of two or more dimensions is scaled by η·‖w‖/(‖g‖ + λ‖w‖), capped at
    the learning rate (LARC); biases and normalisation take plain steps.

    Args:
        params: parameters or groups. lr: learning rate, ≥ 0. momentum: in [0, 1). weight_decay: λ ≥ 0. eta: η > 0.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.02,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise ValueError(f"lr and weight_decay must be at least 0, got {lr!r} and {weight_decay!r}")
        if not 0 <= momentum < 1 or not eta > 0:
            raise ValueError(f"momentum must be in [0, 1) and eta above 0, got {momentum!r} and {eta!r}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        decayed = gradient.add(parameter, alpha=group["weight_decay"])
        if parameter.ndim > 1 and group["lr"] > 0:
            length, slope = parameter.norm(), gradient.norm()
            rate = group["eta"] * length / (slope + group["weight_decay"] * length).clamp(min=1e-12)
            # a tensor of zeros, or one without a gradient, takes a plain step
            rate = torch.where((length > 0) & (slope > 0), (rate / group["lr"]).clamp(max=1), 1.0)
            decayed = decayed * rate
        state = self.state[parameter]
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.clone(decayed)
            else:
                state["momentum_buffer"].mul_(group["momentum"]).add_(decayed)
            decayed = state["momentum_buffer"]
        parameter.add_(decayed, alpha=-group["lr"])
