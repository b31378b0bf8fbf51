"""Where a step's wall-clock goes."""

import time

import torch

PARTS = ("selection", "data", "compute")  # of a step's wall-clock


class Clock:
    """Splits a step's wall-clock; waits for the device at each split, so that work is booked where it was
    started.
    """

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def split(self, part: str) -> None:
        """Book the time since the last split under `part`."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now
