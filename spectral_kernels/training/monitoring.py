"""A run's `SpectrumMonitor`."""

from pathlib import Path

from spectral_kernels.monitor import SpectrumMonitor
from spectral_kernels.monitor.lightning import gradient_norm
from spectral_kernels.training import loop
from spectral_kernels.training.loop import Run
from spectral_kernels.training.moco import MoCo


class Monitored(loop.Observer):
    """Lets a monitor see every step of one run, off its clock, and hands on to another observer.

    Args:
        path: of the monitor's CSV.
        then: the other observer.
        options: of `SpectrumMonitor`.

    Attributes:
        monitor: made when the run is opened.
    """

    def __init__(self, path: Path, then: loop.Observer, **options: object) -> None:
        self.path, self.then, self.options = path, then, options
        self.monitor: SpectrumMonitor | None = None

    def opened(self, run: Run) -> None:
        temperature = run.config.train.temperature
        loss = "info_nce" if isinstance(run.model, MoCo) else "nt_xent"
        self.monitor = SpectrumMonitor(self.path, temperature=temperature, loss=loss, **self.options)  # type: ignore[arg-type]
        self.then.opened(run)

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
        self.then.step(run)

    def evaluated(self, run: Run) -> None:
        self.then.evaluated(run)
