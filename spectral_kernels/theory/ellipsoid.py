"""How near to the origin, and how far from it, a point of an ellipsoid in a hyperplane can be.

The set is y + x with Σ xⱼ²/λⱼ ≤ budget and normal·x = offset. Its extremes are trust-region problems with one
quadratic and one linear constraint; their Lagrange duals are functions of one variable ν, here evaluated in closed
form. Every value of a dual is a bound (weak duality), so that a search which stops early costs width, never
containment; at the optimum the bounds are attained (the S-lemma).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 36  # golden section: t to 69 · 0.618^36 = 2e-6, the bound, flat there, to its square
_GOLDEN = (5**0.5 - 1) / 2


class _Slab(NamedTuple):
    """|normal·x − offset| ≤ error, of each anchor."""

    normal: Tensor
    offset: Tensor
    error: Tensor


def _multiplier(y: Tensor, slab: _Slab, weight: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """The best multiplier κ of the slab, and how far Σ y·normal·weight + sign·offset is from 0."""
    scale = (slab.normal.square() * weight).sum(-1)
    known = (y * slab.normal * weight).sum(-1) + sign * slab.offset
    known = known.sign() * (known.abs() - slab.error).clamp(min=0)
    return torch.where(scale > 0, -known / scale.clamp(min=1e-300), 0.0), known


def _far(nu: Tensor, y: Tensor, axes: Tensor, budget: Tensor, slab: _Slab) -> Tensor:
    """Dual of the farthest point, an upper bound for any ν above every axis and any κ."""
    weight = axes / (nu.unsqueeze(-1) - axes)
    kappa, _ = _multiplier(y, slab, weight, -1.0)
    # squared after the sum: where ν is near an axis, the parts are large and their sum is not
    moved = (y + kappa.unsqueeze(-1) * slab.normal).square() * weight
    linear = -2 * kappa * slab.offset + 2 * kappa.abs() * slab.error
    return nu * budget + y.square().sum(-1) + moved.sum(-1) + linear


def _near(nu: Tensor, y: Tensor, axes: Tensor, budget: Tensor, slab: _Slab) -> Tensor:
    """Dual of the nearest point, a lower bound for any ν ≥ 0."""
    nu_ = nu.unsqueeze(-1)
    weight = axes / (nu_ + axes)
    kappa, known = _multiplier(y, slab, weight, 1.0)
    return (y.square() * (nu_ / (nu_ + axes))).sum(-1) - kappa * known - nu * budget


def squared_range(
    y: Tensor, axes: Tensor, budget: Tensor, normal: Tensor, offset: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds of ‖y + x‖² over all x with Σ xⱼ²/axesⱼ ≤ budget and |normal·x − offset| ≤ error.

    Args:
        y, normal: (b, t) float64; a normal of zeros drops the hyperplane.
        axes: (t,) or (b, t), above 0: squared semi-axes at budget 1.
        budget, offset, error: (b,).

    Returns:
        Lower and upper bound, (b,) each.
    """
    if y.shape[-1] == 0:
        zero = torch.zeros_like(budget)
        return zero, zero
    slab = _Slab(normal, offset, error)
    largest = axes.amax(-1).expand_as(budget)
    # of a ball the optimum is at ν/λ = |y|/radius ± 1
    ball = y.square().sum(-1).sqrt() / (largest * budget).sqrt().clamp(min=1e-150)
    top = ball.clamp(min=1e-15, max=1e15).log() + 4
    return (
        _golden(lambda t: _near(largest * t.exp(), y, axes, budget, slab), top, highest=True).clamp(min=0),
        _golden(lambda t: _far(largest * (1 + t.exp()), y, axes, budget, slab), top, highest=False),
    )


def _golden(value: Callable[[Tensor], Tensor], top: Tensor, highest: bool) -> Tensor:
    """The best value of a unimodal function of t below `top`, of each anchor on its own."""
    sign = -1.0 if highest else 1.0
    low, high = torch.full_like(top, -30.0), top
    inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_inner, at_outer = sign * value(inner), sign * value(outer)
    best = torch.minimum(at_inner, at_outer)
    for _ in range(_STEPS):
        left = at_inner < at_outer
        low, high = torch.where(left, low, inner), torch.where(left, outer, high)
        fresh = torch.where(left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_fresh = sign * value(fresh)
        inner, outer = torch.where(left, fresh, outer), torch.where(left, inner, fresh)
        at_inner, at_outer = torch.where(left, at_fresh, at_outer), torch.where(left, at_inner, at_fresh)
        best = torch.minimum(best, at_fresh)
    return sign * best
