"""SIGTERM, as a scheduler sends it before it takes a machine away: a checkpoint, and a quiet end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.loop import Run


class Terminated(BaseException):
    """SIGTERM came; the message says where the run was saved. No Exception: nothing in between is to swallow it."""


class _Stopping(Callback):
    """After the step during which SIGTERM came, it saves and ends the run."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: object) -> None:
        self.asked = True

    def step(self, run: Run) -> None:
        if self.asked:
            run.save()
            raise Terminated(f"SIGTERM: stopped at step {run.step}, saved in {run.path}")


@contextmanager
def stopped_by_sigterm() -> Iterator[Callback]:
    """A callback, the last one of a run, that ends it with a checkpoint upon SIGTERM; only in a process's main thread."""
    callback = _Stopping()
    before = signal.signal(signal.SIGTERM, callback.ask)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGTERM, before)
