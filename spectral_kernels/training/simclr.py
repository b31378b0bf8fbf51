"""SimCLR (Chen et al. 2020): one step of it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import spectral_kernels as sk
from spectral_kernels.training.config import ModelConfig, OptimizerConfig
from spectral_kernels.training.models import encoder, projection_head


class Diverged(RuntimeError):
    """Training produced NaN or Inf."""


class SimCLR(nn.Module):
    """Encoder and projection head; (B, C, H, W) views to (B, dim) projections."""

    def __init__(self, config: ModelConfig, in_channels: int) -> None:
        super().__init__()
        self.encoder, feature_dim = encoder(config.encoder, in_channels, width=config.width)
        self.head = projection_head(feature_dim, config.hidden, config.dim)

    def forward(self, views: Tensor) -> Tensor:
        """(B, C, H, W) to (B, dim), not normalised."""
        projections: Tensor = self.head(self.encoder(views))
        return projections


def loss_and_embeddings(model: nn.Module, views: Tensor, temperature: float, amp: bool) -> tuple[Tensor, Tensor]:
    """NT-Xent over two views of each sample, and what the memory bank remembers of the samples.

    Args:
        views: (2B, C, H, W), the first views of all samples, then the second ones.
        temperature: τ.
        amp: bfloat16 autocast for the model; the loss is computed in float32.

    Returns:
        The loss, and (B, dim) float32 detached embeddings: the mean of a sample's two normalised
        projections, normalised again. The mean carries half of one view's augmentation noise, and costs
        nothing more.

    Raises:
        Diverged: a projection is NaN or Inf.
    """
    with torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        projections = model(views)
    first, second = projections.float().chunk(2)
    if not bool(projections.detach().isfinite().all()):
        raise Diverged("a projection is NaN or Inf")
    loss = sk.nt_xent(first, second, temperature=temperature)
    with torch.no_grad():
        mean = functional.normalize(first, dim=1) + functional.normalize(second, dim=1)
        return loss, functional.normalize(mean, dim=1)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; biases and normalisation layers (parameters of one dimension) are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def learning_rate(progress: float, config: OptimizerConfig) -> float:
    """Linear warm-up, then a cosine to 0; progress in [0, 1] of the budget."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    left = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    return config.lr * 0.5 * (1 + math.cos(math.pi * left))
