"""SIGTERM, as a scheduler sends it before it takes a machine away: a checkpoint, and a quiet end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from spectral_kernels.training.compare import Observer, RunRecord
from spectral_kernels.training.loop import Run


class Terminated(BaseException):
    """SIGTERM came; the message says where the run was saved. No Exception: nothing in between is to swallow it."""


class _Stopping(Observer):
    """Hands on to another observer; after the step during which SIGTERM came, it saves and ends the run."""

    def __init__(self, then: Observer) -> None:
        self.then, self.asked = then, False

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def opened(self, run: Run) -> None:
        self.then.opened(run)

    def skipped(self, record: RunRecord) -> None:
        self.then.skipped(record)

    def step(self, run: Run) -> None:
        self.then.step(run)
        if self.asked:
            run.save()
            raise Terminated(f"SIGTERM: stopped at step {run.step}, saved in {run.path}")

    def evaluated(self, run: Run) -> None:
        self.then.evaluated(run)


@contextmanager
def stopped_by_sigterm(then: Observer) -> Iterator[Observer]:
    """An observer for runs that SIGTERM is to end with a checkpoint; only in the main thread of a process."""
    observer = _Stopping(then)
    before = signal.signal(signal.SIGTERM, observer.ask)
    try:
        yield observer
    finally:
        signal.signal(signal.SIGTERM, before)
