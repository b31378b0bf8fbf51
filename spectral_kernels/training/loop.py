"""The training loop: pool → selector → views → encoder → loss → step → bank (`Run.advance`)."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels import checks
from spectral_kernels.files import lock
from spectral_kernels.files.writing import sweep
from spectral_kernels.selection import (
    GreedyBatchSampler,
    LiveBatchSampler,
    MemoryBank,
    PoolBatchSampler,
    RandomBatchSampler,
)
from spectral_kernels.training import checkpoint
from spectral_kernels.training.ahead import Ahead, Chosen
from spectral_kernels.training.augment import Augment, Normalize
from spectral_kernels.training.config import Config, Strategy
from spectral_kernels.training.data import ImageData, training_pool
from spectral_kernels.training.evaluate import METRICS, Evaluator
from spectral_kernels.training.moco import MoCo, forward_moco
from spectral_kernels.training.simclr import (
    Diverged,
    Forward,
    SimCLR,
    forward_loss,
    learning_rate,
    make_optimizer,
)

PARTS = ("selection", "data", "compute")  # of a step's wall-clock
STEP_COLUMNS = ("loss", "effective_rank", "chosen", *PARTS)
CHECKPOINT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "config": dict, "data": str, "finished": bool, "step": int, "seconds": dict, "steps": Tensor, "evaluations": list,
    "model": dict, "optimizer": dict, "generator": Tensor, "sampler": dict, "pending": (tuple, type(None)),
    "bank": (dict, type(None)),
}  # fmt: skip


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that no two streams share their numbers."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Observer:
    """Is told what runs do; this one ignores it."""

    def opened(self, run: "Run") -> None:
        """A run is about to start, or to go on."""

    def step(self, run: "Run") -> None:
        """A run made a step."""

    def evaluated(self, run: "Run") -> None:
        """A run was evaluated."""


class Clock:
    """Splits a step's wall-clock; waits for the device at each split, so that work is booked where it was
    asked for.
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


class Run:
    """One training run: everything that changes while it trains, and how to put that on disk and back.

    Its random numbers come from `train.seed` through a seed per purpose: two runs that differ in the
    strategy only start from the same parameters and draw the same augmentations.

    Args:
        config: `selection.strategy` and `train.seed` say which run this is.
        data: where evaluation and the pool come from.
        folder: of `last.ckpt`; a run found there is gone on with. No other process may write there for as long as this object
            lives. None: nothing is written.
        evaluator, normalize: shared between runs on the same data; made here where None.

    Attributes:
        step: steps done. seconds: training wall-clock by part (`PARTS`), evaluation excluded.
        steps: one row a step of `STEP_COLUMNS` (seconds; effective rank NaN where not measured;
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
        self._data = data
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
        self._batches = self._iterate()
        self._ahead = Ahead(self._choose, self.device)
        if self.path is not None and self.path.exists():
            self.load(self.path)

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

    def _iterate(self) -> Iterator[list[int]]:
        for epoch in count(self.sampler.epoch):
            self.sampler.set_epoch(epoch)
            yield from self.sampler

    def _embed(self, rows: Tensor) -> Tensor:
        """Embeddings of rows of the pool as the model is now, without augmentation."""
        images = self.augment.normalize(self.pool[rows.to(self.device)])
        training = self.model.training
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            z: Tensor = self.model(images.to(memory_format=self.augment.format))
        self.model.train(training)
        return z.float()

    def _choose(self) -> Chosen:
        return Chosen(next(self._batches), self.sampler.last_selection is not None)

    # --- training

    def advance(self, until: int, observer: Observer | None = None) -> None:
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
            chosen = self._ahead.take()
            if overlap:  # from the bank as it is now
                self._ahead.start()
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
                self._ahead.settle()
                self.bank.update(indices, self.last.embeddings)
                clock.split("selection")

            self._record(self.last, clock, chosen.selected)
            if self.step % train.checkpoint_every == 0:
                self.save()
            if observer is not None:
                observer.step(self)

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

    def turn(self, observer: Observer | None = None, steps: int | None = None) -> bool:
        """Train up to the next evaluation, do it, and save. The first one is of the untrained encoder.

        Args:
            steps: at most so many.

        Returns:
            Whether the evaluation was reached.
        """
        due, every = 0, self.config.evaluate.every
        if self.evaluations:
            due = (int(self.evaluations[-1]["step"]) // every + 1) * every
        self.advance(due if steps is None else min(due, self.step + steps), observer)
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
        """All that `load` needs, in tensors and plain types."""
        return {
            "config": self.config.to_dict(),
            "data": identity(self._data),
            "finished": self.finished,
            "step": self.step,
            "seconds": dict(self.seconds),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "sampler": self.sampler.state_dict(),
            "pending": None if self._ahead.pending is None else tuple(self._ahead.pending),
            "bank": None if self.strategy.kind == "random" else self.bank.state_dict(),
            "steps": torch.tensor(self.steps, dtype=torch.float64).reshape(-1, len(STEP_COLUMNS)),
            "evaluations": [dict(evaluation) for evaluation in self.evaluations],
        }

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, bit for bit as if the run had not stopped (given the same number of
        threads).

        Raises:
            CheckpointError: unreadable, or of another run; names the file and the field.
        """
        state = read_state(path, self.config, self._data)
        checkpoint.restore(path, "model", state["model"], self.model.load_state_dict)
        checkpoint.restore(
            path, "optimizer", state["optimizer"], lambda state: checkpoint.load_optimizer(self.optimizer, state)
        )
        checkpoint.restore(path, "generator", state["generator"], self.generator.set_state)
        checkpoint.restore(path, "sampler", state["sampler"], self.sampler.load_state_dict)
        if self.strategy.kind != "random":
            checkpoint.restore(path, "bank", state["bank"], self.bank.load_state_dict)
        self.step, self.seconds = state["step"], state["seconds"]
        self.steps, self.evaluations = state["steps"].tolist(), state["evaluations"]
        self._batches = self._iterate()
        checkpoint.restore(path, "pending", state["pending"], self._set_pending)

    def _set_pending(self, pending: Any) -> None:
        self._ahead.pending = None
        if pending is not None:
            rows, selected = pending
            checks.row_indices(torch.tensor(rows), "its rows", len(self.pool), 1)
            self._ahead.pending = Chosen(list(rows), bool(selected))

    def _diverged(self, reason: str) -> Diverged:
        advice = "Try a smaller optimizer.lr, a longer optimizer.warmup or a larger train.temperature"
        if self.path is not None and self.path.exists():
            advice = (
                f"the last good state is in {self.path}, and goes on to the same end with the same settings. {advice}, "
                "with --fresh or in another folder"
            )
        return Diverged(f"training diverged at step {self.step}: {reason}; {advice[0].lower()}{advice[1:]}")


def identity(data: ImageData) -> str:
    """What tells one data set from another, for checkpoints."""
    return f"{data.name} {'x'.join(map(str, data.train_images.shape))}"


def read_state(path: Path, config: Config, data: ImageData) -> dict[str, Any]:
    """Read the checkpoint of a run with these settings on this data.

    Raises:
        CheckpointError: unreadable, or of another run; names the file and the field.
    """
    state = checkpoint.load(path, CHECKPOINT_FIELDS)
    checkpoint.check_config(path, state["config"], config.to_dict())
    if state["data"] != identity(data):
        raise checkpoint.CheckpointError(
            path, f"is of another run: data is {state['data'][:100]!r} there and {identity(data)!r} here"
        )
    checkpoint.restore(path, "steps", state, _check_record)
    return state


def _check_record(state: dict[str, Any]) -> None:
    """Raise for what a run does not write: ValueError, KeyError, TypeError."""
    step, steps, seconds = state["step"], state["steps"], state["seconds"]
    if step < 0 or steps.shape != (step, len(STEP_COLUMNS)) or steps.dtype != torch.float64:
        raise ValueError(f"{step} steps, recorded as {tuple(steps.shape)} {steps.dtype}")
    if seconds.keys() != set(PARTS) or any(
        type(one) is not float or not 0 <= one < math.inf for one in seconds.values()
    ):
        raise ValueError(f"seconds are {seconds}")
    for evaluation in state["evaluations"]:
        if any(type(value) not in (int, float) for value in evaluation.values()):
            raise ValueError(f"an evaluation of {evaluation}")
        if evaluation.keys() != {"step", "seconds", *METRICS}:
            raise ValueError(f"an evaluation with {list(evaluation)}")


def make_sampler(
    strategy: Strategy, bank: MemoryBank, config: Config, embed: Callable[[Tensor], Tensor]
) -> RandomBatchSampler | PoolBatchSampler | GreedyBatchSampler | LiveBatchSampler:
    """The batch sampler of a strategy; `embed` makes embeddings of rows for a live pool."""
    selection, size = config.selection, config.train.batch_size
    seed = derive_seed(config.train.seed, "sampler")
    if strategy.kind == "random":
        return RandomBatchSampler(bank, size, seed=seed)
    window = selection.window if strategy.window else None
    if strategy.kind == "pool":
        return PoolBatchSampler(
            bank,
            size,
            draws=selection.draws,
            policy=strategy.policy,
            window=window,
            min_seen=selection.min_seen,
            replacement=selection.replacement,
            seed=seed,
        )
    if strategy.kind == "live":
        return LiveBatchSampler(
            bank, size, embed, pool=selection.live_pool, candidates=strategy.candidates, window=window, seed=seed
        )
    return GreedyBatchSampler(
        bank,
        size,
        candidates=strategy.candidates,
        window=window,
        min_seen=selection.min_seen,
        replacement=selection.replacement,
        seed=seed,
    )


def train(
    config: Config,
    data: ImageData,
    folder: Path | None = None,
    observer: Observer | None = None,
) -> Run:
    """Train one run to the end of its budget, evaluating on the way; goes on where `last.ckpt` in `folder`
    stopped.

    Returns:
        The finished `Run`.

    Raises:
        What `Run` and `Run.advance` raise.
    """
    observer = observer or Observer()
    run = Run(config, data, folder)
    observer.opened(run)
    if not run.finished:
        run.warm_up()
    while not run.finished:
        run.turn(observer)
        observer.evaluated(run)
    return run
