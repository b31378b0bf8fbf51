"""info_nce_grad_norms: against autograd, and where rounding would show."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import spectral_kernels as sk


def autograd_norms(query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, loss: str) -> Tensor:
    """Squared norm of each anchor's own gradient, by the definition, in float64."""
    q, k = normalize(query.double()), normalize(key.double())
    anchors, own = (torch.cat([q, k]), torch.cat([k, q])) if loss == "nt_xent" else (q, k)
    others = anchors if loss == "nt_xent" else k if queue is None else normalize(queue.double())
    u = anchors.clone().requires_grad_()
    logits = u @ others.mT / temperature
    rows = torch.arange(len(u))
    if queue is None:
        logits = logits.index_put((rows, rows), torch.tensor(-torch.inf).double())
    if loss == "nt_xent":
        logits = logits.index_put((rows, rows.roll(len(q))), torch.tensor(-torch.inf).double())
    logits = torch.cat([(u * own).sum(1, keepdim=True) / temperature, logits], 1)
    value = cross_entropy(logits, torch.zeros(len(u), dtype=torch.int64), reduction="sum")
    return torch.autograd.grad(value, u)[0].square().sum(1)


def draw(kind: str, b: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b + d)
    query, noise, queue = (torch.randn(rows, d, generator=generator) for rows in (b, b, 2 * b + 1))
    if kind == "won":  # the positive has all but won
        return query, query + 0.01 * noise, queue
    if kind == "collapsed":
        center = torch.randn(1, d, generator=generator)
        return center + 1e-3 * query, center + 1e-3 * noise, center + 1e-3 * queue
    return query * 1e4, noise * 1e-4, queue


@pytest.mark.parametrize("loss", ["info_nce", "queue", "nt_xent"])
@pytest.mark.parametrize("kind", ["random", "won", "collapsed"])
@pytest.mark.parametrize(("b", "d"), [(2, 5), (5, 3), (123, 129), (700, 64)])
def test_norms_are_those_of_autograd(kind: str, loss: str, b: int, d: int) -> None:
    query, key, queue = draw(kind, b, d)
    negatives = queue if loss == "queue" else None
    name = "info_nce" if loss == "queue" else loss
    for temperature in (0.05, 0.5):
        exact = sk.info_nce_grad_norms(
            query.double(), key.double(), queue=None if negatives is None else negatives.double(),
            temperature=temperature, loss=name, backend="reference",
        )  # fmt: skip
        if kind == "random":
            by_autograd = autograd_norms(query, key, negatives, temperature, name)
            torch.testing.assert_close(exact, by_autograd, rtol=1e-9, atol=0)
        norms = sk.info_nce_grad_norms(
            query, key, queue=negatives, temperature=temperature, loss=name, backend="cpp"
        )  # fmt: skip
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms.double(), exact, rtol=3e-5, atol=1e-30)
        wide = sk.info_nce_grad_norms(
            query.double(), key.double(), queue=None if negatives is None else negatives.double(),
            temperature=temperature, loss=name, backend="cpp",
        )  # fmt: skip
        # rows of a collapsed batch differ by 1e-3, which float64 knows to 1e-13
        torch.testing.assert_close(wide, exact, rtol=1e-10 if kind == "collapsed" else 1e-12, atol=1e-60)


def test_anchors_whose_first_negatives_are_masked() -> None:
    """The first block of others of the first anchors of NT-Xent holds self and positive only."""
    generator = torch.Generator().manual_seed(0)
    z0, z1 = torch.randn(2, 8, generator=generator), torch.randn(2, 8, generator=generator)
    norms = sk.info_nce_grad_norms(z0, z1, loss="nt_xent", backend="cpp")
    torch.testing.assert_close(norms.double(), autograd_norms(z0, z1, None, 0.1, "nt_xent"), rtol=1e-5, atol=0)


def test_same_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 700, 48, generator=generator)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sk.info_nce_grad_norms(query, key, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def by_hand(query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, loss: str) -> list[float]:
    """‖(w/τ)(m_q − v₊)‖² with forty digits, from the definition."""
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 40

    def unit(rows: Tensor) -> list[list[object]]:
        lists = [[mp.mpf(x) for x in row] for row in rows.tolist()]
        return [[x / mp.sqrt(mp.fsum(y * y for y in row)) for x in row] for row in lists]

    q, k = unit(query), unit(key)
    anchors, own = (q + k, k + q) if loss == "nt_xent" else (q, k)
    others = anchors if loss == "nt_xent" else k if queue is None else unit(queue)
    found = []
    for i, (u, positive) in enumerate(zip(anchors, own, strict=True)):
        out = set() if queue is not None else {i, (i + len(q)) % len(anchors)} if loss == "nt_xent" else {i}
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
def test_norms_are_those_of_forty_digits(backend: str, kind: str, loss: str) -> None:
    query, key, queue = (rows.double() for rows in draw(kind, 12, 5))
    negatives = queue if loss == "queue" else None
    name = "info_nce" if loss == "queue" else loss
    for temperature in (0.05, 0.2, 2.0):
        exact = torch.tensor(by_hand(query, key, negatives, temperature, name), dtype=torch.float64)
        options = {"temperature": temperature, "loss": name, "backend": backend}
        norms = sk.info_nce_grad_norms(query, key, queue=negatives, **options)
        torch.testing.assert_close(norms, exact, rtol=1e-12, atol=0)
        single = [None if rows is None else rows.float() for rows in (query, key, negatives)]
        rounded = [None if rows is None else rows.double() for rows in single]
        exact = torch.tensor(by_hand(*rounded, temperature, name), dtype=torch.float64)  # type: ignore[arg-type]
        norms = sk.info_nce_grad_norms(single[0], single[1], queue=single[2], **options)
        torch.testing.assert_close(norms.double(), exact, rtol=1e-4, atol=0)
