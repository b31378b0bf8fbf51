"""SimCLR in a loop of one's own under Accelerate, on two processes: ordinary batches beside greedy ones from a memory bank.

    make accelerate                            or: torchrun --nproc-per-node 2 examples/accelerate_simclr.py --epochs 20

Each process chooses its batches from its own half of the images; the bank, the same on both, learns from all of them.
"""

import torch
from accelerate import Accelerator
from common import SimCLR, read_options
from torch.utils.data import DataLoader

import spectral_kernels as sk
from spectral_kernels.distributed import gather_rows
from spectral_kernels.integrations import BankUpdater


def main() -> None:
    options, data = read_options(__doc__)
    accelerator = Accelerator(cpu=True)
    images, size = data.train_images, options.batch_size // accelerator.num_processes
    for name in ("ordinary", "greedy"):
        simclr, updater = SimCLR(images, accelerator.process_index), None
        loader = DataLoader(images, size, shuffle=True, drop_last=True)
        if name == "greedy":  # all that is ours: batches from a bank, which an updater keeps up
            sampler = sk.GreedyBatchSampler(sk.MemoryBank(len(images), 32), size)
            loader = DataLoader(images, batch_sampler=sampler)
            updater = BankUpdater(sampler, simclr.head)
        optimizer = torch.optim.AdamW(simclr.parameters(), lr=1e-3)
        model, optimizer, loader = accelerator.prepare(simclr, optimizer, loader)
        for _ in range(options.epochs):
            for batch in loader:
                first, second = (gather_rows(part) for part in model(batch))  # ours too: the other process's negatives
                loss = sk.nt_xent(first, second, temperature=0.2)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                if updater is not None:
                    updater.batch_end()  # and this
        accelerator.print(f"{name:8} batches on {accelerator.num_processes} processes: {simclr.report(data)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
