"""Augmentations: shapes, seeds, and each part against its definition."""

import pytest
import torch
from torch.nn import functional

from spectral_kernels.training.augment import LUMA, Augment, AugmentConfig, Normalize

OFF = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grayscale": 0.0}


class Identity(Normalize):
    def __init__(self) -> None:
        self.mean, self.std = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)


def images(channels: int = 3, size: int = 12, batch: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, channels, size, size), generator=generator, dtype=torch.uint8)


def augment(batch: torch.Tensor, seed: int = 0, **options: object) -> torch.Tensor:
    config = AugmentConfig(**(OFF | options))  # type: ignore[arg-type]
    return Augment(config, Identity())(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_shape_format_and_seed(channels: int) -> None:
    batch = images(channels)
    make = Augment(AugmentConfig(blur=0.5), Normalize(batch))
    views = make(batch, torch.Generator().manual_seed(0))
    assert views.shape == batch.shape and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert views.isfinite().all()
    assert torch.equal(views, make(batch, torch.Generator().manual_seed(0)))
    assert not torch.equal(views, make(batch, torch.Generator().manual_seed(1)))


def test_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    augment(images(), jitter=1.0, flip=0.5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_setting_draws_the_same_amount() -> None:
    left = torch.Generator().manual_seed(0)
    right = torch.Generator().manual_seed(0)
    Augment(AugmentConfig(**OFF), Identity())(images(), left)  # type: ignore[arg-type]
    Augment(AugmentConfig(blur=1.0), Identity())(images(), right)
    assert torch.equal(left.get_state(), right.get_state())


def test_switched_off_changes_nothing_and_flip_is_one() -> None:
    batch = images()
    assert torch.allclose(augment(batch), batch.float() / 255, atol=1e-6)
    assert torch.allclose(augment(batch, flip=1.0), batch.float().flip(3) / 255, atol=1e-5)


def test_crop_is_grid_sample() -> None:
    """The crop against torch's own resampling of the same window."""
    batch = images(size=16)
    generator = torch.Generator().manual_seed(3)
    config = AugmentConfig(**(OFF | {"crop_scale": (0.3, 0.9), "crop_ratio": (0.8, 1.25)}))  # type: ignore[arg-type]
    views = Augment(config, Identity())(batch, generator)
    draws = torch.rand(len(batch), 15, generator=torch.Generator().manual_seed(3))
    area = 0.3 + 0.6 * draws[:, 0]
    ratio = torch.exp(torch.log(torch.tensor(0.8)) + (torch.tensor(1.25).log() - torch.tensor(0.8).log()) * draws[:, 1])
    width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    top, left = draws[:, 2] * (1 - height), draws[:, 3] * (1 - width)
    theta = torch.zeros(len(batch), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    expected = functional.grid_sample(batch.float() / 255, grid, align_corners=False, padding_mode="border")
    assert torch.allclose(views, expected, atol=1e-5)


def test_crop_keeps_the_asked_share() -> None:
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(64, 1, 24, 24).contiguous()
    views = augment(ramp, crop_scale=(0.25, 0.25))
    spread = (views[..., -1] - views[..., 0]).mean((1, 2)) * 255 / 230
    assert torch.allclose(spread, torch.full_like(spread, 0.5), atol=0.03)


def test_blur_is_a_convolution() -> None:
    batch = torch.zeros(1, 1, 15, 15, dtype=torch.uint8)
    batch[0, 0, 7, 7] = 255
    views = augment(batch, blur=1.0, blur_sigma=(1.0, 1.0))
    place = torch.arange(-7.0, 8.0)
    kernel = (-0.5 * place.square()).exp()
    kernel /= kernel.sum()
    assert torch.allclose(views[0, 0], kernel[:, None] * kernel, atol=1e-5)


def test_grayscale_and_contrast() -> None:
    batch = images()
    luma = torch.tensor(LUMA).view(1, 3, 1, 1)
    gray = (batch.float() / 255 * luma).sum(1, keepdim=True)
    assert torch.allclose(augment(batch, grayscale=1.0), gray.expand(-1, 3, -1, -1), atol=1e-5)
    flat = augment(batch, jitter=1.0, brightness=0.0, contrast=1.0, saturation=0.0, hue=0.0)
    middle = gray.mean((2, 3), keepdim=True)
    factor = 2 * torch.rand(16, 15, generator=torch.Generator().manual_seed(0))[:, 9].view(-1, 1, 1, 1)
    expected = (middle + factor * (batch.float() / 255 - middle)).clamp(0, 1)
    assert torch.allclose(flat, expected, atol=1e-5)


def test_hue_and_saturation_keep_greys() -> None:
    gray = images(1).expand(-1, 3, -1, -1).contiguous()
    views = augment(gray, jitter=1.0, brightness=0.0, contrast=0.0, saturation=1.0, hue=0.5)
    assert torch.allclose(views, gray.float() / 255, atol=1e-3)


def test_normalize() -> None:
    batch = images(3, 8, 500)
    views = Normalize(batch)(batch)
    assert torch.allclose(views.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(views.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert Normalize(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8))(batch[:, :1]).isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop_scale": (0.0, 1.0)}, r"augment\.crop_scale must be .*got \(0\.0, 1\.0\)"),
        ({"crop_scale": (0.9, 0.2)}, r"augment\.crop_scale"),
        ({"flip": 1.5}, r"augment\.flip must be in \[0, 1\], got 1\.5"),
        ({"hue": 0.7}, r"augment\.hue must be in \[0, 0\.5\], got 0\.7"),
        ({"blur": float("nan")}, r"augment\.blur must be in \[0, 1\], got nan"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**options)  # type: ignore[arg-type]
