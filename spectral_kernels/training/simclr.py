"""SimCLR (Chen et al. 2020): one step of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import spectral_kernels as sk
from spectral_kernels.training.config import ModelConfig, OptimizerConfig
from spectral_kernels.training.lars import LARS
from spectral_kernels.training.models import encoder, projection_head


class Diverged(RuntimeError):
    """Training produced NaN or Inf."""


class SimCLR(nn.Module):
    """Encoder and projection head; (B, C, H, W) views to (B, dim) projections. `whitening` is what the loss sees them
    through, None: as they are.
    """

    def __init__(self, config: ModelConfig, in_channels: int, whiten: str | None = None) -> None:
        super().__init__()
        self.whitening = None if whiten is None else sk.Whitening(config.dim, method=whiten)
        self.encoder, feature_dim = encoder(config.encoder, in_channels, width=config.width, stem=config.stem)
        self.head = projection_head(feature_dim, config.hidden, config.dim)

    def forward(self, views: Tensor) -> Tensor:
        """(B, C, H, W) to (B, dim), not normalised."""
        projections: Tensor = self.head(self.encoder(views))
        return projections


class Forward(NamedTuple):
    """What a step computes: the loss, the embeddings it was given, and what the memory bank remembers."""

    loss: Tensor
    first: Tensor
    second: Tensor
    embeddings: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Forward"]) -> "Forward":
        """Of a batch, from its parts: the mean loss, and all embeddings."""
        losses, *rows = zip(*parts, strict=True)
        return cls(torch.stack(losses).mean(), *map(torch.cat, rows))


def forward_loss(model: SimCLR, views: Tensor, temperature: float, amp: bool) -> Forward:
    """NT-Xent over two views of each sample, and what the memory bank remembers of the samples.

    Args:
        views: (2B, C, H, W), the first views of all samples, then the second ones.
        temperature: τ.
        amp: bfloat16 autocast for the model; the loss is computed in float32.

    Returns:
        The loss, the (B, dim) embeddings of either view as the loss saw them, and (B, dim) float32 detached
        embeddings for the bank: the mean of a sample's two normalised projections, before whitening, normalised again.
        The mean carries half of one view's augmentation noise, and costs nothing more.

    Raises:
        Diverged: a projection is NaN or Inf.
    """
    with torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        projections = model(views)
    projections = projections.float()
    if not bool(projections.detach().isfinite().all()):
        raise Diverged("a projection is NaN or Inf")
    first, second = (projections if model.whitening is None else model.whitening(projections)).chunk(2)
    loss = sk.nt_xent(first, second, temperature=temperature)
    with torch.no_grad():
        mean = functional.normalize(projections, dim=1).unflatten(0, (2, -1)).sum(0)
        return Forward(loss, first.detach(), second.detach(), functional.normalize(mean, dim=1))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD, LARS or AdamW; biases and normalisation layers (parameters of one dimension) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.name == "lars":
        return LARS(groups, config.lr, momentum=config.momentum, eta=config.eta)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def learning_rate(progress: float, config: OptimizerConfig) -> float:
    """Linear warm-up, then a cosine to 0; progress in [0, 1] of the budget."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    left = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    return config.lr * 0.5 * (1 + math.cos(math.pi * left))
