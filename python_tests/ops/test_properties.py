"""What must hold for any input (Hypothesis draws it)."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import spectral_kernels as sk

BACKENDS = ("reference", "cpp")


@st.composite
def batches(draw: st.DrawFn, least: int = 1, most: int = 40, features: int = 24) -> torch.Tensor:
    """float64 rows: isotropic, power-law, clustered, duplicated or collapsed, at any scale."""
    n, d = draw(st.integers(least, most)), draw(st.integers(1, features))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(("isotropic", "power", "clustered", "duplicated", "collapsed", "zeros")))
    if kind == "power":
        z = z * torch.arange(1, d + 1) ** -draw(st.floats(0.5, 3.0))
    elif kind == "clustered":
        z = z[torch.randint(max(1, n // 4), (n,), generator=generator)] + 0.05 * z
    elif kind == "duplicated":
        z = z[torch.randint(max(1, n // 3), (n,), generator=generator)]
    elif kind == "collapsed":
        z = z[:1] + draw(st.sampled_from((0.0, 1e-9, 1e-3))) * z
    elif kind == "zeros":
        z = z * (torch.rand(n, 1, generator=generator) < 0.5)
    return z * 10.0 ** draw(st.integers(-4, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@given(z=batches(), center=st.booleans(), normalize=st.booleans())
def test_covariance(backend: str, z: torch.Tensor, center: bool, normalize: bool) -> None:
    c = sk.covariance(z, center=center, normalize=normalize, backend=backend)
    size = float(c.abs().max())
    assert torch.equal(c, c.mT) or float((c - c.mT).abs().max()) <= 1e-14 * size
    # identical rows leave a covariance of squared rounding
    noise = 1e-28 * (1.0 if normalize else float(z.square().max()))
    assert float(torch.linalg.eigvalsh(c).min()) >= -1e-12 * size - noise
    shuffled = sk.covariance(z[torch.randperm(len(z))], center=center, normalize=normalize, backend=backend)
    # the mean's rounding is that of the rows, not that of their spread
    floor = 1e-14 * (1.0 if normalize else float(z.square().max()))
    torch.testing.assert_close(shuffled, c, rtol=1e-9, atol=1e-12 * size + floor)


@pytest.mark.parametrize("backend", BACKENDS)
@given(z=batches(), center=st.booleans(), normalize=st.booleans())
def test_ranks_are_ordered(backend: str, z: torch.Tensor, center: bool, normalize: bool) -> None:
    ranks = [
        float(sk.effective_rank(z, order=order, center=center, normalize=normalize, backend=backend))
        for order in (math.inf, 2, 1)
    ]
    most = min(len(z) - center, z.shape[1])
    if ranks[0] == 0:
        assert ranks == [0, 0, 0]
    else:
        assert 1 - 1e-9 <= ranks[0] <= ranks[1] * (1 + 1e-6) and ranks[1] <= ranks[2] * (1 + 1e-6)
        assert ranks[2] <= most * (1 + 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@given(z=batches(), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_rank_ignores_scale_and_rotation(backend: str, z: torch.Tensor, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = z.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=z.dtype, generator=generator)).Q
    for order in (1, 2):
        rank = sk.effective_rank(z, order=order, normalize=False, backend=backend)
        turned = sk.effective_rank(scale * z @ rotation, order=order, normalize=False, backend=backend)
        torch.testing.assert_close(turned, rank, rtol=1e-7, atol=0)


@pytest.mark.parametrize("method", ("cholesky", "zca", "newton_schulz"))
@pytest.mark.parametrize("backend", BACKENDS)
@given(z=batches(least=2), center=st.booleans(), shrinkage=st.sampled_from((1e-4, 1e-2)))
def test_whitened_covariance(backend: str, method: str, z: torch.Tensor, center: bool, shrinkage: float) -> None:
    """W C_ε Wᵀ = I, so cov(y) = (I − ε t W Wᵀ)/(1 − ε): the identity but for what shrinkage adds."""
    y = sk.whiten(z, method=method, center=center, shrinkage=shrinkage, backend=backend)
    assert y.isfinite().all()
    c = sk.covariance(y, center=center, backend="reference")
    eigenvalues = torch.linalg.eigvalsh(c)
    assert float(eigenvalues.min()) >= -1e-8 and float(eigenvalues.max()) <= 1 / (1 - shrinkage) + 1e-6
    raw = sk.covariance(z, center=center, backend="reference")
    spread = torch.linalg.eigvalsh(raw)
    if center and float(spread.sum()) < 1e-28 * float(z.square().sum(-1).mean()):
        spread = torch.zeros_like(spread)  # identical rows: what is left is rounding
    expected = (spread / ((1 - shrinkage) * spread + shrinkage * spread.mean())).nan_to_num(0.0)
    torch.testing.assert_close(eigenvalues, expected.sort().values, rtol=1e-5, atol=1e-5)


@given(z=batches(least=3), seed=st.integers(0, 99), candidates=st.sampled_from((None, 1, 7)), data=st.data())
def test_greedy(z: torch.Tensor, seed: int, candidates: int | None, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(z)))
    picks = [
        sk.greedy_select(
            z.to(dtype), k, candidates=candidates, generator=torch.Generator().manual_seed(seed), backend=b
        )
        for dtype in (torch.float64, torch.float32)
        for b in BACKENDS
    ]
    for reference, cpp in (picks[:2], picks[2:]):
        assert torch.equal(reference.indices, cpp.indices)
        assert cpp.indices.unique().numel() == k
        seen = torch.nn.functional.normalize(z[cpp.indices]).norm(dim=1) > 0.5
        rank = sk.effective_rank(z[cpp.indices], order=2)
        assert float(cpp.effective_rank[-1]) == pytest.approx(float(rank), rel=1e-4)
        # unseen rows only after the last seen one
        assert not (seen[1:] & ~seen[:-1]).any() or not bool(seen[0])


@pytest.mark.parametrize("backend", BACKENDS)
@given(z=batches(least=2), temperature=st.sampled_from((0.01, 0.1, 1.0, 10.0)))
def test_losses(backend: str, z: torch.Tensor, temperature: float) -> None:
    key, queue = z.roll(1, 0), z.roll(2, 0)[1:]
    u, v, w = (torch.nn.functional.normalize(rows) for rows in (z, key, queue))
    n, cross_entropy = len(z), torch.nn.functional.cross_entropy
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    in_batch = cross_entropy(u @ v.mT / temperature, torch.arange(n), reduction="none")
    torch.testing.assert_close(sk.info_nce(z, key, **options), in_batch, rtol=1e-9, atol=1e-12)
    beside_a_queue = torch.cat([(u * v).sum(1, keepdim=True), u @ w.mT], 1) / temperature
    expected = cross_entropy(beside_a_queue, torch.zeros(n, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(sk.info_nce(z, key, queue=queue, **options), expected, rtol=1e-9, atol=1e-12)
    # a row is no negative of its own
    views = torch.cat([u, v])
    of_all = (views @ views.mT / temperature).fill_diagonal_(-math.inf)
    expected = cross_entropy(of_all, torch.arange(2 * n).roll(n), reduction="none")
    torch.testing.assert_close(sk.nt_xent(z, key, **options), expected, rtol=1e-9, atol=1e-12)
