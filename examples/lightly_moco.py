"""MoCo from lightly's parts with greedy batches from a memory bank of this package.

    make lightly                               or: python examples/lightly_moco.py --epochs 20

What it shows: lightly's projection head, momentum update and loss with its queue stay as they are; the data loader takes a
batch sampler, and the bank is refreshed from the keys by the index that the data set returns.
"""

import copy
import time

import torch
from common import SimCLR, read_options
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spectral_kernels as sk


def main() -> None:
    options, data = read_options(__doc__)
    images, size = data.train_images, options.batch_size
    for kind in (sk.RandomBatchSampler, sk.GreedyBatchSampler):
        base = SimCLR(images)
        encoder = nn.Sequential(base.encoder, MoCoProjectionHead(128, 128, 32))
        momentum_encoder = copy.deepcopy(encoder)
        deactivate_requires_grad(momentum_encoder)
        criterion = NTXentLoss(temperature=0.2, memory_bank_size=(2048, 32))
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
        bank = sk.MemoryBank(len(images), 32)  # ours: the bank, batches from it, and the keys written into it
        sampler = kind(bank, size)
        loader = DataLoader(TensorDataset(torch.arange(len(images)), images), batch_sampler=sampler)
        began = time.perf_counter()
        for _ in range(options.epochs):
            losses = []
            for index, batch in loader:
                update_momentum(encoder, momentum_encoder, m=0.99)
                first, second = base.views(batch).chunk(2)
                with torch.no_grad():
                    key = momentum_encoder(second)
                loss = criterion(encoder(first), key)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bank.update(index, key)  # ours
                losses.append(loss.detach())
                base.ranks.append(sk.effective_rank(key, order=2))
        step, seconds = 1000 / len(base.ranks), time.perf_counter() - began
        print(
            f"{kind.__name__}: last epoch's loss {torch.stack(losses).mean():.3f}, {base.report(data)}, "
            f"{step * seconds:.0f} ms a step, of which choosing {step * sampler.selection_seconds:.1f}"
        )


if __name__ == "__main__":
    main()
