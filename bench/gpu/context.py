"""What a phase is given: where it runs, how small, until when, and where its lines go."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Context:
    """A phase's surroundings.

    Attributes:
        phase: its name, in every line.
        folder: of the results.
        device: where the ops run.
        tiny: small sizes; figures then mean nothing.
        limit: seconds from the start of the process after which no further case is begun.
        only: cases whose name contains this.
        plant: the fault that a rehearsal plants.
    """

    phase: str
    folder: Path
    device: torch.device
    tiny: bool
    limit: float
    only: str = ""
    plant: str = ""
    begin: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begin)

    def cases(self) -> list[Any]:
        """Those that this phase is about."""
        from gpu_cases import cases

        return [case for case in cases(self.tiny) if self.only in case.name]

    def write(self, **what: Any) -> None:
        """One line of JSON, on disk before this returns: what follows may crash."""
        append(self.folder, phase=self.phase, at=round(time.monotonic() - self.begin, 2), **what)


def append(folder: Path, **what: Any) -> None:
    """Add a line to the results; whole lines, whoever else writes."""
    line = json.dumps(what, default=str) + "\n"
    handle = os.open(folder / "results.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines so far."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
