"""Node embeddings of a part of WordNet's noun graph, trained with InfoNCE on random and on diverse batches.

    make graph                                 or: python examples/graph.py --steps 200

A node is embedded near its hypernyms: an anchor's positive is one of its hypernyms, the negatives are the other anchors'.
Printed: how diverse the embeddings are, overall and by category, what a batch of either kind spans, and how well the graph is
reconstructed (Nickel and Kiela 2017): how often a node's hypernym is the nearest of 5000.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import wordnet
from torch import Tensor, nn

import spectral_kernels as sk

DIM, TEMPERATURE, LEARNING_RATE = 64, 0.1, 0.05


@dataclass(frozen=True)
class Graph:
    """Edges (e, 2) from node to hypernym, and every node's category."""

    edges: Tensor
    categories: Tensor


def read_graph(folder: Path, categories: list[str]) -> Graph:
    wanted = {number for number, name in wordnet.CATEGORIES.items() if name in categories}
    synsets = [synset for synset in wordnet.read(folder, ("noun",)) if synset.category in wanted]
    number = {synset.key: place for place, synset in enumerate(synsets)}
    edges = torch.tensor(
        [(number[synset.key], number[parent]) for synset in synsets for parent in synset.parents if parent in number]
    )
    return Graph(edges, torch.tensor([synset.category for synset in synsets]))


def choose(graph: Graph, table: Tensor, batch: int, greedy: bool, generator: torch.Generator) -> Tensor:
    """Edges (batch, 2) whose nodes are drawn at random, or picked one by one among 16 random edges each."""
    if not greedy:
        return graph.edges[torch.randint(len(graph.edges), (batch,), generator=generator)]
    # a pool of edges: their nodes' rows are all that is read of the table
    pool = graph.edges[torch.randint(len(graph.edges), (8 * batch,), generator=generator)]
    picks = sk.greedy_select(table[pool[:, 0]], batch, candidates=16, generator=generator)
    return pool[picks.indices]


def hits(graph: Graph, table: Tensor, nearest: int = 1, candidates: int = 5000) -> float:
    """Share of edges, of 2000, whose hypernym is nearer than those of other edges."""
    generator = torch.Generator().manual_seed(1)
    others, edges = (
        graph.edges[torch.randint(len(graph.edges), (count,), generator=generator)] for count in (candidates, 2000)
    )
    unit = nn.functional.normalize(table, dim=1)
    node, parent = unit[edges[:, 0]], unit[edges[:, 1]]
    own = (node * parent).sum(1, keepdim=True)
    other = (node @ unit[others[:, 1]].T).masked_fill(others[None, :, 1] == edges[:, 1:], -torch.inf)
    return float(((other > own).sum(1) < nearest).float().mean())


def train(graph: Graph, steps: int, batch: int, greedy: bool) -> tuple[Tensor, float, float]:
    """The table of embeddings, the mean order-2 rank of its batches, and the seconds it took."""
    generator = torch.Generator().manual_seed(2)
    table = nn.Parameter(0.1 * torch.randn(len(graph.categories), DIM, generator=generator))
    optimizer = torch.optim.Adam([table], lr=LEARNING_RATE)
    ranks = []
    begin = time.perf_counter()
    for _ in range(steps):
        edges = choose(graph, table.detach(), batch, greedy, generator)
        ranks.append(sk.effective_rank(table.detach()[edges[:, 0]], order=2))
        loss = sk.info_nce(table[edges[:, 0]], table[edges[:, 1]], temperature=TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return table.detach(), float(torch.stack(ranks).mean()), time.perf_counter() - begin


def diversity(graph: Graph, table: Tensor) -> list[str]:
    ranks = {order: float(sk.effective_rank(table, order=order)) for order in (1.0, 2.0, float("inf"))}
    lines = [
        "effective rank of all nodes, of " + f"{DIM}: " + ", ".join(f"order {o:g} {r:.1f}" for o, r in ranks.items())
    ]
    by_category = {
        wordnet.CATEGORIES[int(category)]: float(sk.effective_rank(table[graph.categories == category], order=2))
        for category in graph.categories.unique()
        if int((graph.categories == category).sum()) >= DIM
    }
    ordered = sorted(by_category, key=lambda name: by_category[name])
    if ordered:
        ends = dict.fromkeys([*ordered[:3], *ordered[-3:]])
        lines.append("order 2 by category: " + ", ".join(f"{name} {by_category[name]:.1f}" for name in ends))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument(
        "--categories",
        nargs="+",
        default=["noun.animal", "noun.plant", "noun.food", "noun.artifact"],
        choices=[name for name in wordnet.CATEGORIES.values() if name.startswith("noun.")],
    )
    options = parser.parse_args()
    graph = read_graph(wordnet.find(), options.categories)
    print(f"{len(graph.categories)} nouns, {len(graph.edges)} edges")
    rows = []
    for name, greedy in (("random", False), ("greedy-16", True)):
        table, rank, seconds = train(graph, options.steps, options.batch_size, greedy)
        rows.append(f"{name:10} {rank:16.2f} {100 * hits(graph, table):14.1f} {seconds:9.1f}")
        if not greedy:
            print("\n".join(diversity(graph, table)))
    print(f"\n{'batches':10} {'rank of a batch':>16} {'hits at 1, %':>14} {'seconds':>9}")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
