"""`SpectrumMonitor` as a callback of Lightning, which is imported only when one is made."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectral_kernels.monitor.spectrum_monitor import SpectrumMonitor


def lightning_callback(
    monitor: SpectrumMonitor, embeddings: Callable[[Any], tuple[Tensor, Tensor]] | None = None
) -> Any:
    """A `lightning.pytorch.Callback` that lets `monitor` observe every optimiser step of rank 0.

    Args:
        monitor: what observes.
        embeddings: from what `training_step` returned to (query, key), as the loss was given them; None: its entries
            "query" and "key". They may be detached. Where it fails the monitor skips the step.

    Returns:
        The callback.

    Raises:
        ModuleNotFoundError: neither lightning nor pytorch_lightning is installed.
    """
    read = embeddings or (lambda outputs: (outputs["query"], outputs["key"]))

    class SpectrumCallback(callback_class()):  # type: ignore[misc]
        """Gradient norms are those that the optimiser is given, before clipping."""

        def __init__(self) -> None:
            super().__init__()
            self.monitor = monitor
            self._norm: float | None = None

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            try:
                self._norm = gradient_norm(module)
            except Exception as error:  # gradients that torch adds up in no way, such as those of several devices
                self._norm = None
                monitor.skip("gradient_norm", f"the gradient has no norm: {type(error).__name__}: {error}")

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not trainer.is_global_zero:
                return
            try:
                query, key = read(outputs)
            except Exception as error:
                why = f"training_step returned no 'query' and 'key', and embeddings= found none: {type(error).__name__}"
                monitor.skip("embeddings", f"{why}: {error}")
                return
            loss = outputs.get("loss") if isinstance(outputs, dict) else None
            monitor.observe(trainer.global_step, query, key, value=loss, gradient_norm=self._norm)

    return SpectrumCallback()


def gradient_norm(module: torch.nn.Module) -> float:
    """Norm of all gradients of a module's parameters."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def callback_class() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError("a Lightning callback needs Lightning, which is not installed: pip install lightning")
