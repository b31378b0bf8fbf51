"""A synthetic data set, small settings, and runs that are killed, for the training tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same

from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.clock import PARTS
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData
from spectral_kernels.training.loop import Run, train
from spectral_kernels.training.run_state import STEP_COLUMNS
from spectral_kernels.training.settings import build_config


def blobs(count: int = 320, test: int = 80, size: int = 8, channels: int = 1, classes: int = 4) -> ImageData:
    """Noisy images of `classes` fixed patterns; the classes in turn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(60, 196, (classes, channels, size, size), generator=generator)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % classes
        noise = 30 * torch.randn(n, channels, size, size, generator=generator)
        return (patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels

    return ImageData(*split(count), *split(test), "blobs", tuple("abcdefgh"[:classes]))


def settings(**sections: dict[str, Any]) -> Config:
    """Small settings; each section is laid over them."""
    content: dict[str, dict[str, Any]] = {
        "model": {"width": 4, "hidden": 16, "dim": 8},
        "optimizer": {"lr": 0.1},
        "selection": {"min_seen": 0.2, "draws": 4},
        "train": {"batch_size": 32, "steps": 6, "rank_every": 2, "checkpoint_every": 3, "device": "cpu"},
        "evaluate": {"every": 3},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    return build_config(content)


def state_of(run: Run) -> dict[str, Any]:
    """All of a run that training depends on or that a report shows, without the clock's readings."""
    state = run.state_dict()
    clock = [STEP_COLUMNS.index(part) for part in PARTS]
    state["steps"] = torch.tensor([[x for i, x in enumerate(row) if i not in clock] for row in state["steps"].tolist()])
    state["evaluations"] = [{k: v for k, v in row.items() if k != "seconds"} for row in state["evaluations"]]
    del state["seconds"]
    return state


class Killed(BaseException):
    pass


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, run: Run) -> None:
        if run.step == self.at:
            raise Killed


def assert_goes_on(config: Config, kill_at: int, out: Path) -> Run:
    """A run that is killed and goes on, by another process' worth of objects, ends as an uninterrupted one: returned."""
    data = blobs()
    whole = train(config, data, out / "whole")
    with pytest.raises(Killed):
        train(config, data, out / "parts", [KillAt(kill_at)])
    torch.manual_seed(123)  # the global generator must not matter
    resumed = train(config, data, out / "parts")
    assert_same(state_of(whole), state_of(resumed))
    return whole
