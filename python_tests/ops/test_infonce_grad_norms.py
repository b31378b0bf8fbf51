"""info_nce_grad_norms: against the definition, and where rounding would show."""

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk


def draw(kind: str, b: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b + d)
    query, noise, queue = (torch.randn(rows, d, generator=generator) for rows in (b, b, 2 * b + 1))
    if kind == "won":  # the positive has all but won
        return query, query + 0.01 * noise, queue
    if kind == "collapsed":
        center = torch.randn(1, d, generator=generator)
        return center + 1e-3 * query, center + 1e-3 * noise, center + 1e-3 * queue
    return query * 1e4, noise * 1e-4, queue


def norms(rows: tuple[Tensor, ...], temperature: float, loss: str, backend: str) -> Tensor:
    query, key, queue = rows
    return sk.info_nce_grad_norms(
        query, key, queue=queue if loss == "queue" else None, temperature=temperature,
        loss="nt_xent" if loss == "nt_xent" else "info_nce", backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["info_nce", "queue", "nt_xent"])
@pytest.mark.parametrize("kind", ["random", "won", "collapsed"])
# of two rows, all others in the first block of NT-Xent are masked
@pytest.mark.parametrize(("b", "d"), [(2, 5), (5, 3), (123, 129), (700, 64)])
def test_float_rows_have_the_norms_of_float64(kind: str, loss: str, b: int, d: int) -> None:
    rows = draw(kind, b, d)
    wide_rows = tuple(part.double() for part in rows)
    for temperature in (0.05, 0.5):
        exact = norms(wide_rows, temperature, loss, "reference")
        found = norms(rows, temperature, loss, "cpp")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=3e-5, atol=1e-30)
        wide = norms(wide_rows, temperature, loss, "cpp")
        # rows of a collapsed batch differ by 1e-3, which float64 knows to 1e-13
        torch.testing.assert_close(wide, exact, rtol=1e-10 if kind == "collapsed" else 1e-12, atol=1e-60)


def by_hand(query: Tensor, key: Tensor, queue: Tensor, temperature: float, loss: str) -> list[float]:
    """‖(w/τ)(m_q − v₊)‖² with forty digits, from the definition."""
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 40

    def unit(rows: Tensor) -> list[list[object]]:
        lists = [[mp.mpf(x) for x in row] for row in rows.tolist()]
        return [[x / mp.sqrt(mp.fsum(y * y for y in row)) for x in row] for row in lists]

    q, k = unit(query), unit(key)
    anchors, own = (q + k, k + q) if loss == "nt_xent" else (q, k)
    others = anchors if loss == "nt_xent" else unit(queue) if loss == "queue" else k
    found = []
    for i, (u, positive) in enumerate(zip(anchors, own, strict=True)):
        out = {"queue": set(), "info_nce": {i}, "nt_xent": {i, (i + len(q)) % len(anchors)}}[loss]
        negatives = [row for j, row in enumerate(others) if j not in out]
        weights = [mp.exp(mp.fsum(a * b for a, b in zip(u, v, strict=True)) / temperature) for v in negatives]
        mass = mp.fsum(weights)
        winner = mp.exp(mp.fsum(a * b for a, b in zip(u, positive, strict=True)) / temperature)
        mean = [mp.fsum(w * v[c] for w, v in zip(weights, negatives, strict=True)) / mass for c in range(len(u))]
        share = mass / (mass + winner) / temperature
        found.append(float(mp.fsum((share * (m - p)) ** 2 for m, p in zip(mean, positive, strict=True))))
    return found


@pytest.mark.parametrize("loss", ["info_nce", "queue", "nt_xent"])
@pytest.mark.parametrize("kind", ["random", "won"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("b, d", [(2, 5), (12, 5)])
def test_norms_are_those_of_forty_digits(b: int, d: int, backend: str, kind: str, loss: str) -> None:
    single = draw(kind, b, d)
    rounded = tuple(part.double() for part in single)
    for temperature in (0.05, 0.2, 2.0):
        exact = torch.tensor(by_hand(*rounded, temperature, loss), dtype=torch.float64)
        torch.testing.assert_close(norms(rounded, temperature, loss, backend), exact, rtol=1e-12, atol=0)
        torch.testing.assert_close(norms(single, temperature, loss, backend).double(), exact, rtol=1e-4, atol=0)
