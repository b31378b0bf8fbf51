"""Greedy selection from rows of any length that is finite: the picks and figures of float64, or one error that names a row."""

from typing import Any

import pytest
import torch
from emulation_helpers import chip_select
from registry import BACKENDS, generator
from test_greedy_emulation import check, seeds
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.errors import CLEAN, STRIDE

# of the rows of a pool; None: all of these in one, and rows as they are
SCALES = (1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37, None)
WIDE = (1e-300, 1e-150, 1e150, 1e300, None)


def scaled(scale: float | None, dtype: torch.dtype, n: int = 70) -> Tensor:
    """n rows of which some are copies and some zero."""
    pool = torch.randn(n, 6, dtype=torch.float64)
    pool[n // 2 : n // 2 + 9] = pool[:9]
    pool[-3:] = 0
    if scale is None:
        scales = torch.tensor([1.0, *filter(None, SCALES if dtype == torch.float32 else WIDE)], dtype=torch.float64)
        return (pool * scales[torch.arange(n) % len(scales)][:, None]).to(dtype)
    return (pool * scale).to(dtype)


def rank(rows: Tensor, normalize: bool) -> float:
    """In float64, each row or else all by the largest element, so that nothing overflows."""
    x = rows.double()
    largest = x.abs().amax(-1, keepdim=True) if normalize else x.abs().amax()
    x = torch.where(largest > 0, x / torch.where(largest > 0, largest, 1.0), 0.0)
    if normalize:
        x = torch.nn.functional.normalize(x)
    return float(x.square().sum() ** 2 / (x @ x.mT).square().sum().clamp_min(1e-300))


CASES = [(scale, torch.float32) for scale in SCALES] + [(scale, torch.float64) for scale in WIDE]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("scale, dtype", CASES)
def test_picks_and_ranks_at_any_scale(backend: str, normalize: bool, scale: float | None, dtype: torch.dtype) -> None:
    pool = scaled(scale, dtype)
    for candidates, k in ((None, 20), (4, 12)) if backend == "triton" else ((None, 70), (4, 30), (40, 20)):
        expected, found = (
            sk.greedy_select(pool, k, candidates=candidates, normalize=normalize, generator=generator(k), backend=each)
            for each in ("reference", backend)
        )
        assert torch.equal(found.indices, expected.indices)
        for picks in (1, 2, 5, k):
            exact = rank(pool[found.indices[:picks]], normalize)
            assert float(found.effective_rank[picks - 1]) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("candidates", (None, 4, 40))
@pytest.mark.parametrize("scale", SCALES)
def test_the_chip_at_any_scale(scale: float | None, candidates: int | None, normalize: bool) -> None:
    pool = scaled(scale, torch.float32)[None]
    draws = None if candidates is None else torch.randint(70, (1, 20, candidates))
    check(pool, torch.tensor([[3, 5]]), draws, None, 20, "effective_rank", normalize)
    if normalize:
        check(pool, torch.tensor([[3, 5]]), draws, None, 20, "logdet")
        wide = scaled(None if scale is None else 1e280 if scale > 1 else 1e-280, torch.float64)[None]
        check(wide, torch.tensor([[3, 5]]), draws, None, 20)


# --- the log-determinant, whose ridge has a scale ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", (None, 6))
@pytest.mark.parametrize("scale", (1e-38, 1e-20, 1e-3, 1e3, 1e20, 1e37))
def test_logdet_of_independent_rows_at_any_scale(backend: str, candidates: int | None, scale: float) -> None:
    pool = torch.randn(40, 24) * scale
    chosen = sk.greedy_select(
        pool, 8, candidates=candidates, objective="logdet", normalize=False, generator=generator(), backend=backend
    )
    # of the smaller side
    x = torch.linalg.qr(pool[chosen.indices].double().mT / scale).R.diagonal().abs().log() + torch.tensor(scale).log()
    gram = pool[chosen.indices].double() @ pool[chosen.indices].double().mT / 1e-3
    exact = torch.linalg.eigvalsh(gram).clamp_min(0).log1p().sum() if scale < 1 else 2 * x.sum() + 8 * 6.907755279
    assert float(chosen.objective[-1]) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", (None, 6))
@pytest.mark.parametrize("scale, dtype", ((1e20, torch.float32), (1e9, torch.float64), (1e160, torch.float64)))
def test_rows_that_logdet_cannot_resolve_are_named(
    backend: str, candidates: int | None, scale: float, dtype: torch.dtype
) -> None:
    """More rows than features, or their copies: what is left of them is rounding."""
    options: dict[str, Any] = {"candidates": candidates, "objective": "logdet", "backend": backend}
    good = torch.randn(30, 3, dtype=dtype)
    pool = torch.stack([good, good * scale])
    for rows in (pool[1], pool):
        with pytest.raises(ValueError, match=r"pool (batch 1 )?row \d+ is too long for the log-determinant"):
            sk.greedy_select(rows, 8, normalize=False, generator=generator(), **options)
    chosen = sk.greedy_select(pool, 8, generator=generator(), **options)
    alone = sk.greedy_select(good, 3, objective="logdet", start=int(chosen.indices[1, 0]))
    assert chosen.objective.isfinite().all()
    assert float(chosen.objective[1, 0]) == pytest.approx(float(alone.objective[0]), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", (None, 64))
@pytest.mark.parametrize(
    "objective, k, rest, length", (("effective_rank", 10, 1e-200, 1e300), ("logdet", 4, 1.0, 1e160))
)
def test_a_row_that_is_masked_out_sets_no_scale_and_is_not_too_long(
    backend: str, candidates: int | None, objective: str, k: int, rest: float, length: float
) -> None:
    pool, valid = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) != 7
    options: dict[str, Any] = {"candidates": candidates, "start": 2, "valid": valid, "backend": backend}
    expected, found = (
        sk.greedy_select(rows, k, objective=objective, normalize=False, generator=generator(), **options)
        for rows in (pool, torch.where(valid[:, None], rest * pool, length))
    )
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.objective, expected.objective)


@pytest.mark.parametrize("scale, long", ((1.0, False), (1e9, True), (1e160, True)))
def test_the_chip_notes_rows_too_long_for_logdet(scale: float, long: bool) -> None:
    pool = scale * torch.eye(2, dtype=torch.float64)[torch.tensor([0, 0, 0, 1, 1])][None]
    words = torch.full((4 * STRIDE,), CLEAN)
    start = torch.tensor([[3]])
    chip_select(pool, start, None, None, seeds(pool), 4, "logdet", False, multiprocessors=2, words=words)
    rows, _, noted, others = words[::STRIDE].tolist()
    assert rows == others == CLEAN
    assert 0 <= noted <= 4 if long else noted == CLEAN
