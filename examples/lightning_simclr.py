"""SimCLR in PyTorch Lightning with greedy batches from a memory bank, watched by `SpectrumMonitor`.

    make lightning                             or: python examples/lightning_simclr.py --epochs 4

What it shows: a batch sampler of this package as the data loader's `batch_sampler`, the bank refreshed from the training step's
own embeddings, the sampler's epoch set by a callback, and the monitor's callback. Fashion-MNIST, or scikit-learn's digits.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import spectral_kernels as sk
from spectral_kernels.monitor.lightning import lightning_callback
from spectral_kernels.training.augment import Augment, Normalize
from spectral_kernels.training.config import AugmentConfig
from spectral_kernels.training.data import load


class Indexed(Dataset[tuple[int, Tensor]]):
    """Images with their index, by which the bank knows them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.images[index]


class SimCLR(pl.LightningModule):
    def __init__(self, images: Tensor, bank: sk.MemoryBank, temperature: float = 0.2) -> None:
        super().__init__()
        self.bank, self.temperature = bank, temperature
        self.augment = Augment(AugmentConfig(), Normalize(images), channels_last=False)
        channels, size = images.shape[1], images.shape[2]
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        features = 64 * (-(-size // 4)) ** 2
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, bank.d))
        self.noise = torch.Generator().manual_seed(0)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> dict[str, Tensor]:
        index, images = batch
        first, second = self.model(self.augment(images.repeat(2, 1, 1, 1), self.noise)).chunk(2)
        self.bank.update(index, first.detach())
        loss = sk.nt_xent(first, second, temperature=self.temperature)
        # what the monitor's callback reads
        return {"loss": loss, "query": first.detach(), "key": second.detach()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class SetEpoch(pl.Callback):
    """Lightning knows a sampler's `set_epoch`, but not that of a batch sampler."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.sampler.set_epoch(trainer.current_epoch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=["fashion_mnist", "digits"])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    images = load(options.data, fallback="digits").train_images[: options.images]
    for greedy in (False, True):
        pl.seed_everything(0, verbose=False)
        bank = sk.MemoryBank(len(images), 32)
        sampler: sk.GreedyBatchSampler | sk.RandomBatchSampler
        if greedy:
            sampler = sk.GreedyBatchSampler(bank, options.batch_size, candidates=16, min_seen=0.5)
        else:
            sampler = sk.RandomBatchSampler(bank, options.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            monitor = sk.SpectrumMonitor(Path(folder) / "monitor.csv", temperature=0.2, every=10)
            trainer = pl.Trainer(
                max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
                callbacks=[SetEpoch(sampler), lightning_callback(monitor)],
            )  # fmt: skip
            trainer.fit(SimCLR(images, bank), DataLoader(Indexed(images), batch_sampler=sampler))
            with (Path(folder) / "monitor.csv").open(newline="") as file:
                ranks = [float(row["effective_rank"]) for row in csv.DictReader(file)]
        rank = statistics.fmean(ranks[len(ranks) // 2 :])
        print(
            f"{type(sampler).__name__}: {trainer.global_step} steps, {100 * bank.staleness().seen:.0f} % of the bank seen, "
            f"choosing took {sampler.selection_seconds:.2f} s, effective rank of the later half's batches {rank:.2f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
