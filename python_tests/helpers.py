"""Values as bytes of files, pickles that would run something, equality to the bit, and work in a child process."""

import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spectral_kernels.files import lock
from spectral_kernels.training import checkpoint


def saved(value: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def signed(content: bytes) -> bytes:
    """With a checkpoint's digest: what somebody may make who knows the format."""
    return content + checkpoint.MAGIC + hashlib.sha256(content).digest()


class Reduced:
    """Pickled as a call, which unpickling would run."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal bit by bit, NaN included."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left.nan_to_num(nan=-7), right.nan_to_num(nan=-7)), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for place, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{place}]")
    else:
        assert left == right, where


def in_a_child(work: Callable[[], object]) -> tuple[int, int]:
    """Fork, and do some work there; the child's number and a pipe of what it prints."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        try:
            work()
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    return child, reading


def said_by(child: int, reading: int) -> str:
    with open(reading, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def is_held(folder: Path) -> bool:
    """As another process sees it."""
    return "FolderInUse" in said_by(*in_a_child(lambda: [lock._held.clear(), lock.hold(folder)]))
