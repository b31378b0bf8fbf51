"""Node embeddings of a part of WordNet's noun graph, trained with InfoNCE on random and on diverse batches.

    make graph                                 or: python examples/graph.py --steps 200

A node is embedded near its hypernyms: an anchor's positive is one of its hypernyms, the negatives are the other anchors'.
Printed: how diverse the embeddings are, overall and by category, what a batch of either kind spans, and how well the graph is
reconstructed (Nickel and Kiela 2017): how often a node's hypernym is the nearest of 5000.
"""

import argparse
import time

import torch
import wordnet
from torch import Tensor, nn

import spectral_kernels as sk

DIM = 64


def draw(edges: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return edges[torch.randint(len(edges), (count,), generator=generator)]


def hits(edges: Tensor, table: Tensor) -> float:
    """Share of edges, of 2000, whose hypernym is nearer than those of 5000 other edges."""
    generator = torch.Generator().manual_seed(1)
    others, tested = (draw(edges, count, generator) for count in (5000, 2000))
    unit = nn.functional.normalize(table, dim=1)
    own = (unit[tested[:, 0]] * unit[tested[:, 1]]).sum(1, keepdim=True)
    other = (unit[tested[:, 0]] @ unit[others[:, 1]].T).masked_fill(others[None, :, 1] == tested[:, 1:], -torch.inf)
    return float((other <= own).all(1).float().mean())


def train(edges: Tensor, nodes: int, steps: int, size: int, greedy: bool) -> tuple[Tensor, float]:
    """The table of embeddings, and the mean order-2 rank of its batches."""
    generator, ranks = torch.Generator().manual_seed(2), []
    table = nn.Parameter(0.1 * torch.randn(nodes, DIM, generator=generator))
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(steps):
        batch = draw(edges, 8 * size if greedy else size, generator)
        if greedy:  # picked from a pool of edges: their nodes' rows are all that is read of the table
            picks = sk.greedy_select(table.detach()[batch[:, 0]], size, candidates=16, generator=generator)
            batch = batch[picks.indices]
        anchors, positives = table[batch].unbind(1)
        ranks.append(sk.effective_rank(anchors.detach(), order=2))
        loss = sk.info_nce(anchors, positives, temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return table.detach(), float(torch.stack(ranks).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=512)
    default = ["noun.animal", "noun.plant", "noun.food", "noun.artifact"]
    parser.add_argument("--categories", nargs="+", default=default, choices=list(wordnet.CATEGORIES.values())[3:29])
    options = parser.parse_args()
    synsets = [
        s for s in wordnet.read(wordnet.find(), ("noun",)) if wordnet.CATEGORIES[s.category] in options.categories
    ]
    number = {synset.key: place for place, synset in enumerate(synsets)}
    edges = torch.tensor([(number[s.key], number[parent]) for s in synsets for parent in s.parents if parent in number])
    print(f"{len(synsets)} nouns, {len(edges)} edges")
    for name in ("random", "greedy-16"):
        began = time.perf_counter()
        table, rank = train(edges, len(synsets), options.steps, options.batch_size, name == "greedy-16")
        seconds = time.perf_counter() - began
        if name == "random":
            ranks = [f"order {order:g} {sk.effective_rank(table, order=order):.1f}" for order in (1, 2, float("inf"))]
            print(f"effective rank of all nodes, of {DIM}: {', '.join(ranks)}")
            categories = torch.tensor([synset.category for synset in synsets])
            members = {wordnet.CATEGORIES[int(one)]: table[categories == one] for one in categories.unique()}
            ranks = [f"{category} {sk.effective_rank(z, order=2):.1f}" for category, z in members.items()]
            print(f"order 2 by category: {', '.join(ranks)}")
            print(f"\n{'batches':10} {'rank of a batch':>16} {'hits at 1, %':>14} {'seconds':>9}")
        print(f"{name:10} {rank:16.2f} {100 * hits(edges, table):14.1f} {seconds:9.1f}")


if __name__ == "__main__":
    main()
