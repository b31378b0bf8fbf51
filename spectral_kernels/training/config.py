"""The settings of a run: dataclasses, refused where they make no sense. `settings.py` reads them."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from spectral_kernels import checks
from spectral_kernels.ops.pool import POLICIES
from spectral_kernels.ops.whitening import METHODS
from spectral_kernels.training.augment import AugmentConfig
from spectral_kernels.training.data import NAMES
from spectral_kernels.training.models import ENCODERS, STEMS


@dataclass(frozen=True)
class Strategy:
    """A parsed strategy name.

    kind: `"random"`, `"pool"`, `"greedy"` or `"live"`. policy: of the pool selector. candidates: of the greedy
    builder, None for every row. window: whether the pool selector prefers batches inside `selection.window`. whiten:
    whether the batch is whitened before the loss.
    """

    name: str
    kind: str
    policy: str | float = "balanced"
    candidates: int | None = None
    window: bool = False
    whiten: bool = False


def parse_strategy(name: str) -> Strategy:
    """Read `random`, `pool-low`, `pool-balanced`, `pool-high`, `pool-0.25`, `greedy-64`, `greedy-all`, `live-64`,
    `live-all`, the pool's optionally followed by `+window`, and all of them by `+whiten`.

    Raises:
        ValueError: any other name.
    """
    head, *options = name.split("+")
    kind, _dash, value = head.partition("-")
    chosen = {option: option in options for option in ("window", "whiten")}
    if options == [option for option in chosen if chosen[option]]:
        if head == "random" and not chosen["window"]:
            return Strategy(name, "random", **chosen)
        if kind in ("greedy", "live") and re.fullmatch(r"[1-9]\d{0,8}|all", value) and not chosen["window"]:
            return Strategy(name, kind, candidates=None if value == "all" else int(value), **chosen)
        if kind == "pool" and value in POLICIES:
            return Strategy(name, kind, policy=value, **chosen)
        if kind == "pool" and re.fullmatch(r"[01]|0?\.\d+|1\.0+", value):
            return Strategy(name, kind, policy=float(value), **chosen)
    raise ValueError(
        f"unknown strategy {checks.shortened(name)}: random, pool-low, pool-balanced, pool-high, pool-QUANTILE, greedy-M "
        "(such as greedy-64), greedy-all, live-M or live-all; pool-… optionally followed by +window, and all by +whiten"
    )


MOST = 2**31 - 1  # of a count: what torch takes for a size


def _at_least(section: str, low: float, most: float = MOST, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not low <= value <= most:
            bound = f"most {most}" if value > most else f"least {low}"
            raise ValueError(f"{section}.{name} must be at {bound}, got {checks.shortened(value)}")


@dataclass(frozen=True)
class DataConfig:
    """name, root, download, fallback, size, corrupt, workers: see `data.load`. long_tail, duplicates: see
    `data.training_pool`.
    """

    name: str = "fashion_mnist"
    root: str | None = None
    download: bool = False
    fallback: str | None = None
    size: int = 224
    corrupt: str = "refuse"
    workers: int | None = None
    long_tail: float | None = None
    duplicates: float = 0.0

    def __post_init__(self) -> None:
        checks.one_of(self.name, "data.name", NAMES)
        if self.fallback is not None:
            checks.one_of(self.fallback, "data.fallback", ("digits",))
        checks.one_of(self.corrupt, "data.corrupt", ("refuse", "skip"))
        _at_least("data", 8, 4096, size=self.size)
        _at_least("data", 1, 1024, workers=self.workers)
        _at_least("data", 1, long_tail=self.long_tail)
        checks.number(self.duplicates, "data.duplicates", "in [0, 1)", lambda x: 0 <= x < 1)


@dataclass(frozen=True)
class ModelConfig:
    """encoder, width, stem: see `models.encoder`. hidden, dim: of the projection head."""

    encoder: str = "conv4"
    width: int | None = None
    stem: str = "cifar"
    hidden: int = 256
    dim: int = 128

    def __post_init__(self) -> None:
        checks.one_of(self.encoder, "model.encoder", ENCODERS)
        checks.one_of(self.stem, "model.stem", STEMS)
        _at_least("model", 1, width=self.width, hidden=self.hidden, dim=self.dim)


@dataclass(frozen=True)
class MoCoConfig:
    """queue: keys kept as negatives. momentum: of the key encoder, the share of itself that it keeps in a step."""

    queue: int = 65536
    momentum: float = 0.999

    def __post_init__(self) -> None:
        _at_least("moco", 2, queue=self.queue)
        checks.number(self.momentum, "moco.momentum", "in [0, 1]", lambda x: 0 <= x <= 1)


@dataclass(frozen=True)
class OptimizerConfig:
    """name: `"sgd"`, `"lars"` or `"adamw"`. lr: peak learning rate, reached after `warmup` (share of the budget),
    then a cosine down to 0. momentum: of SGD (Nesterov where `nesterov`) and LARS, eta: of LARS. weight_decay: not on
    biases and normalisation.
    """

    name: str = "sgd"
    lr: float = 0.3
    warmup: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    eta: float = 0.02
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        checks.one_of(self.name, "optimizer.name", ("sgd", "lars", "adamw"))
        checks.positive(self.lr, "optimizer.lr")
        checks.positive(self.eta, "optimizer.eta")
        _at_least("optimizer", 0, weight_decay=self.weight_decay)
        for name in ("warmup", "momentum"):
            checks.number(getattr(self, name), f"optimizer.{name}", "in [0, 1)", lambda x: 0 <= x < 1)


@dataclass(frozen=True)
class SelectionConfig:
    """strategy: of `train`; see `parse_strategy`. draws: of the pool selector. live_pool: batches of images that `live`
    embeds for each one it chooses. window: (low, high) effective rank, of `pool-…+window`. min_seen: batches are random
    until this share of the pool has an embedding in the memory bank. replacement: each batch chooses from the whole pool,
    instead of from what an epoch has left. overlap: the next batch is chosen, by a thread of its own, while this one trains;
    the bank it is chosen from is then one step older. A live pool is embedded by the model that trains: nothing overlaps.
    """

    strategy: str = "greedy-64"
    draws: int = 16
    live_pool: int = 4
    window: tuple[float, float] | None = None
    min_seen: float = 0.9
    replacement: bool = True
    overlap: bool = False

    def __post_init__(self) -> None:
        _at_least("selection", 1, 2**16, draws=self.draws, live_pool=self.live_pool)
        checks.number(self.min_seen, "selection.min_seen", "in [0, 1]", lambda x: 0 <= x <= 1)
        if self.window is not None and not 0 < self.window[0] <= self.window[1] < math.inf:
            raise ValueError(f"selection.window must be (low, high) with 0 < low <= high, got {self.window!r}")
        self.parsed()

    def parsed(self, strategy: str | None = None) -> Strategy:
        """The strategy, or another one under the same settings."""
        parsed = parse_strategy(self.strategy if strategy is None else strategy)
        if parsed.window and self.window is None:
            raise ValueError(f"strategy {parsed.name!r} needs selection.window=[low, high]")
        return parsed


@dataclass(frozen=True)
class TrainConfig:
    """method: `"simclr"` or `"moco"` (MoCo-v2). steps, seconds: the budget, exactly one of them; seconds are
    training wall-clock, evaluation excluded.
    temperature: of NT-Xent. whiten: method of in-batch whitening before the loss (`whiten`); None: only where the
    strategy says `+whiten`, by Cholesky.
    accumulate: parts of a batch that go through the encoder one after the other, to save memory; their gradients are
    averaged, and an anchor's in-batch negatives are those of its part.
    amp: bfloat16 autocast; None: where the device has bfloat16 arithmetic. compile: `torch.compile` of the encoders.
    rank_every: steps between measurements of the batch's effective rank. checkpoint_every: steps between
    writes of last.ckpt. device: `"auto"`, `"cpu"`, `"cuda"`.
    """

    seed: int = 0
    batch_size: int = 256
    accumulate: int = 1
    method: str = "simclr"
    steps: int | None = None
    seconds: float | None = None
    temperature: float = 0.2
    whiten: str | None = None
    amp: bool | None = None
    compile: bool = False
    channels_last: bool = True
    rank_every: int = 10
    checkpoint_every: int = 200
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                "exactly one of train.steps and train.seconds must be set, "
                f"got steps={self.steps!r} and seconds={self.seconds!r}"
            )
        _at_least("train", 0, seed=self.seed)
        _at_least("train", 1, steps=self.steps, rank_every=self.rank_every, checkpoint_every=self.checkpoint_every)
        _at_least("train", 2, batch_size=self.batch_size)
        _at_least("train", 1, accumulate=self.accumulate)
        if self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate:
            raise ValueError(
                "train.batch_size must be a multiple of train.accumulate, and at least twice it, "
                f"got {self.batch_size} and {self.accumulate}"
            )
        if self.seconds is not None:
            checks.positive(self.seconds, "train.seconds")
        checks.positive(self.temperature, "train.temperature")
        checks.one_of(self.method, "train.method", ("simclr", "moco"))
        if self.whiten is not None:
            checks.one_of(self.whiten, "train.whiten", METHODS)
        checks.one_of(self.device, "train.device", ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class EvaluateConfig:
    """every: steps between evaluations (also before the first step and after the last). train_images,
    test_images: how many are used, None for all; the training ones are drawn once from the clean set. l2:
    of the linear probe.
    """

    every: int = 200
    train_images: int | None = None
    test_images: int | None = None
    l2: float = 1e-3

    def __post_init__(self) -> None:
        _at_least("evaluate", 1, every=self.every)
        _at_least("evaluate", 200, train_images=self.train_images)
        _at_least("evaluate", 1, test_images=self.test_images)
        _at_least("evaluate", 0, l2=self.l2)


@dataclass(frozen=True)
class CompareConfig:
    """strategies × seeds. The target is the linear probe's accuracy that the mean of the `random` runs has
    reached at `target_share` of the budget, or `target` where that is set."""

    strategies: tuple[str, ...] = ("random", "pool-balanced", "greedy-64")
    seeds: tuple[int, ...] = (0, 1)
    target_share: float = 0.8
    target: float | None = None

    def __post_init__(self) -> None:
        for name, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"compare.{name} must be one or more different values, got {list(values)!r}")
        for strategy in self.strategies:
            parse_strategy(strategy)
        for seed in self.seeds:
            _at_least("compare", 0, seeds=seed)
        for name, value in (("target_share", self.target_share), ("target", self.target)):
            if value is not None:
                checks.number(value, f"compare.{name}", "above 0 and at most 1", lambda x: 0 < x <= 1)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; `selection.strategy` and `train.seed` are those of `train`, `compare`
    sets its own.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # read from a file: the data set's own
    model: ModelConfig = field(default_factory=ModelConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain types, what YAML, JSON and a checkpoint can hold."""
        return asdict(self, dict_factory=_plain)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {"train.steps": …}."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
