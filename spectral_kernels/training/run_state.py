"""All of a run, as plain data: what a checkpoint holds, and how a run takes it up again."""

import math
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
    checkpoint.restore(path, "model", state["model"], run.model.load_state_dict)
    checkpoint.restore(
        path, "optimizer", state["optimizer"], lambda state: checkpoint.load_optimizer(run.optimizer, state)
    )
    checkpoint.restore(path, "generator", state["generator"], run.generator.set_state)
    checkpoint.restore(path, "sampler", state["sampler"], run.sampler.load_state_dict)
    if run.strategy.kind != "random":
        checkpoint.restore(path, "bank", state["bank"], run.bank.load_state_dict)
    run.step, run.seconds = state["step"], state["seconds"]
    run.steps, run.evaluations = state["steps"].tolist(), state["evaluations"]
    run.begin()
    checkpoint.restore(path, "pending", state["pending"], lambda pending: _set_pending(run, pending))


def _set_pending(run: "Run", pending: Any) -> None:
    run.ahead.pending = None
    if pending is not None:
        rows, selected = pending
        checks.row_indices(torch.tensor(rows), "its rows", len(run.pool), 1)
        run.ahead.pending = Chosen(list(rows), bool(selected))


def identity(data: ImageData) -> str:
    """What tells one data set from another, for checkpoints."""
    return f"{data.name} {'x'.join(map(str, data.train_images.shape))}"


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
    checkpoint.restore(path, "steps", state, _check_record)
    return state


def _check_record(state: dict[str, Any]) -> None:
    """Raise for what a run does not write: ValueError, KeyError, TypeError."""
    step, steps, seconds = state["step"], state["steps"], state["seconds"]
    if step < 0 or steps.shape != (step, len(STEP_COLUMNS)) or steps.dtype != torch.float64:
        raise ValueError(f"{step} steps, recorded as {tuple(steps.shape)} {steps.dtype}")
    if seconds.keys() != set(PARTS) or any(
        type(one) is not float or not 0 <= one < math.inf for one in seconds.values()
    ):
        raise ValueError(f"seconds are {seconds}")
    for evaluation in state["evaluations"]:
        if any(type(value) not in (int, float) for value in evaluation.values()):
            raise ValueError(f"an evaluation of {evaluation}")
        if evaluation.keys() != {"step", "seconds", *METRICS}:
            raise ValueError(f"an evaluation with {list(evaluation)}")
