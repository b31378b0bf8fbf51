"""Bounds of the squared InfoNCE gradient norm that no anchor can leave (docs/theory.md §3, with proofs).

‖g‖² = (w/τ)²·‖m_q − v₊‖². All that is not known of m_q, the mean of the negatives under the softmax, is a point of an
ellipsoid whose axes are the eigenvalues of the keys' covariance and whose size is χ², the spread of the softmax's
weights; what the logits say of m_q along the anchor is a hyperplane through it. The band is the nearest and the
farthest point from the positive (`ellipsoid.py`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch.backends import float64_needed
from spectral_kernels.ops.infonce.arguments import check_anchors
from spectral_kernels.theory.a_priori import log_moments
from spectral_kernels.theory.ellipsoid import squared_range
from spectral_kernels.theory.keys import Keys, gather_keys

KINDS = ("logits", "a_priori")
_EPS = torch.finfo(torch.float64).eps


class GradientBand(NamedTuple):
    """Bounds of ‖∂Lᵢ/∂uᵢ‖² for each anchor, and why they are where they are. Everything in float64.

    Attributes:
        lower, upper: (A,) bounds; A = B, or 2B for NT-Xent with the anchors of query first.
        alignment: (A,) aᵢ = uᵢ·vᵢ.
        negative_mass: (A,) softmax mass w on the negatives; of kind a_priori its upper bound.
        chi2: (A,) χ² = n‖q‖² − 1 of the softmax among the negatives: 0 flat, n − 1 one-hot; of kind a_priori its upper
            bound.
        negative_similarity: (A,) u·m_q, the mean similarity of the negatives under their softmax; of kind a_priori
            u·μ, under equal weights.
        tail_eigenvalue: scalar λ_{r+1} of the keys' covariance, the widest direction that the band does not know.
        spread: scalar tr C. effective_rank: scalar (tr C)²/tr C² of the centred keys.
        negatives: n. temperature: τ.
    """

    lower: Tensor
    upper: Tensor
    alignment: Tensor
    negative_mass: Tensor
    chi2: Tensor
    negative_similarity: Tensor
    tail_eigenvalue: Tensor
    spread: Tensor
    effective_rank: Tensor
    negatives: int
    temperature: float

    @property
    def batch_lower(self) -> Tensor:
        """Scalar: lower bound of the mean squared norm over the anchors."""
        return self.lower.mean()

    @property
    def batch_upper(self) -> Tensor:
        """Scalar: upper bound of the mean squared norm over the anchors."""
        return self.upper.mean()


def chi_squared(weights: Tensor, negatives: Tensor, n: int) -> Tensor:
    """χ² = n·Σ(q_k − 1/n)² of the weights (a, N) of the negatives; the form that does not cancel."""
    return n * ((weights - 1 / n).square() * negatives).sum(-1)


def semi_axes(eigenvalues: Tensor, n: int, total: int) -> Tensor:
    """Squared semi-axes at χ² = 1: leaving keys out widens the covariance by no more than N/n, Cᵢ ⪯ (N/n)·C."""
    return eigenvalues * (total / n)


def budget_left(chi2: Tensor, known: Tensor, axes: Tensor, rounding: float) -> Tensor:
    """What remains of χ² for the unknown directions after the known part x (a, r) of m_q − μ has used Σ xⱼ²/axesⱼ.

    The rounding of either stays in it, because the band takes its square root.
    """
    used = ((known.abs() - rounding).clamp(min=0).square() / axes).sum(-1)
    return ((chi2.sqrt() + rounding * (1 + chi2).sqrt()).square() - used).clamp(min=rounding**2)


def _unknown_range(mean_left: Tensor, own_left: Tensor, **known: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of ‖m_q − v₊‖² in the unknown directions: those of `squared_range`, given what is `known`, and of two balls.

    mean_left, own_left: the most that ‖m_q‖ and what ‖v₊‖ is there.
    """
    low, high = squared_range(**known)
    low = torch.maximum(low, (own_left - mean_left).clamp(min=0).square())
    return low, torch.minimum(high, (own_left + mean_left).square())


def _rounding(d: int, temperature: float) -> float:
    """Relative error of a softmax weight, and absolute error of a mean of unit rows, in float64."""
    return 16 * _EPS * (d + 2 / temperature)


def _finish(low: Tensor, high: Tensor, rate_low: Tensor, rate_high: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Bounds of ‖m_q − v₊‖² to bounds of ‖g‖² at w/τ = rate, wider by the rounding of both sides."""
    low = (low.sqrt() - 4 * rounding).clamp(min=0) * rate_low * (1 - rounding)
    high = (high.sqrt() + 4 * rounding).clamp(max=2) * rate_high * (1 + rounding)
    return low.square(), high.square()


def _from_logits(keys: Keys, part: slice, rank: int, temperature: float) -> tuple[Tensor, ...]:
    """The first six fields of a `GradientBand`, for some of its anchors."""
    s = keys.similarities(part)
    u, own, n = keys.anchors[part], keys.own[part], keys.negatives
    rounding = _rounding(u.shape[1], temperature)
    negatives = s > -torch.inf
    alignment = (u * own).sum(-1)
    weights = torch.softmax(s / temperature, -1)
    margin = torch.logsumexp(s / temperature, -1) - alignment / temperature
    mass = torch.sigmoid(margin)
    chi2 = chi_squared(weights, negatives, n)
    mean, _ = keys.leave_out(part)
    along = (weights * torch.where(negatives, s, 0.0)).sum(-1)

    # the first `rank` coordinates are known
    known = weights @ keys.rows[:, :rank]
    axes = semi_axes(keys.eigenvalues, n, len(keys.rows))
    budget = budget_left(chi2, known - mean[:, :rank], axes[:rank], rounding)
    base = (known - own[:, :rank]).square().sum(-1)
    # and of the others what the logits say: u·m_q
    rest = slice(rank, None)
    length = u[:, rest].norm(dim=-1).clamp(min=1e-3)
    normal = u[:, rest] / length.unsqueeze(-1)
    offset = (along - (u[:, :rank] * known).sum(-1)) / length - (normal * mean[:, rest]).sum(-1)
    low, high = _unknown_range(
        y=mean[:, rest] - own[:, rest], axes=axes[rest], budget=budget, normal=normal, offset=offset,
        error=rounding / length, mean_left=(1 - known.square().sum(-1)).clamp(min=0).sqrt(),
        own_left=own[:, rest].norm(dim=-1),
    )  # fmt: skip
    lower, upper = _finish(base + low, base + high, mass / temperature, mass / temperature, rounding)
    return lower, upper, alignment, mass, chi2, along


def _a_priori(keys: Keys, part: slice, temperature: float, hi: float) -> tuple[Tensor, ...]:
    """The same from means and variances."""
    u, own, n = keys.anchors[part], keys.own[part], keys.negatives
    rounding = _rounding(u.shape[1], temperature)
    alignment = (u * own).sum(-1)
    mean, variance = keys.leave_out(part)
    similarity = (u * mean).sum(-1)
    low1, high1 = log_moments(similarity, variance, -1.0, hi, 1 / temperature)
    _, high2 = log_moments(similarity, variance, -1.0, hi, 2 / temperature)
    chi2 = torch.expm1((high2 - 2 * low1 + 4 * rounding).clamp(min=0, max=700)).clamp(max=n - 1)
    log_n = torch.tensor(float(n), dtype=torch.float64, device=u.device).log()
    w_low, w_high = (torch.sigmoid(log_n + bound - alignment / temperature) for bound in (low1, high1))
    nothing = torch.zeros_like(chi2)
    axes = semi_axes(keys.eigenvalues, n, len(keys.rows))
    low, high = _unknown_range(
        y=mean - own, axes=axes, budget=budget_left(chi2, mean[:, :0], axes[:0], rounding),
        normal=torch.zeros_like(mean), offset=nothing, error=nothing, mean_left=nothing + 1, own_left=own.norm(dim=-1),
    )  # fmt: skip
    lower, upper = _finish(low, high, w_low / temperature, w_high / temperature, 2 * rounding)
    return lower, upper, alignment, w_high, chi2, similarity


def gradient_band(
    query: Tensor,
    key: Tensor,
    *,
    queue: Tensor | None = None,
    temperature: float = 0.1,
    rank: int = 0,
    kind: str = "logits",
    loss: str = "info_nce",
    hi: float | None = None,
) -> GradientBand:
    """Lower and upper bound of each anchor's squared gradient norm, and the factors they are made of.

    Holds for every anchor of every batch, up to the rounding of float64, in which everything is computed. The gradient
    is that of `info_nce_grad_norms`: of an anchor's own loss, with respect to its normalised embedding. Not
    differentiable.

    Args:
        query, key: (B, d), row i of key is the positive of row i of query; the two views for `loss="nt_xent"`.
            float64, float32, bfloat16 or float16; normalised inside.
        queue: (K, d), the negatives of every anchor (MoCo); None: the other keys. Not with `"nt_xent"`.
        temperature: τ > 0.
        rank: of kind logits, 0 to d: along how many of the widest directions of the keys m_q is computed. More is
            narrower; d is the norm itself. Costs rank/d of what the logits cost.
        kind: `"logits"` computes the softmax of each anchor; `"a_priori"` only means and variances, O(d²) an anchor, to
            judge a batch before it is run. It is wide where τ is small.
        loss: `"info_nce"`, or `"nt_xent"` with its 2B anchors, those of query first.
        hi: of kind a_priori, a number that no similarity of an anchor to a negative exceeds, at most 1 (None). The band
            holds if that is true.

    Returns:
        `GradientBand`.

    Raises:
        ValueError: what `info_nce_grad_norms` refuses; rank not in [0, d]; an unknown kind; rank or hi with the other
            kind; hi not in [-1, 1]; a row that holds NaN or Inf.
    """
    query, key, queue, temperature = check_anchors(query, key, queue, temperature, loss)
    checks.one_of(kind, "kind", KINDS)
    rank = checks.integer(rank, "rank", 0, query.shape[1])
    if kind == "a_priori" and rank:
        raise ValueError(f"rank goes with kind='logits', got rank = {rank} with kind='a_priori'")
    if hi is not None:
        if kind != "a_priori":
            raise ValueError(f"hi goes with kind='a_priori', got hi = {hi} with kind={kind!r}")
        hi = checks.number(hi, "hi", "between -1 and 1", lambda x: -1 <= x <= 1)
    for rows, name in ((query, "query"), (key, "key"), (queue, "queue")):
        if rows is not None:
            checks.finite_rows(rows, name)
    with torch.no_grad(), float64_needed("gradient_band", query.device):
        keys = gather_keys(query, key, queue, loss)
        if kind == "logits":
            parts = [_from_logits(keys, part, rank, temperature) for part in keys.chunks()]
        else:
            parts = [_a_priori(keys, part, temperature, 1.0 if hi is None else hi) for part in keys.chunks()]
        values = keys.eigenvalues
        lower, upper, alignment, mass, chi2, similarity = map(torch.cat, zip(*parts, strict=True))
        return GradientBand(
            lower, upper, alignment, mass, chi2, similarity,
            tail_eigenvalue=values[rank] if rank < len(values) else values.new_zeros(()),
            spread=values.sum(),
            effective_rank=values.sum().square() / values.square().sum(),
            negatives=keys.negatives,
            temperature=temperature,
        )  # fmt: skip
