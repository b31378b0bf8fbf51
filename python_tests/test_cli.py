"""The command line: what it prints, writes and refuses."""

import sys
from pathlib import Path

import pytest
from process_helpers import run_python

from spectral_kernels import cli

pytestmark = pytest.mark.filterwarnings("ignore:the memory bank is cold")
QUICK = ["train.steps=4", "evaluate.every=2", "evaluate.train_images=200", "train.checkpoint_every=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, str]:
    """What a command that ends with this status writes."""
    assert cli.main(list(words)) == status
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.parametrize(
    "words",
    [["--help"], *([name, "--help"] for name in ("train", "compare", "band", "variance", "inspect", "order", "bench"))],
)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert len(out) > 200
    assert max(map(len, out.splitlines())) <= 100
    if words[0] not in ("bench", "inspect", "order"):
        assert "spectral-kernels" in out
        assert "train.steps=" in out


def test_version_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("spectral_kernels 0.")
    assert "greedy" in run(capsys, "info")[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--config", "tinny"], "no config 'tinny': name a YAML file or one of cifar10_moco, cifar10_simclr,"),
        (["train", "--config", "tiny", "train.stpes=3"], "unknown key train.stpes; did you mean train.steps?"),
        (["train", "--config", "tiny", "selection.strategy=best"], "unknown strategy 'best'"),
        (["compare", "--config", "tiny", "compare.strategies=[greedy-8]"], "has no 'random' to take the target from"),
        (["compare", "--config", "tiny", "train.batch_size=5000"], "batch_size = 5000 exceeds"),
        (["train", "data.root=nowhere"], "Fashion-MNIST was not found in nowhere"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, *words, status=1)
    assert err.startswith("spectral-kernels: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError, match="no config"):
        cli.main(["train", "--debug", "--config", "tinny"])


@pytest.mark.parametrize("words", [[], ["trian"], ["train", "--stpes", "3"], ["info", "more"]])
def test_bad_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: spectral-kernels" in capsys.readouterr().err


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", "tiny", *QUICK[:2], "--out", "here", *QUICK[2:]]
    out, err = run(capsys, *words)
    assert err == ""
    assert "untrained encoder" in out
    assert "greedy-8, seed 0: step 4" in out
    assert "selection overhead" in out
    files = ["last.ckpt", "monitor.csv", "monitor_spectrum.csv", "results.csv", "steps.csv"]
    # one measurement is no picture yet
    assert sorted(path.name for path in Path("here").iterdir()) == [".lock", *files]
    out, _ = run(capsys, *words)
    assert "finished before" in out
    _, err = run(capsys, *words, "train.temperature=0.5", status=1)
    assert "train.temperature is 0.2 there and 0.5 here. Start anew with --fresh" in err
    out, _ = run(capsys, *words, "train.temperature=0.5", "--fresh")
    Path("here/last.ckpt").write_bytes(b"junk")
    _, err = run(capsys, *words, status=1)
    assert "here/last.ckpt cannot be read as a checkpoint" in err


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "compare", "--config", "tiny", *QUICK)
    assert err == ""
    for text in ("untrained encoder", "random", "pool-balanced", "greedy-8", "Target: linear probe", "overhead, %"):
        assert text in out
    names = {path.name for path in Path("runs/compare-tiny").iterdir()}
    assert names == {".lock", "runs", "results.csv", "steps.csv", "summary.json", "comparison.png"}


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    words = [*QUICK, "compare.seeds=[0]", "compare.strategies=[random, greedy-8]"]
    for _ in ("anew", "finished before"):
        out, err = run(capsys, "compare", "--config", "tiny", *words)
        assert "8/8" in err
        assert "seed 0: step" not in out


def test_compare_without_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [*QUICK, "compare.strategies=[random]", "compare.seeds=[0]"]
    out, _ = run(capsys, "compare", "--config", "tiny", *words)
    assert "No picture: drawing a plot needs matplotlib" in out
    assert "pip install 'spectral_kernels[train]'" in out
    assert Path("runs/compare-tiny/summary.json").exists()


def test_bench_needs_the_source_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "spectral_kernels"
    package.mkdir()
    monkeypatch.setattr(cli.spectral_kernels, "__file__", str(package / "__init__.py"))
    _, err = run(capsys, "bench", status=1)
    assert "bench needs the source tree" in err
    script = tmp_path / "bench" / "run.py"
    script.parent.mkdir()
    script.write_text("import sys; sys.exit(3 if sys.argv[1:] == ['--quick'] else 4)")
    assert cli.main(["bench", "--quick"]) == 3


def test_interrupt_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    _, err = run(capsys, "train", "--config", "tiny", status=130)
    assert err == "spectral-kernels: interrupted; the same command goes on from the last checkpoint\n"


def test_as_a_process() -> None:
    """The exit status and the streams, as a shell sees them."""
    done = run_python("-m", "spectral_kernels.cli", "train", "--config", "tinny", status=1)
    assert done.stdout == ""
    assert done.stderr.startswith("spectral-kernels: error: no config")
