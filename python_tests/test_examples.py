"""The examples on small data in the true format; `make check-examples` runs them on the real one."""

import math
import sys
from pathlib import Path

import pytest
import torch
from process_helpers import ROOT, run_python
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "examples"))

import sentences
import wordnet

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by\n"


def noun(number: int, parent: int | None, category: int = 5) -> str:
    pointers = "000" if parent is None else f"001 @ {parent:08d} n 0000"
    return (
        f'{number:08d} {category:02d} n 02 word_{number} 0 other 0 {pointers} | sense {number}; "he sees {number}"  \n'
    )


def write_nouns(folder: Path, count: int) -> None:
    lines = [noun(i, None if i == 0 else (i - 1) // 3, 5 + i % 2) for i in range(count)]
    (folder / "data.noun").write_text(LICENCE + "".join(lines), encoding="latin-1")


def test_wordnet_is_read_in_its_format(tmp_path: Path) -> None:
    write_nouns(tmp_path, 4)
    (tmp_path / "data.adj").write_text(
        LICENCE + '00001740 00 s 01 galore(ip) 0 001 & 00002098 a 0000 | in great numbers; "daffodils galore"  \n'
        "00002098 00 a 01 un\u00e9 0 000 | few  \n",
        encoding="latin-1",
    )
    found = wordnet.read(tmp_path, ("noun", "adj"))
    assert [synset.key for synset in found] == [*(f"n0000000{i}" for i in range(4)), "a00001740", "a00002098"]
    assert found[2] == wordnet.Synset("n00000002", ("word 2", "other"), "sense 2", 5, ("n00000000",))
    assert found[4].words == ("galore",) and found[4].definition == "in great numbers" and found[4].parents == ()
    assert found[5].words == ("un\u00e9",)


def test_a_line_that_is_no_synset_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(noun(1, None) + "00000002 05 n 01 cut off\n")
    with pytest.raises(ValueError, match=r"data.noun, line 2: not a synset: '00000002 05 n 01"):
        wordnet.read(tmp_path, ("noun",))


def test_a_missing_wordnet_is_said_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(FileNotFoundError, match="data/wordnet"):
        wordnet.find()


def test_graph_runs(tmp_path: Path) -> None:
    write_nouns(tmp_path, 200)
    done = run_python(
        *["examples/graph.py", "--steps", "30", "--batch-size", "20", "--categories", "noun.animal", "noun.artifact"],
        SPECTRAL_KERNELS_DATA=str(tmp_path),
    )
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in done.stdout.splitlines()[-2:]}
    assert rows.keys() == {"random", "greedy-16"}
    assert rows["greedy-16"][0] > rows["random"][0]
    assert min(row[1] for row in rows.values()) > 50


class Layer(nn.Module):
    """Stands for a transformer's layer: sees each position alone."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, states: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        assert attention_mask.shape == (len(states), 1, 1, states.shape[1])
        return (self.linear(states),)


def texts(n: int, length: int, d: int, like: Tensor) -> sentences.Texts:
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, 1))
    states = like[:, None] + 0.1 * torch.randn(n, length, d)
    # what is no word must not count
    return sentences.Texts(torch.where(mask[..., None], states, 1e3).half(), mask)


@pytest.mark.parametrize("greedy", (False, True))
def test_sentences_learn_their_pairs(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "LEARNING_RATE", 0.02)
    n, d = 96, 12
    meaning, nothing = torch.randn(n, 6), torch.zeros(n, 3)
    # what either has of its own must be left out
    definitions = texts(n, 5, d, torch.cat([meaning, 4 * torch.randn(n, 3), nothing], 1))
    words = texts(n, 3, d, torch.cat([meaning, nothing, 4 * torch.randn(n, 3)], 1))
    layer = Layer(d)
    start = sentences.embed_all(layer, definitions)
    assert start.isfinite().all()
    before = sentences.recall(layer, definitions, words)
    trained, rank, _ = sentences.train(layer, definitions, words, start, 120, 32, greedy)
    assert sentences.recall(trained, definitions, words) > before + 0.2
    assert 1 <= rank <= d
    assert sentences.recall(layer, definitions, words) == before
    lines = sentences.diversity(start, torch.arange(n) % 2)
    assert "of 12" in lines[0] and "adj.pert" in lines[1]


@pytest.mark.parametrize("candidates", (0, 8))
def test_ddp_runs_on_two_processes(candidates: int) -> None:
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 examples/ddp_simclr.py --data digits"
    options = f"--images 300 --batch-size 64 --epochs 3 --candidates {candidates}"
    done = run_python(*command.split(), *options.split(), OMP_NUM_THREADS="1")
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert all("on 2 processes" in line for line in epochs)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in epochs]
    # of a collapsed encoder it is ln(2B - 1)
    assert losses[-1] < losses[0] and losses[-1] < math.log(127) - 0.3
    ranks = [float(line.split("last batch ")[1].split(",")[0]) for line in epochs]
    assert ranks[-1] > 2 and ranks[-1] > ranks[0]
