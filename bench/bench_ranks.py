"""What the ranks' batches have together, chosen apart or as one: python bench/bench_ranks.py. Writes a table in Markdown.

Rows: 20,000 photographs of Fashion-MNIST by their first 128 principal components, without labels, and Gaussian rows whose
spectrum falls as 1/i. A rank's batch has 64 rows; the effective rank (order 2) is that of all ranks' rows, the mean over the
first 20 batches of an epoch, ± its standard error over 5 seeds. The time is rank 0's for a batch, the median.
"""

import statistics
import time
from collections.abc import Callable

import torch
from table import as_table
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.training.data import load

BATCH, BATCHES, SEEDS = 64, 20, 5


def photographs() -> Tensor:
    images = load("fashion_mnist").train_images[:20000].flatten(1).float()
    images -= images.mean(0)
    return images @ torch.linalg.eigh(images.T @ images)[1][:, -128:]


def falling() -> Tensor:
    return torch.randn(20000, 128, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 129).sqrt()


def sampler(kind: str, bank: sk.MemoryBank, size: int, ranks: int, rank: int, seed: int) -> sk.RandomBatchSampler:
    if kind == "random":
        return sk.RandomBatchSampler(bank, size, num_replicas=ranks, rank=rank, seed=seed)
    replacement = kind == "with replacement"
    return sk.GreedyBatchSampler(bank, size, replacement=replacement, num_replicas=ranks, rank=rank, seed=seed)


def measured(parts: Callable[[int], list[sk.RandomBatchSampler]]) -> tuple[float, float, float]:
    """Mean and standard error over seeds of the union's rank, and the seconds of the first part, a batch."""
    means, seconds = [], []
    for seed in range(SEEDS):
        made = parts(seed)
        epochs = [iter(part) for part in made]
        ranks = []
        for _ in range(BATCHES):
            began = time.perf_counter()
            rows = [next(epochs[0])]
            seconds.append(time.perf_counter() - began)
            rows += [next(epoch) for epoch in epochs[1:]]
            ranks.append(float(sk.effective_rank(BANK.embeddings[torch.tensor(rows).flatten()], order=2)))
        means.append(statistics.mean(ranks))
    return statistics.mean(means), statistics.stdev(means) / SEEDS**0.5, statistics.median(seconds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = []
    for name, rows in (("photographs", photographs()), ("falling spectrum", falling())):
        BANK = sk.MemoryBank(*rows.shape)
        BANK.update(torch.arange(len(rows)), rows)
        for ranks in (2, 4, 8):
            for label, kind, shares, size in (
                ("random", "random", ranks, BATCH),
                ("greedy partition, each rank its own", "partition", ranks, BATCH),
                ("greedy partition, all ranks at once", "partition", 1, BATCH * ranks),
                ("greedy with replacement, each rank its own", "with replacement", ranks, BATCH),
                ("greedy with replacement, all ranks at once", "with replacement", 1, BATCH * ranks),
            ):
                mean, error, seconds = measured(
                    lambda seed: [sampler(kind, BANK, size, shares, rank, seed) for rank in range(shares)]  # noqa: B023
                )
                lines.append([name, str(ranks), label, f"{mean:.2f} ± {error:.2f}", f"{1e3 * seconds:.1f}"])
    print(as_table(["rows", "ranks", "batches", "effective rank together", "ms"], lines))
