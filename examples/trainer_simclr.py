"""SimCLR in Transformers' Trainer: ordinary batches beside greedy ones from a memory bank.

make trainer                               or: python examples/trainer_simclr.py --epochs 20
"""

import tempfile
from typing import Any

from common import SimCLR, read_options
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import spectral_kernels as sk
from spectral_kernels.integrations import BankUpdater
from spectral_kernels.integrations.transformers import transformers_callback


class Model(SimCLR):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"loss": sk.nt_xent(*super().forward(images), temperature=0.2)}


class GreedyTrainer(Trainer):  # ours, with the two lines marked below: batches from a bank, which a callback keeps up
    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=self.sampler))


def main() -> None:
    options, data = read_options(__doc__)
    images = [{"images": image} for image in data.train_images]
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=options.batch_size, num_train_epochs=options.epochs,
        learning_rate=1e-3, dataloader_drop_last=True, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    for kind in (Trainer, GreedyTrainer):
        model = Model(data.train_images)
        trainer = kind(model, arguments, train_dataset=images)
        if kind is GreedyTrainer:  # ours
            trainer.sampler = sk.GreedyBatchSampler(sk.MemoryBank(len(images), 32), options.batch_size)
            trainer.add_callback(transformers_callback(BankUpdater(trainer.sampler, model.head)))
        trainer.train()
        print(f"{kind.__name__:13}: {model.report(data)}")


if __name__ == "__main__":
    main()
