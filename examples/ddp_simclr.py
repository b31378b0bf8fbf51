"""SimCLR under DistributedDataParallel: negatives, bank and batches over all processes.

    make ddp                                   or: torchrun --nproc-per-node 2 examples/ddp_simclr.py --epochs 4

Every process chooses from its own shard of the rows, without communication (--candidates 0: random batches); embeddings are
gathered with their gradients, so that the gradients which DistributedDataParallel averages are those of the whole batch; every
bank learns from the gathered rows. On GPUs the process group is NCCL's and each process takes the device of its local rank.
"""

import os
import time

import torch
import torch.distributed as dist
from common import SimCLR, read_options
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import spectral_kernels as sk
from spectral_kernels.distributed import distributed_effective_rank, gather_rows


def main() -> None:
    options, data = read_options(__doc__, candidates=16)
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    images, size = data.train_images, options.batch_size // ranks
    simclr = SimCLR(images.to(device), rank).to(device)
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(simclr) if gpus else simclr)
    bank = sk.MemoryBank(len(images), 32, device=device)
    greedy = sk.GreedyBatchSampler(bank, size, candidates=options.candidates or 1)
    loader = DataLoader(
        TensorDataset(torch.arange(len(images)), images),
        batch_sampler=greedy if options.candidates else sk.RandomBatchSampler(bank, size),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(options.epochs):
        began, losses = time.perf_counter(), []
        for index, batch in loader:
            first, second = (gather_rows(part) for part in model(batch.to(device)))
            loss = sk.nt_xent(first, second, temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            indices = [torch.empty_like(index, device=device) for _ in range(ranks)]
            dist.all_gather(indices, index.to(device))
            bank.update(torch.cat(indices), first.detach())
            losses.append(loss.detach())
        diversity = float(distributed_effective_rank(first.detach().chunk(ranks)[rank], order=2))
        if rank == 0:
            speed = len(losses) * size * ranks / (time.perf_counter() - began)
            print(
                f"epoch {epoch}: loss {torch.stack(losses).mean():.3f}, effective rank of the last batch {diversity:.2f}, "
                f"{speed:.0f} images a second on {ranks} processes, bank seen {bank.staleness().seen:.0%}"
            )
    checksum = torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum()
    everywhere = [torch.empty_like(checksum) for _ in range(ranks)]
    dist.all_gather(everywhere, checksum)
    assert all(torch.equal(one, checksum) for one in everywhere), "the processes' weights have parted"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
