"""A synthetic data set and small settings for the training tests."""

from typing import Any

import torch

from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData
from spectral_kernels.training.settings import build_config


def blobs(count: int = 320, test: int = 80, size: int = 8, channels: int = 1, classes: int = 4) -> ImageData:
    """Noisy images of `classes` fixed patterns; the classes in turn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(60, 196, (classes, channels, size, size), generator=generator)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % classes
        noise = 30 * torch.randn(n, channels, size, size, generator=generator)
        return (patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels

    return ImageData(*split(count), *split(test), "blobs", tuple("abcdefgh"[:classes]))


def settings(**sections: dict[str, Any]) -> Config:
    """Small settings; each section is laid over them."""
    content: dict[str, dict[str, Any]] = {
        "model": {"width": 4, "hidden": 16, "dim": 8},
        "optimizer": {"lr": 0.1},
        "selection": {"min_seen": 0.2, "draws": 4},
        "train": {"batch_size": 32, "steps": 6, "rank_every": 2, "checkpoint_every": 3, "device": "cpu"},
        "evaluate": {"every": 3},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    return build_config(content)
