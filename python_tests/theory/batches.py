"""Batches on which a band is tested: every family that made a bound fail, or that attains one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import spectral_kernels as sk
from spectral_kernels.theory.band import GradientBand, gradient_band

FAMILIES = ("isotropic", "power law", "clustered", "duplicated", "collapsed", "one-hot", "opposite", "zero rows")
LOSSES = ("info_nce", "queue", "nt_xent")


@dataclass(frozen=True)
class Batch:
    """Arguments of `gradient_band` and `info_nce_grad_norms`."""

    query: Tensor
    key: Tensor
    queue: Tensor | None
    loss: str
    temperature: float

    def band(self, **options: object) -> GradientBand:
        return gradient_band(
            self.query, self.key, queue=self.queue, loss=self.loss, temperature=self.temperature, **options
        )  # type: ignore[arg-type]

    def norms(self) -> Tensor:
        """In float64: the band's promise is on the numbers given, not on a float32 evaluation of them."""
        queue = None if self.queue is None else self.queue.double()
        return sk.info_nce_grad_norms(
            self.query.double(), self.key.double(), queue=queue, loss=self.loss, temperature=self.temperature
        )

    def outside(self, **options: object) -> int:
        """Anchors outside the band by more than 1e-8 relative and 1e-12."""
        band, norms = self.band(**options), self.norms()
        assert bool(torch.isfinite(band.lower).all() and torch.isfinite(band.upper).all())
        slack = 1e-8 * norms + 1e-12
        return int(((norms < band.lower - slack) | (norms > band.upper + slack)).sum())


def embeddings(family: str, n: int, d: int, generator: torch.Generator) -> Tensor:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if family == "power law":
        return noise(n, d) * torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    if family == "clustered":
        centres = noise(max(1, min(n // 8, 10)), d)
        return centres[torch.arange(n) % len(centres)] + 0.05 * noise(n, d)
    if family == "duplicated":
        return noise(max(1, n // 3), d)[torch.arange(n) % max(1, n // 3)]
    if family == "collapsed":
        return noise(1, d) + 10 ** (-8 * torch.rand(1, generator=generator, dtype=torch.float64)) * noise(n, d)
    if family == "one-hot":
        return torch.eye(d, dtype=torch.float64)[torch.randint(d, (n,), generator=generator)]
    if family == "opposite":
        return noise(1, d) * (1 - 2 * (torch.arange(n) % 2)).unsqueeze(1) + 1e-3 * noise(n, d)
    if family == "zero rows":
        z = noise(n, d)
        z[::3] = 0
        return z
    return noise(n, d)


def batch(
    family: str, loss: str, n: int, d: int, temperature: float, closeness: float, seed: int,
    dtype: torch.dtype = torch.float64,
) -> Batch:  # fmt: skip
    """n anchors whose positives lie nearby, `closeness` from 0 (unrelated) to 1 (the same row)."""
    generator = torch.Generator().manual_seed(seed)
    query = embeddings(family, n, d, generator)
    other = torch.randn(n, d, generator=generator, dtype=torch.float64)
    key = closeness * normalize(query) + math.sqrt(1 - closeness**2) * normalize(other)
    queue = embeddings(family, max(2, n // 2 + 1), d, generator).to(dtype) if loss == "queue" else None
    return Batch(query.to(dtype), key.to(dtype), queue, "nt_xent" if loss == "nt_xent" else "info_nce", temperature)


def _on_a_circle(generator: torch.Generator) -> Tensor:
    """Three unit rows in a plane of five dimensions, 0.3 about its middle."""
    angles = 2 * math.pi * torch.rand(3, generator=generator, dtype=torch.float64)
    height = torch.full_like(angles, math.sqrt(1 - 0.3**2))
    zero = torch.zeros_like(angles)
    return torch.stack([0.3 * angles.cos(), 0.3 * angles.sin(), height, zero, zero], 1)


def _anchor(generator: torch.Generator) -> Tensor:
    """A unit row whose similarities to the rows of the circle differ."""
    u = torch.zeros(1, 5, dtype=torch.float64)
    u[0, :2] = torch.randn(2, generator=generator, dtype=torch.float64)
    u[0, 2] = 0.2
    return normalize(u)


def queue_of_three(seed: int) -> Batch:
    """One anchor whose norm is the upper or the lower bound itself at rank 0.

    Three negatives span a plane, where the ellipsoid's rim is the set of all their weights. What the logits say leaves
    a chord of it, the mean is one of its ends, and the positive lies far off in the chord's direction.
    """
    generator = torch.Generator().manual_seed(seed)
    queue, u = _on_a_circle(generator), _anchor(generator)
    along = torch.stack([-u[:, 1], u[:, 0]], 1)
    side = 1 if seed % 2 else -1
    positive = torch.cat([side * along, torch.full((1, 3), 0.1, dtype=torch.float64)], 1)
    return Batch(u, normalize(positive), queue, "info_nce", 0.3)


def batch_of_four(seed: int) -> Batch:
    """A batch whose first anchor's norm may be its upper bound at rank 1.

    Its three negatives lie as in `queue_of_three` and the positive right across their plane, so that Cᵢ = (N/n)·C in it;
    the direction across is the widest one.
    """
    generator = torch.Generator().manual_seed(seed)
    negatives, u = _on_a_circle(generator), _anchor(generator)
    positive = negatives.mean(0, keepdim=True).clone()
    positive[0, 2] = 0
    positive[0, 3] = (1 - positive.square().sum()).sqrt()
    query = torch.cat([u, normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64))])
    return Batch(query, torch.cat([positive, negatives]), None, "info_nce", 0.3)
