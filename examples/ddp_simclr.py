"""SimCLR under DistributedDataParallel: negatives, bank and batches over all processes.

    make ddp                                   or: torchrun --nproc-per-node 2 examples/ddp_simclr.py --epochs 4

Every process chooses from its own shard of the rows, without communication; embeddings are gathered with their gradients, so
that the gradients which DistributedDataParallel averages are those of the whole batch; every bank learns from the gathered
rows. On GPUs the process group is NCCL's and each process takes the device of its local rank.
"""

import argparse
import os
import time
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import spectral_kernels as sk
from spectral_kernels.distributed import distributed_effective_rank, gather_rows
from spectral_kernels.training.augment import Augment, Normalize
from spectral_kernels.training.config import AugmentConfig
from spectral_kernels.training.data import load


def make_encoder(images: Tensor, d: int) -> nn.Module:
    channels, size = images.shape[1], images.shape[2]
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    features = 64 * (-(-size // 4)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, d))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=["fashion_mnist", "digits"])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument(
        "--candidates", type=int, default=16, help="rows looked at for each pick; 0 takes random batches"
    )
    options = parser.parse_args()
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if rank > 0:  # what is to be said is said once
        warnings.simplefilter("ignore")
    images = load(options.data, fallback="digits").train_images[: options.images]
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_encoder(images, 32)) if gpus else make_encoder(images, 32)
    model = DistributedDataParallel(model.to(device))
    bank = sk.MemoryBank(len(images), 32, device=device)
    size = options.batch_size // ranks
    sampler: sk.GreedyBatchSampler | sk.RandomBatchSampler
    if options.candidates:
        sampler = sk.GreedyBatchSampler(bank, size, candidates=options.candidates, min_seen=0.5)
    else:
        sampler = sk.RandomBatchSampler(bank, size)
    augment = Augment(AugmentConfig(), Normalize(images.to(device)), channels_last=False)
    noise = torch.Generator(device).manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = TensorDataset(torch.arange(len(images)), images)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        began, steps, total = time.perf_counter(), 0, torch.zeros((), device=device)
        for index, batch in DataLoader(data, batch_sampler=sampler):
            views = augment(batch.to(device).repeat(2, 1, 1, 1), noise)
            first, second = (gather_rows(part) for part in model(views).chunk(2))
            loss = sk.nt_xent(first, second, temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            indices = [torch.empty_like(index, device=device) for _ in range(ranks)]
            dist.all_gather(indices, index.to(device))
            bank.update(torch.cat(indices), first.detach())
            total += loss.detach()
            steps += 1
        diversity = distributed_effective_rank(first.detach().chunk(ranks)[rank], order=2)
        if rank == 0:
            seconds = time.perf_counter() - began
            print(
                f"epoch {epoch}: loss {float(total) / steps:.3f}, effective rank of the last batch {float(diversity):.2f}, "
                f"{steps * size * ranks / seconds:.0f} images a second on {ranks} processes, bank seen "
                f"{100 * bank.staleness().seen:.0f} %",
                flush=True,
            )
    checksum = torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum()
    everywhere = [torch.empty_like(checksum) for _ in range(ranks)]
    dist.all_gather(everywhere, checksum)
    assert all(torch.equal(one, checksum) for one in everywhere), "the processes' weights have parted"
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
