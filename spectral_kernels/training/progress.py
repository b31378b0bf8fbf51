"""How far training is: a bar on a terminal, a line per evaluation otherwise."""

import importlib.util
import sys
from typing import Any

from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.compare import RunRecord
from spectral_kernels.training.config import TrainConfig
from spectral_kernels.training.loop import Run


class Progress(Callback):
    """Shows the progress of `runs` runs on one budget; a context manager.

    Args:
        config: the budget.
        runs: how many runs share the bar.
    """

    def __init__(self, config: TrainConfig, runs: int = 1) -> None:
        self._per_step = config.steps is not None
        self._each = float(config.steps or config.seconds or 0)
        self._runs = runs
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            unit = "steps" if self._per_step else "s of training"
            layout = f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total:.0f}} {unit} [{{elapsed}}<{{remaining}}{{postfix}}]"
            total = self._each * self._runs
            self._bar = tqdm(total=total, bar_format=layout, dynamic_ncols=True, smoothing=0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def opened(self, run: Run) -> None:
        if run.step:
            self._add(run.step if self._per_step else run.elapsed)
            state = "finished before" if run.finished else f"going on at step {run.step}"
            self._say(f"{self._name(run)}: {state}")

    def skipped(self, record: RunRecord) -> None:
        self._add(self._each)
        self._say(f"{record.strategy}, seed {record.seed}: finished before")

    def step(self, run: Run) -> None:
        self._add(1 if self._per_step else sum(run.steps[-1][-3:]))

    def evaluated(self, run: Run) -> None:
        row = run.evaluations[-1]
        self._say(
            f"{self._name(run)}: step {run.step}, {run.elapsed:.1f} s, "
            f"linear probe {100 * row['linear']:.1f} %, kNN-20 {100 * row['knn20']:.1f} %"
        )

    def _add(self, amount: float) -> None:
        if self._bar is not None:
            self._bar.update(min(amount, self._bar.total - self._bar.n))

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            print(text, flush=True)

    @staticmethod
    def _name(run: Run) -> str:
        return f"{run.strategy.name}, seed {run.config.train.seed}"
