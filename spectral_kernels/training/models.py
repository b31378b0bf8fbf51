"""Encoders and the projection head."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_kernels import checks
from spectral_kernels.optional import import_torchvision

ENCODERS = ("conv4", "resnet18", "resnet50")
STEMS = ("cifar", "imagenet")


def encoder(name: str, in_channels: int, *, width: int | None = None, stem: str = "cifar") -> tuple[nn.Module, int]:
    """An image encoder, (B, in_channels, H, W) to (B, feature_dim).

    Args:
        name: `"conv4"`: four 3×3 convolutions of stride 2 with `width`, 2, 4 and 8 times `width` channels,
            for images of 28 pixels or so on a CPU. `"resnet18"`, `"resnet50"` (He et al. 2016).
        in_channels: of the images.
        width: channels of the first stage; None: 32 for conv4, 64 for the others; another one only for conv4 and for
            resnet18 with CIFAR's stem.
        stem: of the ResNets: `"cifar"` for 32 pixels (3×3, stride 1, no pooling; SimCLR appendix B.9), `"imagenet"`
            (7×7, stride 2, pooling).

    Returns:
        The module, initialised from torch's global generator, and feature_dim (8 × width, resnet50: 2048).

    Raises:
        ValueError: unknown name or stem, in_channels or width below 1, a width that an encoder has not.
        ImportError: torchvision, which has the ResNet-50 and ImageNet's stem, is missing or was built for another torch.
    """
    checks.one_of(name, "name", ENCODERS)
    checks.one_of(stem, "stem", STEMS)
    checks.integer(in_channels, "in_channels", 1)
    if name == "conv4":
        width = checks.integer(32 if width is None else width, "width", 1)
        return _conv4(in_channels, width), 8 * width
    width = checks.integer(64 if width is None else width, "width", 1)
    if name == "resnet18" and stem == "cifar":
        return ResNet18(in_channels, width), 8 * width
    if width != 64:
        raise ValueError(f"width must be 64 with name = {name!r} and stem = {stem!r}, got {width}")
    return _torchvision_resnet(name, in_channels, stem)


def projection_head(feature_dim: int, hidden: int, dim: int) -> nn.Module:
    """SimCLR's two-layer projection head, (B, feature_dim) to (B, dim).

    Raises:
        ValueError: a size below 1.
    """
    checks.integer(hidden, "hidden", 1)
    checks.integer(dim, "dim", 1)
    return nn.Sequential(
        nn.Linear(feature_dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim),
    )


def _torchvision_resnet(name: str, in_channels: int, stem: str) -> tuple[nn.Module, int]:
    network = getattr(import_torchvision("models"), name)(weights=None)
    features = network.fc.in_features
    network.fc = nn.Identity()
    if stem == "cifar":
        network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif in_channels != 3:
        network.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return network, features


def _conv4(in_channels: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (width, 2 * width, 4 * width, 8 * width):
        layers += [
            _Halving(in_channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        in_channels = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _Halving(nn.Conv2d):
    """3×3 convolution of stride 2, or 1 along an axis that has one pixel left, where the result is the same.

    With stride 2 on one pixel oneDNN leaves parts of a bfloat16 weight gradient unwritten (torch 2.13).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride = tuple(min(2, size) for size in x.shape[2:])
        return functional.conv2d(x, self.weight, None, stride, self.padding)


class _Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.body(x) + self.shortcut(x))
        return out


class ResNet18(nn.Module):
    """ResNet-18 for small images."""

    def __init__(self, in_channels: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        blocks = []
        channels = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 8 × width)."""
        features: Tensor = self.blocks(self.stem(x)).mean((2, 3))
        return features
