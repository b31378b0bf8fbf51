"""All of a run, as plain data: what a checkpoint holds, and how a run takes it up again."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.training import checkpoint
from spectral_kernels.training.ahead import Chosen
from spectral_kernels.training.clock import PARTS
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData
from spectral_kernels.training.evaluate import METRICS

if TYPE_CHECKING:
    from spectral_kernels.training.loop import Run

STEP_COLUMNS = ("loss", "effective_rank", "chosen", *PARTS)
FIELDS: dict[str, type | tuple[type, ...]] = {
    "config": dict, "data": str, "finished": bool, "step": int, "seconds": dict, "steps": Tensor, "evaluations": list,
    "model": dict, "optimizer": dict, "generator": Tensor, "sampler": dict, "pending": (tuple, type(None)),
    "bank": (dict, type(None)),
}  # fmt: skip


def state_of(run: "Run") -> dict[str, Any]:
    """All that `take_up` needs, in tensors and plain types."""
    return {
        "config": run.config.to_dict(),
        "data": identity(run.data),
        "finished": run.finished,
        "step": run.step,
        "seconds": dict(run.seconds),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "sampler": run.sampler.state_dict(),
        "pending": None if run.ahead.pending is None else tuple(run.ahead.pending),
        "bank": None if run.strategy.kind == "random" else run.bank.state_dict(),
        "steps": torch.tensor(run.steps, dtype=torch.float64).reshape(-1, len(STEP_COLUMNS)),
        "evaluations": [dict(evaluation) for evaluation in run.evaluations],
    }


def take_up(run: "Run", path: Path) -> None:
    """Go on from a checkpoint, bit for bit as if the run had not stopped (given the same number of
    threads).

    Raises:
        CheckpointError: unreadable, or of another run; names the file and the field.
    """
    state = read(path, run.config, run.data)

    def restore(name: str, into: Callable[[Any], Any]) -> None:
        checkpoint.restore(path, name, state[name], into)

    restore("model", lambda value: checkpoint.load_model(run.model, value))
    restore("optimizer", lambda value: checkpoint.load_optimizer(run.optimizer, value))
    restore("generator", run.generator.set_state)
    restore("sampler", run.sampler.load_state_dict)
    if run.strategy.kind != "random":
        restore("bank", run.bank.load_state_dict)
    run.step, run.seconds = state["step"], state["seconds"]
    run.steps, run.evaluations = state["steps"].tolist(), state["evaluations"]
    run.begin()
    restore("pending", lambda value: _set_pending(run, value))


def _set_pending(run: "Run", pending: Any) -> None:
    run.ahead.pending = None
    if pending is not None:
        rows, selected = pending
        if type(rows) is not list or len(rows) != run.config.train.batch_size or len(set(rows)) < len(rows):
            raise ValueError(f"a batch is {run.config.train.batch_size} different rows, got {checks.shortened(rows)}")
        if type(selected) is not bool or any(type(row) is not int or not 0 <= row < len(run.pool) for row in rows):
            raise ValueError(f"its rows must lie in [0, {len(run.pool)}), got {checks.shortened(rows)}")
        run.ahead.pending = Chosen(rows, selected)


def identity(data: ImageData) -> str:
    """What tells one data set from another, for checkpoints: name, shape, labels and some of the pixels."""
    images, labels = data.train_images, data.train_labels
    some = images[:: max(1, len(images) // 64)].cpu().contiguous()
    found = zlib.crc32(some.numpy().tobytes(), zlib.crc32(labels.cpu().numpy().tobytes()))
    return f"{data.name} {'x'.join(map(str, images.shape))} {found:08x}"


def read(path: Path, config: Config, data: ImageData) -> dict[str, Any]:
    """Read the checkpoint of a run with these settings on this data.

    Raises:
        CheckpointError: unreadable, or of another run; names the file and the field.
    """
    state = checkpoint.load(path, FIELDS)
    checkpoint.check_config(path, state["config"], config.to_dict())
    if state["data"] != identity(data):
        raise checkpoint.CheckpointError(
            path, f"is of another run: data is {state['data'][:100]!r} there and {identity(data)!r} here"
        )
    checkpoint.restore(path, "steps", state, _check_steps)
    checkpoint.restore(path, "evaluations", state, _check_evaluations)
    train, spent = config.train, sum(state["seconds"].values())
    done = state["step"] >= train.steps if train.steps is not None else spent >= (train.seconds or 0)
    evaluated = state["evaluations"][-1]["step"] if state["evaluations"] else None
    if state["finished"] != (done and evaluated == state["step"]):
        raise checkpoint.CheckpointError(path, f"says finished = {state['finished']} of a run at step {state['step']}")
    return state


def _check_steps(state: dict[str, Any]) -> None:
    """Raise for what a run does not write."""
    step, steps, seconds = state["step"], state["steps"], state["seconds"]
    if step < 0 or steps.shape != (step, len(STEP_COLUMNS)) or steps.dtype != torch.float64:
        raise ValueError(f"{step} steps, recorded as {tuple(steps.shape)} {steps.dtype}")
    measured = [place for place, name in enumerate(STEP_COLUMNS) if name != "effective_rank"]
    if not bool(steps[:, measured].isfinite().all()) or bool((steps[:, -len(PARTS) :] < 0).any()):
        raise ValueError("steps that hold NaN or Inf, or took less than no time")
    if seconds.keys() != set(PARTS) or any(
        type(one) is not float or not 0 <= one < math.inf for one in seconds.values()
    ):
        raise ValueError(f"seconds are {checks.shortened(seconds)}")


def _check_evaluations(state: dict[str, Any]) -> None:
    """Raise for what a run does not write."""
    before = -1
    for evaluation in state["evaluations"]:
        if evaluation.keys() != {"step", "seconds", *METRICS}:
            raise ValueError(f"an evaluation {checks.shortened(evaluation)}")
        step, seconds = evaluation["step"], evaluation["seconds"]
        if type(step) is not int or not before < step <= state["step"]:
            raise ValueError(f"an evaluation at step {checks.shortened(step)}")
        if type(seconds) is not float or not 0 <= seconds < math.inf:
            raise ValueError(f"an evaluation after {checks.shortened(seconds)} seconds")
        if any(type(evaluation[name]) is not float or not 0 <= evaluation[name] <= 1 for name in METRICS):
            raise ValueError(f"an evaluation {checks.shortened(evaluation)}, accuracies lie in [0, 1]")
        before = step
