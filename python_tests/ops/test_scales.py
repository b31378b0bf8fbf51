"""Rows of any finite length, and nearly equal ones: the float64 answer to 1e-4, or one clear error."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry import DEVICE
from torch import Tensor

import spectral_kernels as sk

BACKENDS = ("reference", "cpp") if DEVICE.type == "cpu" else ("reference",)
SCALES = (1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30, 1e38)
# serial, parallel over rows, and the smaller side of few rows
SHAPES = ((40, 6), (1500, 64), (12, 40))
TOLERANCE = 1e-4


def spread_rows(n: int, d: int, scale: float, kind: str) -> Tensor:
    z = torch.randn(n, d, dtype=torch.float64) * torch.arange(1, d + 1) ** -0.5
    if kind == "mixed":
        z *= torch.logspace(-6, 0, n, dtype=torch.float64)[:, None]
    elif kind == "nearly equal":
        z = torch.randn(1, d, dtype=torch.float64) + 2e-6 * z
    # float32's largest number is 3.4e38
    return (z / z.abs().max() * scale).float()


def assert_same(got: Tensor, expected: Tensor) -> None:
    worst = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert worst < TOLERANCE, f"{got.flatten()[:3]} for {expected.flatten()[:3]}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("plain", "mixed", "nearly equal"))
@pytest.mark.parametrize("scale", SCALES)
def test_what_does_not_depend_on_the_scale(scale: float, kind: str, backend: str) -> None:
    for n, d in SHAPES:
        z = spread_rows(n, d, scale, kind)
        exact = z.double() / scale

        def same(
            op: Callable[..., Tensor], *rest: Tensor, of: tuple[Tensor, ...] = (z, exact), **options: Any
        ) -> Tensor:
            found, expected = (op(rows, *rest, **options) for rows in of)
            assert_same(found, expected)
            return found

        with sk.use_backend(backend):
            for center in (False, True):
                for normalize in (False, True):
                    options = {"center": center, "normalize": normalize}
                    ranks = {order: same(sk.effective_rank, order=order, **options) for order in (1, 2, 3, math.inf)}
                    assert ranks[math.inf] <= ranks[2] * (1 + 1e-5) and ranks[2] <= ranks[1] * (1 + 1e-5)
                    for order in (1, 2):
                        same(sk.batch_effective_rank, torch.arange(n)[None], order=order, **options)
                same(sk.covariance, center=center, normalize=True)
                same(sk.spectrum, center=center)
                for method in ("cholesky", "zca"):
                    same(sk.whiten, center=center, method=method)
            same(sk.rankme)
            if kind != "nearly equal":
                for loss in (sk.nt_xent, sk.info_nce, sk.info_nce_grad_norms):
                    same(lambda rows, loss=loss: loss(*rows.chunk(2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("plain", "nearly equal"))
@pytest.mark.parametrize("scale", (1e-30, 1e-15, 1.0, 1e15))
def test_gradients(scale: float, kind: str, backend: str) -> None:
    for n, d in SHAPES:
        single = spread_rows(n, d, scale, kind).requires_grad_()
        exact = (single.detach().double() / scale).requires_grad_()
        for center in (False, True):
            # uncentred, the smaller eigenvalues of nearly equal rows are float64's own rounding
            for order in (1, 2) if center or kind == "plain" else (2,):
                found = []
                for z in (single, exact):
                    with sk.use_backend(backend):
                        rank = sk.effective_rank(z, order=order, center=center, normalize=order == 1)
                    (gradient,) = torch.autograd.grad(rank, z)
                    found.append(gradient.double() * (scale if z is single else 1))
                assert_same(*found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", (1e-38, 1e-25, 1e25, 1e38))
def test_what_float32_cannot_hold_is_refused(scale: float, backend: str) -> None:
    for n, d in ((40, 6), (1500, 64), (300, 300)):
        z = spread_rows(n, d, scale, "plain")
        with sk.use_backend(backend):
            for call in (lambda z: sk.covariance(z), lambda z: sk.spectrum(z, normalize=False)):
                with pytest.raises(
                    ValueError, match=r"z has variances beyond float32; scale its rows, or give float64"
                ):
                    call(z)
                assert call(z.double()).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_have_no_spread_at_any_scale(backend: str) -> None:
    for scale in (1e-30, 1.0, 1e30):
        for n, d in SHAPES:
            z = (torch.randn(1, d) * scale).expand(n, d)
            with sk.use_backend(backend):
                for order in (1, 2, math.inf):
                    assert sk.effective_rank(z, order=order, center=True, normalize=False) == 0
                    assert sk.effective_rank(z, order=order, center=True) == 0
                assert not sk.whiten(z).any() and not sk.whiten(z, shrinkage=0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_stay_zero_and_tiny_ones_do_not(backend: str) -> None:
    z = torch.randn(30, 8)
    z[3:6] = 0
    z[7:9] *= 1e-30
    unit = torch.nn.functional.normalize(z.double(), eps=1e-300)
    with sk.use_backend(backend):
        assert_same(sk.covariance(z, normalize=True, center=False), unit.mT @ unit / 30)
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sk.effective_rank(leaf, order=2), leaf)
    assert not gradient[3:6].any() and gradient.isfinite().all()


@pytest.mark.parametrize("n", (64, 5))
def test_whitening_keeps_running_statistics_of_any_scale(n: int) -> None:
    for scale in (1e-12, 1e12):
        z = spread_rows(n, 8, scale, "plain")
        layer = sk.Whitening(8, momentum=1.0)
        assert_same(layer(z), sk.whiten(z.double() / scale))
        assert_same(layer.running_mean, z.double().mean(0))
        assert_same(layer.running_covariance, torch.cov(z.double().mT, correction=0))


def _checked(call: Callable[[Tensor], Tensor], z: Tensor) -> None:
    call(z)
    sk.check()


def test_triton_refuses_rows_whose_squares_leave_float32() -> None:
    """Where a kernel has read the row; no GPU waits for it (errors.py)."""
    z = torch.randn(40, 8, device=DEVICE)
    for scale in (1e-18, 1e20, 1e30):
        bad = z.clone()
        bad[5] *= scale
        with sk.use_backend("triton"):
            for call in (
                lambda z: sk.effective_rank(z, order=2),
                lambda z: sk.covariance(z, normalize=True),
                lambda z: sk.nt_xent(z[:20], z[20:]),
                lambda z: sk.info_nce(z, z.flip(0)),
            ):
                with pytest.raises(ValueError, match="row 5 holds NaN or Inf, or its squares leave float32"):
                    _checked(call, bad)
