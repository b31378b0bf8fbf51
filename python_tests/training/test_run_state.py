"""What a run reads from `last.ckpt`: damaged, of another run, or made by somebody who knows the format."""

import copy
import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Reduced, is_held, saved, signed
from training_helpers import blobs, settings

from spectral_kernels.training.checkpoint import CheckpointError
from spectral_kernels.training.loop import Run
from spectral_kernels.training.run_state import FIELDS, STEP_COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:the memory bank is cold")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"not a checkpoint", "cannot be read as a checkpoint"),
        ([1, 2], "holds a list"),
        ({"step": 1}, "has no field 'format'"),
        ({"format": 99, "x": 0}, "has no field 'config'"),
        ({"format": 99, **dict.fromkeys(FIELDS, 0)}, "has format 99, this version reads 2"),
        (
            {"format": 2, "config": Reduced(print, ("this must not run",))},
            r"cannot be read as a checkpoint: .*it asks for __builtin__\.print",
        ),
    ],
)
def test_unreadable_checkpoints(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content if isinstance(content, bytes) else signed(saved(content)))
    with pytest.raises(CheckpointError, match=message) as caught:
        Run(settings(), blobs(), tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    """Its settings or its data, also of the same shape."""
    data = blobs()
    Run(settings(), data, tmp_path).save()
    images = data.train_images.clone()
    images[:, 0, 0, 0] ^= 1
    for config, other, message in (
        (settings(optimizer={"lr": 0.3}), data, r"of another run: optimizer\.lr is 0\.1 there and 0\.3 here"),
        (settings(), blobs(count=400), r"data is 'blobs 320x1x8x8 \w+' there and 'blobs 400x1x8x8 \w+' here"),
        (settings(), replace(data, train_images=images), "data is 'blobs"),
        (settings(), replace(data, train_labels=data.train_labels.flip(0)), "data is 'blobs"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Run(config, other, tmp_path)
    Run(settings(train={"checkpoint_every": 1}, compare={"seeds": [9]}), data, tmp_path)  # does not matter


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.123-0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not of ours")
    run = Run(settings(), blobs(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".mine.tmp"]
    assert run.step == 0


def good(**changes: Any) -> dict[str, Any]:
    return {"step": 0, "seconds": 0.0, "linear": 0.1, "knn20": 0.1, "knn200": 0.1} | changes


def rows_of_steps(**changes: float) -> torch.Tensor:
    steps = torch.ones(2, len(STEP_COLUMNS), dtype=torch.float64)
    for name, value in changes.items():
        steps[1, STEP_COLUMNS.index(name)] = value
    return steps


SECONDS = {"selection": 0.0, "data": 0.0, "compute": 1.0}


def test_a_run_holds_its_folder(tmp_path: Path) -> None:
    """Against other processes, for as long as it lives."""
    run = Run(settings(), blobs(), tmp_path)
    assert is_held(tmp_path) and run.step == 0
    del run
    gc.collect()
    assert not is_held(tmp_path)


HOSTILE_FIELDS: dict[str, list[Any]] = {
    "format": [3, "2", 2.0, True, torch.tensor([2, 2]), None],
    "config": [{}, {"train": 3}, {3: {b"x": 1}}, {"train": {"steps": torch.ones(3)}}, {"x" * 10**6: {"y" * 10**6: 1}}],
    "data": ["x" * 10**6, "\x1b[2J"],
    "step": [-1, 7, 2**62],
    "finished": [True],
    "seconds": [{}, SECONDS | {"compute": math.nan}, SECONDS | {"data": 0}, SECONDS | {"data": -1.0}, SECONDS | {"x": 0.0}],
    "steps": [
        torch.zeros(0), torch.zeros(5, 6), torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.int64),
        rows_of_steps(loss=math.inf), rows_of_steps(loss=math.nan), rows_of_steps(compute=-1e308),
        rows_of_steps(chosen=math.inf),
    ],
    "evaluations": [
        [3], [{}], [{"step": "x"}], [[1]], [good(linear=torch.ones(1))], [good(step=math.inf)], [good(step=-5)], [good(step=3)],
        [good(step=2**62)], [good(step=True)], [good(linear=1e308)], [good(linear=math.nan)], [good(seconds=math.inf)],
        [good(), good()], [good(more=1)],
    ],
    "model": [
        {}, {"a": 3}, {"encoder.0.weight": "text"}, {"\x1b[2J": torch.ones(2)},
        lambda state: state["model"] | {"more": torch.ones(1)},
        lambda state: {name: value.long() for name, value in state["model"].items()},
        lambda state: {name: value[..., None] for name, value in state["model"].items()},
    ],
    "optimizer": [
        {}, {"state": 3, "param_groups": 4}, {"state": {}, "param_groups": [{}, {}]}, {"state": {}, "param_groups": [3, 4]},
    ],
    "generator": [torch.zeros(5056), torch.zeros(0, dtype=torch.uint8)],
    "sampler": [{}, {"epoch": -1}, lambda state: state["sampler"] | {"batch_size": 7}],
    "pending": [
        (1, 2, 3), ([-1], True), ([10**9], True), (["a"], False), (), (list(range(300)), True), (torch.arange(32), True),
        ([0] * 32, True), (list(range(32)), 1), ([float(i) for i in range(32)], True),
    ],
    "bank": [
        None, {}, {"embeddings": 3}, lambda state: state["bank"] | {"embeddings": torch.zeros(3, 3)},
        lambda state: state["bank"] | {"step": 2**63 - 1},
    ],
}  # fmt: skip


@pytest.mark.parametrize("field", HOSTILE_FIELDS)
def test_fields_that_no_run_writes(field: str, tmp_path: Path) -> None:
    """With a digest that fits: whoever knows the format may make such a file."""
    config, data = settings(selection={"strategy": "greedy-4"}), blobs()
    run = Run(config, data, tmp_path)
    run.advance(2)
    state = run.state_dict()
    for value in HOSTILE_FIELDS[field]:
        value = value(state) if callable(value) else value
        (tmp_path / "last.ckpt").write_bytes(signed(saved({"format": 2, **state, field: value})))
        with pytest.raises(CheckpointError) as caught:
            Run(config, data, tmp_path)
        assert str(caught.value).startswith(str(tmp_path / "last.ckpt")) and len(str(caught.value)) < 700
        assert str(caught.value).isprintable() and (field in str(caught.value) or field == "config")


OTHER_STATES: dict[str, list[Any]] = {
    "sgd": [
        lambda state: state["state"][0].update(momentum_buffer=torch.zeros(1)),
        lambda state: state["state"][0].update(momentum_buffer=torch.zeros(())),
        lambda state: state["state"][0].update(momentum_buffer=3),
        lambda state: state["state"][0].update(momentum_buffer=None),
        lambda state: state["state"][0]["momentum_buffer"].fill_(math.nan),
        lambda state: state["state"][0].update(momentum_buffer=state["state"][0]["momentum_buffer"].double()),
        lambda state: state["state"][0].update(more=torch.zeros(1)),
        lambda state: state["state"].update({999: {"momentum_buffer": torch.zeros(1)}}),
        lambda state: state["state"].update({-1: state["state"][0]}),
        lambda state: state["param_groups"][0].update(momentum=0.5),
        lambda state: state["param_groups"][0].update(momentum=torch.ones(3)),
        lambda state: state["param_groups"][0].update(lr="fast"),
        lambda state: state["param_groups"][0].update(lr=math.nan),
        lambda state: state["param_groups"][0].pop("nesterov"),
        lambda state: state["param_groups"].pop(),
    ],
    "adamw": [
        lambda state: state["state"][0].pop("exp_avg"),
        lambda state: state["state"][0].update(exp_avg_sq=None),
        lambda state: state["state"][0].update(exp_avg=torch.zeros(())),
        lambda state: state["state"][0].update(step=torch.tensor(-1.0)),
        lambda state: state["state"][0].update(step=torch.tensor(True)),
        lambda state: state["state"][0].update(step=torch.ones(3)),
        lambda state: state["state"][0].update(step=torch.tensor(math.nan)),
    ],
    "lars": [
        lambda state: state["state"][0].update(momentum_buffer=None),
        lambda state: state["state"][0].update(momentum_buffer=torch.zeros(())),
    ],
}


@pytest.mark.parametrize("name", OTHER_STATES)
def test_an_optimizer_of_other_shapes(name: str, tmp_path: Path) -> None:
    """torch takes such a state as it is, and fails at the next step, or not at all where shapes happen to broadcast."""
    config, data = settings(optimizer={"name": name, "lr": 0.02}), blobs()
    run = Run(config, data, tmp_path)
    run.advance(2)
    run.save()
    assert Run(config, data, tmp_path).step == 2
    for change in OTHER_STATES[name]:
        state = copy.deepcopy(run.state_dict())
        change(state["optimizer"])
        (tmp_path / "last.ckpt").write_bytes(signed(saved({"format": 2, **state})))
        with pytest.raises(CheckpointError, match="field 'optimizer' does not fit"):
            Run(config, data, tmp_path)
