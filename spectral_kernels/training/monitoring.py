"""A run's `SpectrumMonitor`."""

from pathlib import Path

from spectral_kernels.monitor import SpectrumMonitor
from spectral_kernels.monitor.lightning import gradient_norm
from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.loop import Run
from spectral_kernels.training.moco import MoCo


class Monitored(Callback):
    """Lets a monitor see every step of one run, off its clock.

    Args:
        path: of the monitor's CSV.
        options: of `SpectrumMonitor`.

    Attributes:
        monitor: made when the run is opened.
    """

    def __init__(self, path: Path, **options: object) -> None:
        self.path, self.options = path, options
        self.monitor: SpectrumMonitor | None = None

    def opened(self, run: Run) -> None:
        temperature = run.config.train.temperature
        loss = "info_nce" if isinstance(run.model, MoCo) else "nt_xent"
        self.monitor = SpectrumMonitor(self.path, temperature=temperature, loss=loss, **self.options)  # type: ignore[arg-type]

    def step(self, run: Run) -> None:
        assert self.monitor is not None and run.last is not None
        chosen = run.strategy.kind != "random"
        self.monitor.observe(
            run.step,
            run.last.first,
            run.last.second,
            queue=run.model.queue if isinstance(run.model, MoCo) else None,
            value=run.steps[-1][0],
            gradient_norm=gradient_norm(run.model),
            bank=run.bank if chosen else None,
            window=run.config.selection.window if run.strategy.window else None,
        )
