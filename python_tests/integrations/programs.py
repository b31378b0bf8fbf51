"""What the tests run under torchrun: a trainer on rows that are their own numbers, and what each rank saw of them.

python -m torch.distributed.run --nproc-per-node 2 programs.py NAME OUT [ARGUMENT ...]
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from spectral_kernels import GlobalBatchSampler, GreedyBatchSampler, MemoryBank, PoolBatchSampler, RandomBatchSampler
from spectral_kernels.integrations import BankUpdater

N, D, BATCH = 61, 8, 6


class Numbers(Dataset[dict[str, Tensor]]):
    """Row i is i, and a vector that says so."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"row": torch.tensor(i), "x": torch.eye(D)[i % D] + i / N}


class Model(nn.Module):
    """An encoder whose embedding tells the row, since its weights never change; `rows` is what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows: list[list[int]] = []

    def forward(self, row: Tensor, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.rows.append(row.tolist())
        z = self.encoder(x)
        self.encoder(x + 1)  # a second view, which is not what the bank holds
        return {"loss": (z * self.weight).sum() * 0}


def bank_of_all() -> MemoryBank:
    bank = MemoryBank(N, D)
    bank.update(torch.arange(N), torch.randn(N, D, generator=torch.Generator().manual_seed(0)))
    return bank


def sampler_of(kind: str, bank: MemoryBank, drop_last: bool) -> Any:
    if kind == "random":
        return RandomBatchSampler(bank, BATCH, drop_last=drop_last)
    if kind == "global":
        both = GreedyBatchSampler(
            bank, 2 * BATCH, candidates=8, replacement=False, drop_last=drop_last, num_replicas=1, rank=0
        )
        return GlobalBatchSampler(both)
    if kind == "pool":
        return PoolBatchSampler(bank, BATCH, draws=4, replacement=False, drop_last=drop_last)
    return GreedyBatchSampler(bank, BATCH, candidates=8, replacement=False, drop_last=drop_last)


def told(bank: MemoryBank) -> dict[str, Any]:
    """Which rows hold the embedding that `Model` makes of them."""
    z = torch.stack([Numbers()[i]["x"] for i in range(N)])
    same = torch.isclose(bank.embeddings, torch.nn.functional.normalize(z, dim=1), atol=1e-6).all(1)
    return {"right": same.nonzero()[:, 0].tolist(), "embeddings": bank.embeddings.tolist(), "step": bank.step}


def accelerate(out: Path) -> Any:
    from accelerate import Accelerator

    def train(kind: str, drop_last: bool) -> Any:
        bank = bank_of_all()
        sampler = sampler_of(kind, bank, drop_last)
        accelerator = Accelerator(cpu=True)
        model, loader = accelerator.prepare(Model(), DataLoader(Numbers(), batch_sampler=sampler))
        inner = accelerator.unwrap_model(model)
        updater = BankUpdater(sampler, inner.encoder) if kind != "random" else None
        for _ in range(2):
            for batch in loader:
                model(**batch)
                if updater is not None:
                    updater.batch_end()
        return {"kind": kind, "drop_last": drop_last, "rows": inner.rows, "len": len(loader), **told(bank)}

    return [train(kind, drop_last) for kind in ("random", "pool", "greedy", "global") for drop_last in (False, True)]


def trainer_of(out: Path, kind: str, drop_last: bool, bank: MemoryBank, steps: int, accumulate: int = 1) -> Any:
    from transformers import Trainer, TrainingArguments

    from spectral_kernels.integrations.transformers import transformers_callback

    sampler = sampler_of(kind, bank, drop_last)

    class DiverseTrainer(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return self.accelerator.prepare(DataLoader(Numbers(), batch_sampler=sampler))

    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=BATCH, num_train_epochs=2, max_steps=steps, save_steps=3,
        use_cpu=True, report_to=[], disable_tqdm=True, gradient_accumulation_steps=accumulate, logging_strategy="no",
    )  # fmt: skip
    model = Model()
    callback = transformers_callback(BankUpdater(sampler, model.encoder))
    return DiverseTrainer(model=model, args=arguments, train_dataset=Numbers(), callbacks=[callback])


def transformers(out: Path, kind: str, drop_last: str, accumulate: str) -> Any:
    bank = bank_of_all()
    trainer = trainer_of(out, kind, drop_last == "True", bank, -1, int(accumulate))
    trainer.train()
    return {"rows": trainer.model.rows, **told(bank)}


def transformers_resumed(out: Path, kind: str, stopped: str) -> Any:
    """Stopped after so many steps, with a checkpoint; then by another trainer from there."""
    whole_bank, bank = bank_of_all(), bank_of_all()
    whole = trainer_of(out / "whole", kind, False, whole_bank, 12)
    whole.train()
    first = trainer_of(out / "parts", kind, False, bank, 12)
    first.args.max_steps = int(stopped)
    first.train()
    bank = MemoryBank(N, D)
    second = trainer_of(out / "parts", kind, False, bank, 12)
    second.train(resume_from_checkpoint=True)
    return {
        "whole": whole.model.rows, "parts": first.model.rows + second.model.rows,
        "banks": [told(whole_bank)["embeddings"], told(bank)["embeddings"]],
    }  # fmt: skip


def sentence_model(texts: list[str]) -> Any:
    """A vector to each word, which is a whole text here; nothing is downloaded."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[UNK]", *texts])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    weights = torch.randn(len(words), D, generator=torch.Generator().manual_seed(1))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())], device="cpu")


def sentence_transformers(out: Path, kind: str, drop_last: str) -> Any:
    from datasets import Dataset as Table
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from spectral_kernels.integrations.transformers import sentence_transformers_batches, transformers_callback

    anchors, positives = [f"a{i}" for i in range(N)], [f"p{i}" for i in range(N)]
    model = sentence_model(anchors + positives)
    start = model.encode(anchors, convert_to_tensor=True, normalize_embeddings=True)
    bank = bank_of_all()
    sampler = sampler_of(kind, bank, drop_last == "True")
    rows: list[list[int]] = []

    class Loss(MultipleNegativesRankingLoss):
        def forward(self, features: Any, labels: Any) -> Tensor:
            if model.training:
                rows.append([i - 1 for i in features[0]["input_ids"].tolist()])
            return super().forward(features, labels)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out), per_device_train_batch_size=BATCH, num_train_epochs=2, learning_rate=0.0,
        batch_sampler=sentence_transformers_batches(sampler), eval_strategy="steps", eval_steps=4, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, loss=Loss(model),
        train_dataset=Table.from_dict({"anchor": anchors, "positive": positives}),
        eval_dataset=Table.from_dict({"anchor": anchors[:20], "positive": positives[:20]}),
        callbacks=[transformers_callback(BankUpdater(sampler, model))],
    )  # fmt: skip
    trainer.train()
    right = torch.isclose(bank.embeddings, start, atol=1e-6).all(1).nonzero()[:, 0].tolist()
    return {"rows": rows, "right": right, "step": bank.step}


def lightning(out: Path, kind: str, drop_last: str) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from spectral_kernels.integrations.lightning import lightning_bank_callback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def train(bank: MemoryBank, resume: Path | None = None, **options: Any) -> Any:
        sampler, module = sampler_of(kind, bank, drop_last == "True"), Module()
        trainer = pl.Trainer(
            strategy="ddp", devices=2, accelerator="cpu", max_epochs=2, logger=False, default_root_dir=out,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[
                lightning_bank_callback(BankUpdater(sampler, module.model.encoder)),
                ModelCheckpoint(out, filename="{step}", every_n_train_steps=4, save_top_k=-1),
            ], **options,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Numbers(), batch_sampler=sampler), ckpt_path=resume)
        return module.model.rows

    refused = ""
    try:
        train(bank_of_all())
    except TypeError as error:
        refused = str(error)
    ours = {"use_distributed_sampler": False}
    whole_bank, bank = bank_of_all(), MemoryBank(N, D)
    whole = train(whole_bank, **ours)
    second = train(bank, resume=out / "step=4.ckpt", **ours)
    return {
        "refused": refused,
        "rows": whole,
        "parts": whole[:4] + second,
        **told(whole_bank),
        "resumed": told(bank)["embeddings"],
    }


def stateful(out: Path, kind: str, workers: str) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        sampler = sampler_of(kind, bank_of_all(), False)
        return StatefulDataLoader(Numbers(), batch_sampler=sampler, num_workers=int(workers))

    whole = [batch["row"].tolist() for batch in loader()]
    first = loader()
    parts, iterator = [], iter(first)
    for _ in range(3):
        parts.append(next(iterator)["row"].tolist())
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    return {"whole": whole, "parts": parts + [batch["row"].tolist() for batch in second]}


def main() -> None:
    name, out, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    found = globals()[name](Path(out), *rest)
    Path(out, f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")
    # how a process ends in which several trainers ran is not what is tested: now and then torch's threads abort it
    os._exit(0)


if __name__ == "__main__":
    main()
