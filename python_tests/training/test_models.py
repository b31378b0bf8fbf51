"""Encoders: sizes, and gradients that are whole."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from spectral_kernels.training.models import encoder, projection_head


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("name, channels", [("conv4", 1), ("conv4", 3), ("resnet18", 3)])
def test_shapes(name: str, channels: int, size: int) -> None:
    module, dim = encoder(name, channels, width=8)
    assert dim == 64
    assert module(torch.randn(4, channels, size, size)).shape == (4, dim)


def test_resnet18_is_resnet18() -> None:
    """The parameter count of CIFAR's ResNet-18 without its classifier (torchvision's, with a 3×3 stem of stride 1)."""
    module, dim = encoder("resnet18", 3)
    assert dim == 512
    assert sum(parameter.numel() for parameter in module.parameters()) == 11_168_832
    stages = [block.body[0].stride for block in module.blocks]
    assert stages == [(1, 1), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1)]


def test_conv4_sizes() -> None:
    module, dim = encoder("conv4", 1)
    shapes = [tuple(layer.weight.shape) for layer in module if isinstance(layer, nn.Conv2d)]
    assert shapes == [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3)]
    assert dim == 256


@pytest.mark.parametrize("amp", [False, True])
def test_gradients_on_a_single_pixel(amp: bool) -> None:
    """8×8 images reach the last convolution as 1×1: stride 2 must give what stride 2 gives, and a whole gradient."""
    torch.manual_seed(0)
    module, _ = encoder("conv4", 1, width=8)
    last = [layer for layer in module if isinstance(layer, nn.Conv2d)][-1]
    x = torch.randn(128, 32, 1, 1)
    weight = last.weight.detach().double().requires_grad_()
    functional.conv2d(x.double(), weight, None, 2, 1).square().mean().backward()
    for _ in range(10):
        garbage = torch.full_like(last.weight, torch.nan)  # what freed memory may hold
        del garbage
        last.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = last(x)
        out.float().square().mean().backward()
        assert last.weight.grad is not None
        error = (last.weight.grad - weight.grad).abs().max() / weight.grad.abs().max()  # type: ignore[union-attr]
        assert error < 0.02


def test_projection_head() -> None:
    assert projection_head(64, 32, 16)(torch.randn(8, 64)).shape == (8, 16)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="name must be one of conv4, resnet18, resnet50, got 'vit'"):
        encoder("vit", 3)
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        encoder("conv4", 0)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        encoder("conv4", 1, width=0)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        projection_head(8, 8, 0)
