"""Checkpoints: written atomically, read as plain tensors and numbers only, refused with a name where they
do not fit.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from spectral_kernels.training.config import flat

FORMAT = 1
# what may differ between the run that wrote a checkpoint and the one that goes on from it
FREE = ("compare.", "data.root", "data.download", "data.fallback", "train.checkpoint_every", "train.device")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is of another run; the message names the file and the field."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, lists, dicts) to `path`: all of it, or the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save({"format": FORMAT, **content}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, fields: tuple[str, ...]) -> dict[str, Any]:
    """Read a checkpoint that has all of `fields`.

    Raises:
        CheckpointError: unreadable, holding code or other objects than tensors and plain types, of another
            format, or a field is missing.
    """
    try:
        # weights_only: a checkpoint from elsewhere must not run code
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint end in errors of any kind
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint of a run: it holds a {type(content).__name__}")
    for name in ("format", *fields):
        if name not in content:
            raise CheckpointError(f"{path} has no field {name!r}")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']!r}, this version reads {FORMAT}")
    return content


def check_config(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise for the first setting (nested dicts) in which a checkpoint's run differs from the one at hand."""
    old, new = flat(stored), flat(wanted)
    for name in sorted(old.keys() | new.keys()):
        if not name.startswith(FREE) and old.get(name) != new.get(name):
            raise CheckpointError(
                f"{path} is of another run: {name} is {old.get(name)!r} there and {new.get(name)!r} here"
            )


def restore(path: Path, name: str, value: Any, into: Callable[[Any], Any]) -> None:
    """Hand the field `name` to `into`, a `load_state_dict` or the like; CheckpointError where it does not take it."""
    try:
        into(value)
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: field {name!r} does not fit: {' '.join(str(error).split())[:300]}") from error
