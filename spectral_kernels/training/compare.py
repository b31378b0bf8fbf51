"""`spectral-kernels compare`: strategies × seeds on one budget, run side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from spectral_kernels.files import lock
from spectral_kernels.training import run_state
from spectral_kernels.training.augment import Normalize
from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData
from spectral_kernels.training.evaluate import Evaluator
from spectral_kernels.training.loop import Run, pick_device

TURN = 10  # steps that a run makes before the next one's turn


@dataclass(frozen=True)
class RunRecord:
    """What is kept of a finished run.

    steps: one dict a step, by the names in `run_state.STEP_COLUMNS`. evaluations: as in `Run`.
    """

    strategy: str
    seed: int
    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]


def run_config(config: Config, strategy: str, seed: int) -> Config:
    """The settings of one run of a comparison."""
    return replace(
        config,
        selection=replace(config.selection, strategy=strategy),
        train=replace(config.train, seed=seed),
    )


def check(config: Config) -> None:
    """Raise ValueError for a comparison that could not be judged, before anything is run."""
    compare = config.compare
    for strategy in compare.strategies:
        config.selection.parsed(strategy)
    if compare.target is None and "random" not in compare.strategies:
        raise ValueError("compare.strategies has no 'random' to take the target from: add it, or set compare.target")
    steps = config.train.steps
    if compare.target is None and steps is not None and config.evaluate.every > compare.target_share * steps:
        raise ValueError(
            f"evaluate.every = {config.evaluate.every} leaves no evaluation up to the step that sets the "
            f"target, {compare.target_share:g} of {steps}"
        )


class Comparison:
    """The runs of a comparison.

    Runs of one seed share their start and their augmentations, and take turns of a few steps, in another order for
    every seed, so that a machine that slows down slows all of them. Every run has its own `last.ckpt` under `folder`:
    an interrupted comparison goes on where it stopped, and finished runs are read, not run.

    Args:
        config: see `CompareConfig`.
        folder: None keeps nothing on disk.

    Raises:
        ValueError: see `check`; CheckpointError for a folder that holds other runs. FolderInUse: another process writes there.
    """

    def __init__(self, config: Config, data: ImageData, folder: Path | None = None) -> None:
        check(config)
        self.config = config
        self.data = data.to(pick_device(config.train.device))
        self.folder = folder
        self._lock = None if folder is None else lock.hold(folder)

    @cached_property
    def _shared(self) -> dict[str, Any]:
        """What all runs share; made only where one is to be run."""
        normalize = Normalize(self.data.train_images)
        return {"normalize": normalize, "evaluator": Evaluator(self.data, self.config.evaluate, normalize)}

    def records(self, callbacks: Sequence[Callback] = ()) -> list[RunRecord]:
        """Run what is missing; the records of all runs, seed by seed."""
        names, found = self.config.compare.strategies, {}
        for place, seed in enumerate(self.config.compare.seeds):
            shift = place % len(names)
            missing = []
            for name in (*names[shift:], *names[:shift]):
                record = self._finished(name, seed)
                if record is None:
                    missing.append(name)
                else:
                    found[name, seed] = record
                    for callback in callbacks:
                        callback.skipped(record)
            for run in self._take_turns(missing, seed, callbacks):
                found[run.strategy.name, seed] = run_record(run.config, run.state_dict())
        return [found[name, seed] for seed in self.config.compare.seeds for name in names]

    def forget(self) -> None:
        """Delete the checkpoints of these runs."""
        for name in self.config.compare.strategies:
            for seed in self.config.compare.seeds:
                if (folder := self._folder(name, seed)) is not None:
                    (folder / "last.ckpt").unlink(missing_ok=True)

    def _take_turns(self, names: list[str], seed: int, callbacks: Sequence[Callback]) -> list[Run]:
        configs = (run_config(self.config, name, seed) for name in names)
        runs = [Run(one, self.data, self._folder(one.selection.strategy, seed), **self._shared) for one in configs]
        for run in runs:
            for callback in callbacks:
                callback.opened(run)
            if not run.evaluations and runs[0].evaluations:  # one start, one evaluation of it
                run.evaluations.append(dict(runs[0].evaluations[0]))
            elif not run.evaluations:
                run.turn()
            run.warm_up()
        while unfinished := [run for run in runs if not run.finished]:
            run = min(unfinished, key=lambda run: run.progress)
            if run.turn(callbacks, TURN):
                for callback in callbacks:
                    callback.evaluated(run)
        return runs

    def _folder(self, name: str, seed: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}-seed{seed}"

    def _finished(self, name: str, seed: int) -> RunRecord | None:
        """The record of a run that was finished before."""
        folder = self._folder(name, seed)
        path = None if folder is None else folder / "last.ckpt"
        if path is None or not path.exists():
            return None
        config = run_config(self.config, name, seed)
        state = run_state.read(path, config, self.data)
        return run_record(config, state) if state["finished"] else None


def run_record(config: Config, state: dict[str, Any]) -> RunRecord:
    """The record of a run from its settings and `Run.state_dict`."""
    steps = [dict(zip(run_state.STEP_COLUMNS, row, strict=True)) for row in state["steps"].tolist()]
    return RunRecord(config.selection.strategy, config.train.seed, steps, state["evaluations"])
