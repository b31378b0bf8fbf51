"""Runs that are killed, politely or not, in processes of their own: resumed, they end as if nothing had been."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_same

STEPS = 60
METHODS = {
    "simclr": ["selection.strategy=greedy-8"],
    "live": ["selection.strategy=live-8", "selection.live_pool=2"],
    "moco": ["selection.strategy=greedy-8", "train.method=moco", "moco.queue=100", "selection.overlap=true"],
}


def command(out: Path, method: str) -> list[str]:
    words = ["train", "--config", "tiny", "--out", str(out), f"train.steps={STEPS}", "train.checkpoint_every=5"]
    return [sys.executable, "-m", "spectral_kernels.cli", *words, "evaluate.every=30", *METHODS[method]]


def state(out: Path) -> dict[str, object]:
    """What a run ends with, without the clock's readings."""
    content = torch.load(out / "last.ckpt", weights_only=True)
    content["steps"] = content["steps"][:, :3]
    content["evaluations"] = [{k: v for k, v in row.items() if k != "seconds"} for row in content["evaluations"]]
    return {name: value for name, value in content.items() if name != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed(method: str, number: signal.Signals, tmp_path: Path) -> None:
    subprocess.run(command(tmp_path / "whole", method), check=True, capture_output=True)
    kills = 0
    for delay in (0.0, 0.15, 0.4, 0.7):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command(tmp_path / "parts", method), **pipes)
        ready = tmp_path / "parts" / "last.ckpt"
        while not ready.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=1800)
        if number == signal.SIGKILL:
            kills += process.returncode == -signal.SIGKILL
        elif "SIGTERM: stopped at step" in err:
            assert process.returncode == 143
            kills += 1
    assert kills > 0
    subprocess.run(command(tmp_path / "parts", method), check=True, capture_output=True)
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))


def test_sigterm_saves_at_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: the signal comes at step 7, between two checkpoints."""
    from spectral_kernels import cli
    from spectral_kernels.training import progress

    original = progress.Progress.step

    def step(self: progress.Progress, run: object) -> None:
        original(self, run)  # type: ignore[arg-type]
        if run.step == 7:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    words = ["train", "--config", "tiny", "--out", str(tmp_path), "train.steps=20", "evaluate.every=10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Progress, "step", step)
        assert cli.main(words) == 143
    assert "SIGTERM: stopped at step 7, saved in" in capsys.readouterr().err
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 7
    assert signal.getsignal(signal.SIGTERM) is handler
    assert cli.main(words) == 0
    assert "going on at step 7" in capsys.readouterr().out
