"""The keys of a batch, their moments and their eigenvectors, in float64: what all anchors of a band share."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_kernels.ops._rows import read_rows

CHUNK = 2**22  # logits at a time: 32 MB in float64


@dataclass(frozen=True)
class Keys:
    """Every candidate negative of a batch, in the eigenbasis of their covariance C.

    Attributes:
        rows: (N, d) normalised keys in that basis, λ descending.
        own: (A, d) the positive of each anchor. anchors: (A, d).
        mean: (N,)-mean of the keys, (d,).
        eigenvalues: (d,) of C, descending, inflated by the rounding of their computation.
        excluded: how many of the N keys an anchor leaves out: 0 (queue), 1 (in-batch), 2 (NT-Xent).
    """

    rows: Tensor
    own: Tensor
    anchors: Tensor
    mean: Tensor
    eigenvalues: Tensor
    excluded: int

    @property
    def negatives(self) -> int:
        """How many negatives an anchor has, n."""
        return len(self.rows) - self.excluded

    def chunks(self) -> Iterator[slice]:
        """Slices of the anchors whose logits fit in memory together."""
        step = max(1, CHUNK // len(self.rows))
        for first in range(0, len(self.anchors), step):
            yield slice(first, min(first + step, len(self.anchors)))

    def similarities(self, part: slice) -> Tensor:
        """(a, N) u·v_k, -inf for the keys that are no negatives of the anchor."""
        s = self.anchors[part] @ self.rows.mT
        if self.excluded:
            anchor = torch.arange(part.start, part.stop, device=s.device)
            place = anchor - part.start
            s[place, anchor] = -torch.inf
            if self.excluded == 2:
                s[place, (anchor + len(self.anchors) // 2) % len(self.anchors)] = -torch.inf
        return s

    def leave_out(self, part: slice) -> tuple[Tensor, Tensor]:
        """Mean of each anchor's own negatives, (a, d), and its variance along the anchor, uᵀCᵢu, (a,)."""
        u = self.anchors[part]
        total = len(self.rows) * self.mean
        out = [] if self.excluded == 0 else [self.own[part]] if self.excluded == 1 else [self.own[part], u]
        mean = (total - sum(out, torch.zeros_like(u))) / self.negatives
        # spread about the mean of all keys, so that nothing large cancels
        spread = (u.square() * self.eigenvalues).sum(-1) * len(self.rows)
        for row in out:
            spread = spread - ((row - self.mean) * u).sum(-1).square()
        variance = spread / self.negatives - ((mean - self.mean) * u).sum(-1).square()
        return mean, variance.clamp(min=0)


def gather_keys(query: Tensor, key: Tensor, queue: Tensor | None, loss: str) -> Keys:
    """Keys of a checked call; C = Σ (v − μ)(v − μ)ᵀ / N over all of them."""
    u, v = read_rows(query.detach().double(), True), read_rows(key.detach().double(), True)
    if loss == "nt_xent":
        u, v = torch.cat([u, v]), torch.cat([v, u])
        rows, excluded = u, 2
    elif queue is None:
        rows, excluded = v, 1
    else:
        rows, excluded = read_rows(queue.detach().double(), True), 0
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(rows))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # eigh is off by no more than some d units of rounding of the largest; above 0 also where all keys are one
    eps = torch.finfo(torch.float64).eps
    slack = 8 * len(values) * eps * values[0].clamp(min=eps)
    return Keys(rows @ vectors, v @ vectors, u @ vectors, mean @ vectors, values + slack, excluded)
