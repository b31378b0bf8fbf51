"""MoCo from lightly's parts with greedy batches from a memory bank of this package.

    make lightly                               or: python examples/lightly_moco.py --epochs 4

What it shows: lightly's projection head, momentum update and loss with its queue stay as they are; the data loader takes a
batch sampler, and the bank is refreshed from the keys. Fashion-MNIST, or scikit-learn's digits.
"""

import argparse
import copy
import statistics
import time

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import spectral_kernels as sk
from spectral_kernels.training.augment import Augment, Normalize
from spectral_kernels.training.config import AugmentConfig
from spectral_kernels.training.data import load

Sampler = sk.GreedyBatchSampler | sk.RandomBatchSampler


class Indexed(Dataset[tuple[int, Tensor]]):
    """Images with their index, by which the bank knows them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.images[index]


def make_encoder(images: Tensor, d: int) -> nn.Module:
    channels, size = images.shape[1], images.shape[2]
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    features = 64 * (-(-size // 4)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), MoCoProjectionHead(features, 128, d))


def train(images: Tensor, bank: sk.MemoryBank, sampler: Sampler, epochs: int) -> tuple[float, float, float]:
    """Mean loss and effective rank of the keys over the last epoch, and seconds a step."""
    noise = torch.Generator().manual_seed(0)
    augment = Augment(AugmentConfig(), Normalize(images), channels_last=False)
    encoder = make_encoder(images, bank.d)
    momentum_encoder = copy.deepcopy(encoder)
    deactivate_requires_grad(momentum_encoder)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(2048, bank.d))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    losses: list[float] = []
    ranks: list[float] = []
    began = time.perf_counter()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        losses, ranks = [], []
        for index, batch in DataLoader(Indexed(images), batch_sampler=sampler):
            update_momentum(encoder, momentum_encoder, m=0.99)
            first, second = augment(batch.repeat(2, 1, 1, 1), noise).chunk(2)
            with torch.no_grad():
                key = momentum_encoder(second)
            loss = criterion(encoder(first), key)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bank.update(index, key)
            losses.append(loss.item())
            ranks.append(float(sk.effective_rank(key, order=2)))
    seconds = (time.perf_counter() - began) / (epochs * len(sampler))
    return statistics.fmean(losses), statistics.fmean(ranks), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=["fashion_mnist", "digits"])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    images = load(options.data, fallback="digits").train_images[: options.images]
    for greedy in (False, True):
        torch.manual_seed(0)
        bank = sk.MemoryBank(len(images), 32)
        sampler: Sampler
        if greedy:
            sampler = sk.GreedyBatchSampler(bank, options.batch_size, candidates=16, min_seen=0.5)
        else:
            sampler = sk.RandomBatchSampler(bank, options.batch_size)
        loss, rank, seconds = train(images, bank, sampler, options.epochs)
        choosing = sampler.selection_seconds / options.epochs / len(sampler)
        print(
            f"{type(sampler).__name__}: last epoch's loss {loss:.3f}, effective rank of its batches {rank:.2f}, "
            f"{1000 * seconds:.0f} ms a step, of which choosing {1000 * choosing:.1f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
