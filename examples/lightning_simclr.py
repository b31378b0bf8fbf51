"""SimCLR in Lightning: ordinary batches beside greedy ones from a memory bank, watched by `SpectrumMonitor`.

make lightning                             or: python examples/lightning_simclr.py --epochs 20
"""

import lightning.pytorch as pl
import torch
from common import SimCLR, read_options
from torch import Tensor
from torch.utils.data import DataLoader

import spectral_kernels as sk
from spectral_kernels.integrations import BankUpdater
from spectral_kernels.integrations.lightning import lightning_bank_callback
from spectral_kernels.monitor.lightning import lightning_callback


class Module(pl.LightningModule):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.model = SimCLR(images)

    def training_step(self, images: Tensor, _: int) -> dict[str, Tensor]:
        first, second = self.model(images)
        loss = sk.nt_xent(first, second, temperature=0.2)
        return {"loss": loss, "query": first.detach(), "key": second.detach()}  # both for the monitor

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    options, data = read_options(__doc__)
    images, size = data.train_images, options.batch_size
    for name in ("ordinary", "greedy"):
        module, callbacks = Module(images), []
        loader = DataLoader(images, size, shuffle=True, drop_last=True)
        if name == "greedy":  # all that is ours: batches from a bank, which a callback keeps up, and a monitor
            sampler = sk.GreedyBatchSampler(sk.MemoryBank(len(images), 32), size)
            loader = DataLoader(images, batch_sampler=sampler)
            monitor = lightning_callback(sk.SpectrumMonitor("monitor.csv", temperature=0.2))
            callbacks = [lightning_bank_callback(BankUpdater(sampler, module.model.head)), monitor]
        trainer = pl.Trainer(
            max_epochs=options.epochs, accelerator="cpu", use_distributed_sampler=False, callbacks=callbacks,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)
        print(f"{name:8} batches: {module.model.report(data)}")


if __name__ == "__main__":
    main()
