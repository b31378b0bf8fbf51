"""The training loop: pool → selector → views → encoder → loss → step → bank (`Run.advance`)."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.files import lock
from spectral_kernels.files.writing import sweep
from spectral_kernels.selection import MemoryBank
from spectral_kernels.training import checkpoint, run_state
from spectral_kernels.training.ahead import Ahead, Chosen
from spectral_kernels.training.augment import Augment, Normalize
from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.clock import PARTS, Clock
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData, training_pool
from spectral_kernels.training.evaluate import Evaluator, features
from spectral_kernels.training.moco import MoCo, forward_moco
from spectral_kernels.training.samplers import derive_seed, make_sampler
from spectral_kernels.training.simclr import (
    Diverged,
    Forward,
    SimCLR,
    forward_loss,
    learning_rate,
    make_optimizer,
)


def pick_device(name: str) -> torch.device:
    """`"auto"` is CUDA where there is one.

    Raises:
        ValueError: `"cuda"` where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is 'cuda', but PyTorch sees no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is arithmetic here, and not emulated at a loss."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_tile"))


class Run:
    """One training run: everything that changes while it trains, and how to put that on disk and back.

    Its random numbers come from `train.seed` through a seed per purpose: two runs that differ in the
    strategy only start from the same parameters and draw the same augmentations.

    Args:
        config: `selection.strategy` and `train.seed` say which run this is.
        data: where evaluation and the pool come from.
        folder: of `last.ckpt`; a run found there is resumed. No other process may write there while this object lives. None:
            nothing is written.
        evaluator, normalize: shared between runs on the same data; made here where None.

    Attributes:
        step: steps done. seconds: training wall-clock by part (`PARTS`), evaluation excluded.
        steps: one row a step of `run_state.STEP_COLUMNS` (seconds; effective rank NaN where not measured;
            chosen 1 where the strategy chose the batch, 0 where it was random).
        last: what the newest step computed; None before the first one.
        evaluations: one dict an evaluation: step, seconds, and accuracies by the names in `evaluate.METRICS`.

    Raises:
        ValueError: a batch larger than the pool, settings that the device or a selector refuses.
        CheckpointError: `last.ckpt` cannot be read or is of another run. FolderInUse: another process trains in `folder`.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        folder: Path | None = None,
        *,
        evaluator: Evaluator | None = None,
        normalize: Normalize | None = None,
    ) -> None:
        train = config.train
        self.config, self.folder, self.device = config, folder, pick_device(train.device)
        if folder is not None:
            self._lock = lock.hold(folder)
            sweep(folder)
        self.amp = has_bfloat16(self.device) if train.amp is None else train.amp
        data = data.to(self.device)
        pool_seed = derive_seed(train.seed, "pool")
        self.pool, _ = training_pool(
            data, long_tail=config.data.long_tail, duplicates=config.data.duplicates, seed=pool_seed
        )
        self.data = data
        normalize = Normalize(data.train_images) if normalize is None else normalize
        self.evaluator = Evaluator(data, config.evaluate, normalize) if evaluator is None else evaluator
        self.augment = Augment(config.augment, normalize, channels_last=train.channels_last)
        self.generator = torch.Generator(self.device).manual_seed(derive_seed(train.seed, "augment"))
        self.strategy = config.selection.parsed()
        self.model = self._make_model(data.train_images.shape[1])
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.bank = MemoryBank(len(self.pool), config.model.dim, device=self.device)
        self.sampler = make_sampler(self.strategy, self.bank, config, self._embed)
        self.step = 0
        self.last: Forward | None = None
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps: list[list[float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.ahead = Ahead(self._choose, self.device)
        self.begin()
        if self.path is not None and self.path.exists():
            run_state.take_up(self, self.path)

    def _make_model(self, channels: int) -> SimCLR:
        with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator: leave it as it was
            torch.manual_seed(derive_seed(self.config.train.seed, "model"))
            model = self._new_model(channels)
        if self.config.train.compile:
            for module in (model.encoder, getattr(model, "key_encoder", None)):
                if module is not None:
                    module.compile()  # in place: names in a checkpoint stay
        if self.config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self.device)

    def _new_model(self, channels: int) -> SimCLR:
        config, whiten = self.config, self.config.train.whiten or ("cholesky" if self.strategy.whiten else None)
        if config.train.method == "simclr":
            return SimCLR(config.model, channels, whiten)
        if whiten is not None:
            raise ValueError(
                f"train.method = moco has no whitening, got whiten = {whiten!r}, strategy {self.strategy.name!r}"
            )
        return MoCo(config.model, config.moco, channels)

    def begin(self) -> None:
        """Batches come from where the sampler stands now."""
        self._batches = self._iterate()

    def _iterate(self) -> Iterator[list[int]]:
        for epoch in count(self.sampler.epoch):
            self.sampler.set_epoch(epoch)
            yield from self.sampler

    def _embed(self, rows: Tensor) -> Tensor:
        """Embeddings of rows of the pool as the model is now, without augmentation."""
        images = self.pool[rows.to(self.device)]
        return features(self.model, images, self.augment.normalize, amp=self.amp, chunk=len(rows))

    def _choose(self) -> Chosen:
        return Chosen(next(self._batches), self.sampler.last_selection is not None)

    # --- training

    def advance(self, until: int, callbacks: Sequence[Callback] = ()) -> None:
        """Train until `until` steps are done or the budget is spent.

        One step is pool → selector → views → encoder → loss → step → bank.

        Raises:
            Diverged: NaN or Inf in a projection or a parameter; last.ckpt keeps the last good state.
        """
        train = self.config.train
        overlap = self.config.selection.overlap and self.strategy.kind in ("pool", "greedy")
        self.model.train()
        while self.step < until and not self.done:
            clock = Clock(self.device)
            chosen = self.ahead.take()
            if overlap:  # from the bank as it is now
                self.ahead.start()
            clock.split("selection")

            indices = torch.tensor(chosen.rows, device=self.device)
            self._set_learning_rate()
            self.optimizer.zero_grad()
            parts: list[Forward] = []
            for rows in indices.chunk(train.accumulate):
                views = self.augment(self.pool[rows].repeat(2, 1, 1, 1), self.generator)
                clock.split("data")
                part = self._forward(views, first=not parts)
                (part.loss / train.accumulate).backward()
                parts.append(part._replace(loss=part.loss.detach()))
                clock.split("compute")
            self.last = Forward.joined(parts)
            self.optimizer.step()
            clock.split("compute")

            if self.strategy.kind != "random":
                self.ahead.settle()
                self.bank.update(indices, self.last.embeddings)
                clock.split("selection")

            self._record(self.last, clock, chosen.selected)
            if self.step % train.checkpoint_every == 0:
                self.save()
            for callback in callbacks:
                callback.step(self)

    def _forward(self, views: Tensor, *, first: bool) -> Forward:
        try:
            return self._losses(views, first)
        except Diverged as error:
            raise self._diverged(str(error)) from None

    def _losses(self, views: Tensor, first: bool) -> Forward:
        temperature = self.config.train.temperature
        if isinstance(self.model, MoCo):
            return forward_moco(self.model, views, temperature, self.amp, follow=first)
        return forward_loss(self.model, views, temperature, self.amp)

    def _set_learning_rate(self) -> None:
        train = self.config.train
        progress = self.progress if train.steps is None else (self.step + 0.5) / train.steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, self.config.optimizer)

    def _record(self, last: Forward, clock: Clock, selected: bool) -> None:
        rank = float("nan")
        if self.step % self.config.train.rank_every == 0:  # off the clock: a measurement, not part of training
            rank = float(sk.effective_rank(last.embeddings, order=2))
        self.steps.append([last.loss.item(), rank, float(selected), *clock.seconds.values()])
        self.step += 1
        for part, seconds in clock.seconds.items():
            self.seconds[part] += seconds

    @property
    def elapsed(self) -> float:
        """Training wall-clock in seconds."""
        return sum(self.seconds.values())

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        train = self.config.train
        return min(1.0, self.step / train.steps if train.steps else self.elapsed / (train.seconds or 1.0))

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.progress >= 1

    @property
    def finished(self) -> bool:
        """Whether the budget is spent and the result evaluated."""
        return self.done and bool(self.evaluations) and self.evaluations[-1]["step"] == self.step

    def turn(self, callbacks: Sequence[Callback] = (), steps: int | None = None) -> bool:
        """Train up to the next evaluation, do it, and save. The first one is of the untrained encoder.

        Args:
            steps: at most so many.

        Returns:
            Whether the evaluation was reached.
        """
        due, every = 0, self.config.evaluate.every
        if self.evaluations:
            due = (int(self.evaluations[-1]["step"]) // every + 1) * every
        self.advance(due if steps is None else min(due, self.step + steps), callbacks)
        if self.step < due and not self.done:
            return False
        self.evaluate()
        self.save()
        return True

    def evaluate(self) -> dict[str, float]:
        """Judge the encoder now, off the clock, and note it in `evaluations`."""
        scores = self.evaluator(self.model.encoder, amp=self.amp)
        self.evaluations.append({"step": self.step, "seconds": self.elapsed, **scores})
        return self.evaluations[-1]

    def warm_up(self) -> None:
        """Run one forward and backward pass whose result is thrown away, so that no run pays for the
        libraries' first use.
        """
        size = self.config.train.batch_size // self.config.train.accumulate
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        generator = torch.Generator(self.device).manual_seed(0)
        views = self.augment(self.pool[:size].repeat(2, 1, 1, 1), generator)
        self.model.train()
        self._losses(views, True).loss.backward()
        self.optimizer.zero_grad()
        self.model.load_state_dict(state)  # batch statistics moved

    # --- checkpoints

    @property
    def path(self) -> Path | None:
        """Where the checkpoint is."""
        return None if self.folder is None else self.folder / "last.ckpt"

    def save(self) -> None:
        """Write `last.ckpt`, atomically; nothing where the run has no folder.

        Raises:
            Diverged: a parameter is NaN or Inf: such a state is not worth keeping, the last good one stays.
        """
        if self.path is None:
            return
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._diverged("a parameter is NaN or Inf")
        checkpoint.save(self.path, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All of the run, in tensors and plain types."""
        return run_state.state_of(self)

    def _diverged(self, reason: str) -> Diverged:
        advice = "Try a smaller optimizer.lr, a longer optimizer.warmup or a larger train.temperature"
        if self.path is not None and self.path.exists():
            advice = (
                f"the last good state is in {self.path}, and goes on to the same end with the same settings. {advice}, "
                "with --fresh or in another folder"
            )
        return Diverged(f"training diverged at step {self.step}: {reason}; {advice[0].lower()}{advice[1:]}")


def train(
    config: Config,
    data: ImageData,
    folder: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train one run to the end of its budget, evaluating on the way; goes on where `last.ckpt` in `folder`
    stopped.

    Returns:
        The finished `Run`.

    Raises:
        What `Run` and `Run.advance` raise.
    """
    run = Run(config, data, folder)
    for callback in callbacks:
        callback.opened(run)
    if not run.finished:
        run.warm_up()
    while not run.finished:
        run.turn(callbacks)
        for callback in callbacks:
            callback.evaluated(run)
    return run
