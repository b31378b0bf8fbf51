"""The bands against measured gradients: 16 synthetic settings, a real encoder, and three first experiments."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from spectral_kernels.ops.effective_rank import effective_rank
from spectral_kernels.ops.greedy import greedy_select
from spectral_kernels.ops.infonce import info_nce_grad_norms
from spectral_kernels.ops.pool import pool_select
from spectral_kernels.ops.whitening import whiten
from spectral_kernels.theory.band import gradient_band

TEMPERATURES = (0.05, 0.1, 0.2, 0.5)
ANISOTROPIES = (0.0, 0.5, 1.0, 2.0)
BATCH, DIM, ALIGNMENT, BATCHES, RANK = 256, 128, 0.8, 16, 16
KINDS = {"rank 0": {"rank": 0}, f"rank {RANK}": {"rank": RANK}, "a priori": {"kind": "a_priori"}}
# measured norms may leave a band by the rounding of their own evaluation
RELATIVE, ABSOLUTE = 1e-8, 1e-12

Views = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """One source of batches at one temperature. By band (`KINDS`): `inside`, how many of `anchors`; `width`, the median
    upper/lower of an anchor, median over batches; `lower`, `upper`, mean bounds. norm: mean measured ‖g‖².
    norms: every anchor's, and lowers, uppers its bounds at rank 16, all in one order.
    """

    source: str
    temperature: float
    anchors: int
    effective_rank: float
    norm: float
    inside: dict[str, int]
    width: dict[str, float]
    lower: dict[str, float]
    upper: dict[str, float]
    norms: Tensor
    lowers: Tensor
    uppers: Tensor

    @property
    def contained(self) -> bool:
        """Whether no anchor is outside any band."""
        return all(count == self.anchors for count in self.inside.values())


def power_law(anisotropy: float, generator: torch.Generator, rows: int = BATCH, d: int = DIM) -> Tensor:
    """(rows, d) float64 normal rows whose covariance has eigenvalues k^-anisotropy."""
    scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-anisotropy / 2)
    return torch.randn(rows, d, generator=generator, dtype=torch.float64) * scale


def synthetic_views(anisotropy: float, seed: int = 0) -> Iterator[Views]:
    """`BATCHES` pairs of views (256, 128), positives at cosine 0.8 of their anchors."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(BATCHES):
        query = normalize(power_law(anisotropy, generator), dim=1)
        noise = power_law(anisotropy, generator)
        noise = normalize(noise - (noise * query).sum(1, keepdim=True) * query, dim=1)
        yield query, ALIGNMENT * query + math.sqrt(1 - ALIGNMENT**2) * noise


def measure(source: str, batches: Iterable[Views], temperature: float) -> Setting:
    """Measured norms and every band of some batches, one-way InfoNCE."""
    pairs = [(query.double(), key.double()) for query, key in batches]
    norms = torch.cat([info_nce_grad_norms(*pair, temperature=temperature) for pair in pairs])
    ranks = [float(effective_rank(key, order=2)) for _, key in pairs]
    slack = RELATIVE * norms + ABSOLUTE
    inside, width, lowers, uppers = dict[str, int](), dict[str, float](), dict[str, Tensor](), dict[str, Tensor]()
    for kind, options in KINDS.items():
        bands = [gradient_band(*pair, temperature=temperature, **options) for pair in pairs]  # type: ignore[arg-type]
        low = lowers[kind] = torch.cat([band.lower for band in bands])
        high = uppers[kind] = torch.cat([band.upper for band in bands])
        inside[kind] = int(((low - slack <= norms) & (norms <= high + slack)).sum())
        width[kind] = float(torch.tensor([float((band.upper / band.lower).median()) for band in bands]).median())
    return Setting(
        source=source, temperature=temperature, anchors=len(norms), effective_rank=sum(ranks) / len(ranks),
        norm=float(norms.mean()), inside=inside, width=width,
        lower={kind: float(values.mean()) for kind, values in lowers.items()},
        upper={kind: float(values.mean()) for kind, values in uppers.items()},
        norms=norms, lowers=lowers[f"rank {RANK}"], uppers=uppers[f"rank {RANK}"],
    )  # fmt: skip


def synthetic_settings() -> Iterator[Setting]:
    """The 16 settings, 4096 anchors each; one anisotropy has the same batches at every temperature."""
    for anisotropy in ANISOTROPIES:
        for temperature in TEMPERATURES:
            yield measure(f"k^-{anisotropy:g}", synthetic_views(anisotropy), temperature)


@dataclass(frozen=True)
class TemperatureLaw:
    """Mean ‖g‖² of isotropic batches and its band (rank 0) at rising temperatures; slope: of ln‖g‖² against ln τ over
    the last two, −2 by the law.
    """

    temperatures: list[float]
    norms: list[float]
    lower: list[float]
    upper: list[float]
    slope: float


def temperature_law() -> TemperatureLaw:
    """Where the softmax is flat, only 1/τ² is left of the three factors."""
    temperatures = [10 ** (power / 4) for power in range(-8, 5)]
    query, key = next(synthetic_views(0.0))
    norms, lower, upper = [], [], []
    for temperature in temperatures:
        band = gradient_band(query, key, temperature=temperature)
        norms.append(float(info_nce_grad_norms(query, key, temperature=temperature).mean()))
        lower.append(float(band.batch_lower))
        upper.append(float(band.batch_upper))
    slope = math.log(norms[-1] / norms[-2]) / math.log(temperatures[-1] / temperatures[-2])
    return TemperatureLaw(temperatures, norms, lower, upper, slope)


def selected_ranks(rows: int = 4096, repeats: int = 16) -> dict[str, float]:
    """Mean R₂ of batches of 256 chosen from a pool with spectrum 1/k: random, pool selection of 16 draws, Greedy-64."""
    generator = torch.Generator().manual_seed(0)
    pool = normalize(power_law(1.0, generator, rows), dim=1).float()
    totals: dict[str, float] = {}
    for _ in range(repeats):
        chosen = {"random": torch.randperm(rows, generator=generator)[:BATCH]}
        for policy in ("low", "balanced", "high"):
            chosen[f"pool-{policy}"] = pool_select(pool, BATCH, policy=policy, generator=generator).indices
        chosen["greedy-64"] = greedy_select(pool, BATCH, candidates=64, generator=generator).indices
        for name, indices in chosen.items():
            totals[name] = totals.get(name, 0.0) + float(effective_rank(pool[indices], order=2)) / repeats
    return totals


@dataclass(frozen=True)
class WhitenedGradients:
    """Over 50 batches: total variance of the anchors' gradients, and the mean upper bound of ‖g‖² at rank 0; of the
    batches as they are, and whitened.
    """

    variance: tuple[float, float]
    upper: tuple[float, float]

    @property
    def measured(self) -> float:
        """How many times smaller whitening makes the variance."""
        return self.variance[0] / self.variance[1]

    @property
    def predicted(self) -> float:
        """How many times smaller it makes the upper bound."""
        return self.upper[0] / self.upper[1]


def whitened_gradients(anisotropy: float = 2.0, temperature: float = 0.1, batches: int = 50) -> WhitenedGradients:
    """What in-batch whitening does to the gradient at the embeddings, where the band speaks of it."""
    variances, uppers = [], []
    for whitened in (False, True):
        gradients, upper = [], 0.0
        views = (pair for seed in count() for pair in synthetic_views(anisotropy, seed))
        for query, key in islice(views, batches):
            if whitened:
                query, key = normalize(whiten(torch.cat([query, key])), dim=-1).chunk(2)
            anchors = query.clone().requires_grad_()
            logits = anchors @ key.mT / temperature
            value = cross_entropy(logits, torch.arange(len(logits)), reduction="sum")
            gradients.append(torch.autograd.grad(value, anchors)[0])
            upper += float(gradient_band(query, key, temperature=temperature).batch_upper) / batches
        variances.append(float(torch.cat(gradients).var(0).sum()))
        uppers.append(upper)
    return WhitenedGradients((variances[0], variances[1]), (uppers[0], uppers[1]))
