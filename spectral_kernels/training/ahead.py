"""Choosing the next batch while the present one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch


class Chosen(NamedTuple):
    """A batch: its rows, and whether a strategy chose them (False: random, as while the bank is cold)."""

    rows: list[int]
    selected: bool


class Ahead:
    """Makes batches with `choose`, one ahead if asked to, in a thread and on a stream of its own.

    What `choose` reads must not change between `start` and `settle`; then the order of batches, and what each was chosen
    from, are the same in every run.

    Attributes:
        pending: the batch that was made and not yet taken, None: none.
    """

    def __init__(self, choose: Callable[[], Chosen], device: torch.device) -> None:
        self.choose = choose
        self.pending: Chosen | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="selection")
        self._future: Future[Chosen] | None = None

    def take(self) -> Chosen:
        """The next batch, made now if it was not before."""
        chosen = self.choose() if self.pending is None else self.pending
        self.pending = None
        return chosen

    def start(self) -> None:
        """Begin to make the next batch."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._future = self._pool.submit(self._choose)

    def _choose(self) -> Chosen:
        with torch.cuda.stream(self._stream):  # of None this does nothing
            return self.choose()  # its rows are on the host: nothing is left to run on the stream

    def settle(self) -> None:
        """Wait for the batch that was begun, if one was."""
        if self._future is not None:
            self.pending, self._future = self._future.result(), None
