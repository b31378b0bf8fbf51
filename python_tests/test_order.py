"""`spectral-kernels order`: what it writes is an epoch, with the labels' quotas; bad files are refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import spectral_kernels as sk
from spectral_kernels import cli
from spectral_kernels.files.reading import FileError

N = 1000
Z = torch.randn(N, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17) ** -0.7
Z[5] = 0
LABELS = (torch.arange(N) ** 2 % 7).sort().values


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", Z.numpy())
    np.save("labels.npy", LABELS.numpy().astype(np.int32))
    Path("labels.csv").write_text("label\n" + "\n".join(map(str, LABELS.tolist())))
    Path("labels.txt").write_text("\n".join(map(str, LABELS.tolist())) + "\n")


def run(*words: str, status: int = 0) -> None:
    assert cli.main(["order", *words]) == status


def test_is_an_epoch_of_the_greedy_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    run("z.npy", "--batch-size", "64", "--seed", "3")
    batches = np.load("z_order.npy")
    (last,) = Path("z_order_last.jsonl").read_text().splitlines()
    assert batches.shape == (15, 64) and batches.dtype == np.int64
    options = {"replacement": False, "drop_last": False, "min_seen": 0.0, "seed": 3}
    assert [*batches.tolist(), json.loads(last)] == list(sk.GreedyBatchSampler(normalize(Z, dim=1), 64, **options))
    out = capsys.readouterr().out
    assert "15 batches of 64 and one of 40" in out
    ranks = [float(sk.effective_rank(Z[batch], order=2)) for batch in batches]
    assert f"R2 of a batch: {np.mean(ranks):.2f}, least {min(ranks):.2f}; shuffled: " in out
    run("z.npy", "--batch-size", "50")  # none is short
    assert np.load("z_order.npy").shape == (20, 50) and not Path("z_order_last.jsonl").exists()


@pytest.mark.parametrize("labels", ["labels.npy", "labels.csv", "labels.txt"])
def test_labels(labels: str) -> None:
    run("z.npy", "--batch-size", "64", "--labels", labels, "--out", "there/batches.jsonl")
    batches = [json.loads(line) for line in Path("there/batches.jsonl").read_text().splitlines()]
    assert sorted(row for batch in batches for row in batch) == list(range(N)) and len(batches) == 16
    share = LABELS.bincount() / N
    for batch in batches:
        assert float((LABELS[batch].bincount(minlength=len(share)) - len(batch) * share).abs().max()) < 1
    assert not list(Path().glob("*order*"))


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run("z.npy", "--batch-size", "100")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run("z.npy", "--batch-size", "100")
    assert " 50 %" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-size", "1001"], "--batch-size must be between 1 and 1000, got 1001"),
        (["--batch-size", "8", "--seed", "-1"], "--seed must be at least 0"),
        (["--batch-size", "8", "--out", "z.csv"], "--out must end in .npy or .jsonl, got z.csv"),
        (["--batch-size", "8", "--labels", "z.npy"], "must hold whole numbers, one a row: its shape is (1000, 16)"),
        (["--batch-size", "8", "--labels", "none.npy"], "none.npy does not exist"),
        (["--batch-size", "8", "--labels", "short.txt"], "short.txt holds 2 labels, but there are 1000 rows"),
        (["--batch-size", "8", "--labels", "words.txt"], "one whole number a line, but line 2 is ['cat']"),
        (["--batch-size", "8", "--labels", "two.csv"], "one whole number a line, but line 2 is ['1', '2']"),
        (["--batch-size", "8", "--labels", "pickle.npy"], "pickle.npy must hold whole numbers, one a row"),
        (["--batch-size", "8", "--labels", "z.pt"], "must be .npy, .csv or .txt"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.txt").write_text("1\n2\n")
    Path("words.txt").write_text("1\ncat\n")
    Path("two.csv").write_text("a,b\n1,2\n")
    np.save("pickle.npy", np.array([object()] * N), allow_pickle=True)
    run("z.npy", *words, status=1)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(Path().glob("*order*"))


def test_bad_rows(capsys: pytest.CaptureFixture[str]) -> None:
    z = Z.clone()
    z[700, 2] = torch.nan
    np.save("z.npy", z.numpy())
    run("z.npy", "--batch-size", "8", status=1)
    assert "row 700 of the embeddings holds NaN or Inf" in capsys.readouterr().err
    np.save("z.npy", torch.cat((torch.zeros(90, 3), torch.ones(3, 3))).numpy())
    run("z.npy", "--batch-size", "8", status=1)
    assert "only 3 of 93 rows are not zero" in capsys.readouterr().err
    with pytest.raises(FileError):
        cli.main(["order", "labels.txt", "--batch-size", "8", "--debug"])
