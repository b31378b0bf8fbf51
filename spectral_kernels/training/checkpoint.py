"""Checkpoints: written whole, with a digest; read as plain data, and refused with a name where they do not fit."""

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spectral_kernels.checks import shortened
from spectral_kernels.files.reading import PIECE, FileError, one_line, opened, shown
from spectral_kernels.files.torch_files import read_tensors
from spectral_kernels.files.writing import replacing

FORMAT = 2
# after what torch.save wrote, which `torch.load` reads as it is: a name, and SHA-256 of all before it
MAGIC = b"spectral_kernels sha256 "
TRAILER = len(MAGIC) + 32
# what may differ between the run that wrote a checkpoint and the one that goes on from it
FREE = ("compare.", "data.root", "data.download", "data.fallback", "train.checkpoint_every", "train.device")


class CheckpointError(FileError):
    """A checkpoint that cannot be read, or is of another run; the message names the file and the field."""


class _Hashed(io.RawIOBase):
    """Hands on what is written, and adds it to a digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            self._file.write(content)
        except OSError as error:
            self.error = error  # torch would say something else
            raise
        self.digest.update(content)
        return len(content)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, lists, dicts) to `path`: all of it, or the old file stays.

    Raises:
        OSError: with the path and the reason, such as a full disk.
    """
    with replacing(path) as file:
        hashed = _Hashed(file)
        try:
            torch.save({"format": FORMAT, **content}, hashed)  # type: ignore[arg-type]
        except Exception:
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.write(MAGIC + hashed.digest.digest())


def load(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Read a checkpoint that has all of `fields`, of these types.

    Raises:
        CheckpointError: unreadable, damaged, holding anything but tensors and plain types, of another format, or a field is
            missing or of another type.
    """
    try:
        _check_digest(path)
        content = read_tensors(path)
    except FileError as error:
        reason = one_line(error).removeprefix(f"{shown(path)} ")
        raise CheckpointError(path, f"cannot be read as a checkpoint: it {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"is not a checkpoint of a run: it holds a {type(content).__name__}")
    for name in ("format", *fields):
        if name not in content:
            raise CheckpointError(path, f"has no field {name!r}")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise CheckpointError(path, f"has format {shortened(content['format'])}, this version reads {FORMAT}")
    for name, kinds in fields.items():
        if not isinstance(content[name], kinds) or (isinstance(content[name], bool) and kinds is not bool):
            raise CheckpointError(path, f"has a field {name!r} that is a {type(content[name]).__name__}")
    return content


def _check_digest(path: Path) -> None:
    digest = hashlib.sha256()
    with opened(path) as file:
        left = os.fstat(file.fileno()).st_size - TRAILER
        while left > 0 and (piece := file.read(min(left, PIECE))):
            digest.update(piece)
            left -= len(piece)
        trailer = file.read(TRAILER + 1)
    if not trailer.startswith(MAGIC):
        raise FileError(path, "is of another program, of another version, or was cut: it does not end in a digest")
    if trailer != MAGIC + digest.digest():
        raise FileError(path, "is damaged: its bytes are not those that were written")


def check_config(path: Path, stored: Any, wanted: Mapping[str, Any], prefix: str = "") -> None:
    """Raise for the first setting (nested dicts) in which a checkpoint's run differs from this one."""
    if not isinstance(stored, dict):
        raise CheckpointError(path, f"is of another run: {prefix.rstrip('.')} is {shortened(stored)} there")
    for name in (*wanted, *(stored.keys() - wanted.keys())):
        full, there, here = f"{prefix}{shortened(name)[1:-1]}", stored.get(name), wanted.get(name)
        if full.startswith(FREE):
            continue
        if isinstance(here, Mapping):
            check_config(path, there, here, f"{full}.")
        elif not _same(there, here):
            raise CheckpointError(
                path, f"is of another run: {full} is {shortened(there)} there and {shortened(here)} here"
            )


def _same(there: Any, here: Any) -> bool:
    """Equal and of the same plain types: of tensors it is not even asked."""
    if type(there) is not type(here):
        return False
    if isinstance(here, dict):
        return there.keys() == here.keys() and all(_same(there[key], here[key]) for key in here)
    if isinstance(here, list | tuple):
        return len(there) == len(here) and all(map(_same, there, here))
    return bool(there == here)


def restore(path: Path, name: str, value: Any, into: Callable[[Any], Any]) -> None:
    """Hand the field `name` to `into`, a `load_state_dict` or the like; CheckpointError where it does not take it."""
    try:
        into(value)
    except Exception as error:  # what a field of another kind leads to in torch may be anything
        raise CheckpointError(path, f"field {name!r} does not fit: {' '.join(str(error).split())[:300]}") from error


def load_model(model: torch.nn.Module, state: Any) -> None:
    """`load_state_dict`, which casts numbers of another kind: these are refused."""
    for name, own in model.state_dict().items():
        if name in state and (not isinstance(state[name], Tensor) or state[name].dtype != own.dtype):
            raise ValueError(f"{name} is {getattr(state[name], 'dtype', 'no tensor')}, not {own.dtype}")
    model.load_state_dict(state)


# what an optimizer keeps of a parameter: of its shape, but for the number of steps
KEPT = {"SGD": ("momentum_buffer",), "LARS": ("momentum_buffer",), "AdamW": ("step", "exp_avg", "exp_avg_sq")}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """`load_state_dict`, which takes states of other shapes as they are: these are refused.

    Raises:
        ValueError: groups with other settings than `lr`, or a state that is not what such an optimizer writes.
    """
    own = optimizer.state_dict()
    if len(state["param_groups"]) != len(own["param_groups"]):
        raise ValueError(f"{len(state['param_groups'])} groups of parameters, expected {len(own['param_groups'])}")
    for there, here in zip(state["param_groups"], own["param_groups"], strict=True):
        rate = there["lr"]
        if type(rate) is not float or not 0 <= rate < math.inf or not _same({**there, "lr": 0}, {**here, "lr": 0}):
            raise ValueError(f"a group of parameters with other settings: {shortened(there)}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = KEPT[type(optimizer).__name__]
    for number, entries in state["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or entries.keys() != set(kept):
            raise ValueError(f"{shortened(list(entries))} of parameter {shortened(number)}, expected {kept}")
        for name, value in entries.items():
            like = torch.zeros(()) if name == "step" else parameters[number]
            if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
                raise ValueError(f"{name} of parameter {number} is no {like.dtype} tensor of shape {tuple(like.shape)}")
            if not bool(value.isfinite().all()) or (name == "step" and not value >= 1):
                raise ValueError(f"{name} of parameter {number} is NaN, Inf, or no number of steps")
    optimizer.load_state_dict(state)
