"""What training tells those who watch it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectral_kernels.training.compare import RunRecord
    from spectral_kernels.training.loop import Run


class Callback:
    """Is told what runs do; this one ignores it."""

    def opened(self, run: "Run") -> None:
        """A run is about to start, or to go on."""

    def skipped(self, record: "RunRecord") -> None:
        """A run of a comparison was finished before."""

    def step(self, run: "Run") -> None:
        """A run made a step."""

    def evaluated(self, run: "Run") -> None:
        """A run was evaluated."""
