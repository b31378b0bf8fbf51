"""What the examples on images share: the data, SimCLR's model with its two views, and what its features are worth."""

import argparse
from dataclasses import replace

import torch
from torch import Tensor, nn

import spectral_kernels as sk
from spectral_kernels.training.augment import Augment, Normalize
from spectral_kernels.training.config import AugmentConfig
from spectral_kernels.training.data import ImageData, load
from spectral_kernels.training.evaluate import features, knn_accuracy
from spectral_kernels.training.models import encoder, projection_head


def read_options(doc: str | None, **more: int) -> tuple[argparse.Namespace, ImageData]:
    """The command line, with more options of these defaults, and Fashion-MNIST or digits with so many images to train on."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=["fashion_mnist", "digits"])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    data, n = load(options.data, fallback="digits"), options.images
    return options, replace(data, train_images=data.train_images[:n], train_labels=data.train_labels[:n])


class SimCLR(nn.Module):
    """Images (B, C, H, W) uint8 to the embeddings (B, 32) of two random views of each; `images` are those to train on."""

    def __init__(self, images: Tensor, rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, width = encoder("conv4", images.shape[1], width=16)
        self.head = projection_head(width, 128, 32)
        self.normalize = Normalize(images)
        self.augment = Augment(AugmentConfig(), self.normalize, channels_last=False)
        self.noise = torch.Generator(images.device).manual_seed(rank)
        self.ranks: list[Tensor] = []

    def views(self, images: Tensor) -> Tensor:
        """Two of each image, (2B, C, H, W) float32: first all first ones."""
        return self.augment(images.repeat(2, 1, 1, 1), self.noise)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.head(self.encoder(self.views(images))).chunk(2)
        self.ranks.append(sk.effective_rank(first.detach(), order=2))
        return first, second

    def report(self, data: ImageData) -> str:
        """How often the 20 nearest training images vote for a test image's class, and how diverse the last batches were."""
        train, test = (features(self.encoder, part, self.normalize) for part in (data.train_images, data.test_images))
        knn = knn_accuracy(train, data.train_labels, test, data.test_labels, k=(20,))[20]
        return (
            f"kNN {knn:.1%}, effective rank of the last ten batches {float(torch.stack(self.ranks[-10:]).mean()):.2f}"
        )
