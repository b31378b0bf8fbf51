"""Batched augmentations on the training device, drawn from an explicit generator.

Crop, flip and blur of an axis-aligned image are linear and separable, so each image's three become two
small matrices and the batch takes two batched products: a quarter of the time of `grid_sample` on a CPU.
Colours are one affine map per image.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
DRAWS = 15  # random numbers per image, whatever is switched on: two runs with one seed stay paired


# where a data set asks for something else than `AugmentConfig`'s defaults
DEFAULTS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"crop_scale": [0.3, 1.0], "grayscale": 0.0},
    # a mirrored digit is another sign, and eight pixels leave little to crop
    "digits": {"crop_scale": [0.5, 1.0], "grayscale": 0.0, "flip": 0.0},
}


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a view.

    crop_scale: (low, high) share of the image's area that a crop keeps. crop_ratio: (low, high) of width by
    height. flip: probability of a horizontal flip. jitter: probability of the colour jitter, whose brightness,
    contrast and saturation are factors in [1 - x, 1 + x] and whose hue is a turn in [-x, x] of the circle.
    grayscale, blur: probabilities. blur_sigma: (low, high) in pixels.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 1.0)

    def __post_init__(self) -> None:
        for name, limit in (("crop_scale", 1.0), ("crop_ratio", 10.0), ("blur_sigma", 100.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= limit:
                raise ValueError(
                    f"augment.{name} must be (low, high), 0 < low <= high <= {limit:g}, got {(low, high)!r}"
                )
        for name in ("flip", "jitter", "brightness", "contrast", "saturation", "grayscale", "blur", "hue"):
            limit = 0.5 if name == "hue" else 1.0
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"augment.{name} must be in [0, {limit:g}], got {getattr(self, name)!r}")


class Normalize:
    """uint8 images to float ones with mean 0 and standard deviation 1 per channel over `images` (N, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        # exact integer moments: the same numbers on every machine and thread count
        counts = [torch.bincount(images[:, c].flatten().long(), minlength=256) for c in range(images.shape[1])]
        histogram = torch.stack(counts).to(torch.float64)
        levels = torch.arange(256, dtype=torch.float64, device=images.device) / 255
        mean = (histogram * levels).sum(1) / histogram.sum(1)
        variance = (histogram * levels.square()).sum(1) / histogram.sum(1) - mean.square()
        self.mean = mean.float().view(1, -1, 1, 1)
        self.std = variance.clamp_min(1e-6).sqrt().float().view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to normalised float32."""
        return self.unit(images.float().div_(255))

    def unit(self, images: Tensor) -> Tensor:
        """float32 images in [0, 1] to normalised ones, in place."""
        return images.sub_(self.mean).div_(self.std)


class Augment:
    """Random views of a batch of images.

    Args:
        config: what happens to a view.
        normalize: applied last.
        channels_last: memory format of the views, which CPU convolutions and tensor cores want.
    """

    def __init__(self, config: AugmentConfig, normalize: Normalize, *, channels_last: bool = True) -> None:
        self.config = config
        self.normalize = normalize
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each image.

        Args:
            images: (B, C, H, W) uint8, C = 1 or 3.
            generator: on the images' device.

        Returns:
            (B, C, H, W) float32, normalised.
        """
        draws = torch.rand(images.shape[0], DRAWS, generator=generator, device=images.device)
        views = self._geometry(images.float().div_(255), draws)
        views = self._colour(views, draws).clamp_(0, 1)
        return self.normalize.unit(views).contiguous(memory_format=self.format)

    def _geometry(self, images: Tensor, draws: Tensor) -> Tensor:
        config = self.config
        batch, channels, height, width = images.shape
        area = _between(draws[:, 0], config.crop_scale)
        ratio = _between(draws[:, 1], (math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1]))).exp()
        crop_width, crop_height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
        rows = _resample(draws[:, 2] * (1 - crop_height), crop_height, height)
        left = draws[:, 3] * (1 - crop_width)
        flip = draws[:, 4] < config.flip
        columns = _resample(torch.where(flip, left + crop_width, left), crop_width * (1 - 2 * flip.float()), width)
        if config.blur:
            rows, columns = self._blur(draws, height) @ rows, self._blur(draws, width) @ columns
        # along the width, then along the height, each one product per image
        across = torch.bmm(images.reshape(batch, channels * height, width), columns.mT)
        across = across.view(batch, channels, height, width).transpose(2, 3).reshape(batch, channels * width, height)
        return torch.bmm(across, rows.mT).view(batch, channels, width, height).transpose(2, 3)

    def _colour(self, views: Tensor, draws: Tensor) -> Tensor:
        """Brightness, contrast, saturation, hue and grayscale, in this order, as x → A x + o per image."""
        config = self.config
        on = draws[:, 7] < config.jitter
        brightness, contrast, saturation = (
            torch.where(on, 1 + amount * (2 * draws[:, column] - 1), 1.0)
            for column, amount in ((8, config.brightness), (9, config.contrast), (10, config.saturation))
        )
        means = views.mean((2, 3))
        gray = means[:, 0] if means.shape[1] == 1 else means @ views.new_tensor(LUMA)
        scale, offset = brightness * contrast, brightness * (1 - contrast) * gray
        if views.shape[1] == 1:
            return torch.addcmul(offset.view(-1, 1, 1, 1), views, scale.view(-1, 1, 1, 1))
        hue = torch.where(on, config.hue * (2 * draws[:, 11] - 1), 0.0)
        matrix = _colour_matrix(saturation, hue, draws[:, 12] < config.grayscale) * scale.view(-1, 1, 1)
        mixed = torch.bmm(matrix, views.reshape(*views.shape[:2], -1)).view(views.shape)
        return mixed + offset.view(-1, 1, 1, 1)

    def _blur(self, draws: Tensor, size: int) -> Tensor:
        """(B, size, size) Gaussian smoothing along one axis; the identity for images that are not blurred."""
        config = self.config
        sigma = torch.where(draws[:, 5] < config.blur, _between(draws[:, 6], config.blur_sigma), 1e-3)
        place = torch.arange(size, device=draws.device)
        weights = (-0.5 * ((place[:, None] - place) / sigma.view(-1, 1, 1)).square()).exp()
        return weights / weights.sum(2, keepdim=True)


def _between(draw: Tensor, span: tuple[float, float]) -> Tensor:
    return span[0] + (span[1] - span[0]) * draw


def _resample(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """(B, size, size) bilinear weights that stretch [start, start + extent] of an axis over the whole of it.

    start, extent: (B,) in units of the axis; a negative extent mirrors. Pixels beyond the edge repeat it.
    """
    grid = (torch.arange(size, device=start.device) + 0.5) / size
    source = (start[:, None] + extent[:, None] * grid) * size - 0.5
    place = torch.arange(size, device=start.device)
    return (1 - (source.clamp(0, size - 1)[:, :, None] - place).abs()).clamp_min_(0)


def _colour_matrix(saturation: Tensor, hue: Tensor, gray: Tensor) -> Tensor:
    """(B, 3, 3) maps of RGB that keep greys: saturation about the luma, a hue turn in YIQ, grayscale."""
    luma = saturation.new_tensor(LUMA).expand(3, 3)
    eye = torch.eye(3, device=saturation.device)
    to_yiq = saturation.new_tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    cosine, sine = (2 * math.pi * hue).cos(), (2 * math.pi * hue).sin()
    turn = torch.zeros(len(hue), 3, 3, device=hue.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 2, 2] = cosine, cosine
    turn[:, 1, 2], turn[:, 2, 1] = -sine, sine
    saturate = luma + saturation.view(-1, 1, 1) * (eye - luma)
    turned = torch.linalg.inv(to_yiq) @ turn @ to_yiq @ saturate
    return torch.where(gray.view(-1, 1, 1), luma, turned)
