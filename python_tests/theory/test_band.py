"""The gradient band: nothing is ever outside, and the suite notices when a factor of the formula is wrong."""

import pytest
import torch
from batches import FAMILIES, LOSSES, Batch, batch, batch_of_four, queue_of_three
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_kernels as sk
from spectral_kernels.theory import band as band_module
from spectral_kernels.theory.band import budget_left, gradient_band

RANKS = (0.0, 0.1, 0.5, 1.0)  # of d


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, float]:
    large = draw(st.integers(0, 39)) == 0
    made = batch(
        draw(st.sampled_from(FAMILIES)),
        draw(st.sampled_from(LOSSES)),
        draw(st.integers(2, 4096 if large else 96)),
        draw(st.integers(2, 512 if large else 48)),
        10 ** draw(st.floats(-2, 1)),
        draw(st.floats(0, 1)),
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from((torch.float64, torch.float32))),
    )
    return made, draw(st.sampled_from(RANKS))


def rank_of(made: Batch, share: float) -> int:
    return round(share * made.query.shape[1])


@settings(max_examples=max(340, settings().max_examples * 2))
@given(batches())
def test_nothing_is_outside(drawn: tuple[Batch, float]) -> None:
    made, share = drawn
    assert made.outside(rank=rank_of(made, share)) == 0
    assert made.outside(kind="a_priori") == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_can_be_pushed_outside(loss: str) -> None:
    """Rows moved wherever a norm comes nearer to its bound; the bounds move with them."""
    made = batch("isotropic", loss, 6, 3, 0.1, 0.5, 0)
    generator = torch.Generator().manual_seed(0)
    nearest = 0.0
    for step in range(40):
        parts = [made.query, made.key, *([] if made.queue is None else [made.queue])]
        moved = [part + 0.5 * 0.95**step * torch.randn(part.shape, generator=generator).double() for part in parts]
        other = Batch(moved[0], moved[1], None if made.queue is None else moved[2], made.loss, made.temperature)
        assert other.outside() == 0 and other.outside(kind="a_priori") == 0
        band, norms = other.band(rank=1), other.norms()
        now = float(torch.maximum(norms / band.upper, band.lower / norms.clamp(min=1e-30)).max())
        assert now < 1 + 1e-8
        if now > nearest:
            made, nearest = other, now


def attained() -> tuple[list[float], list[float], list[float]]:
    """norm/upper and lower/norm in queues of three, norm/upper in batches of four, largest first."""
    ratios: tuple[list[float], list[float], list[float]] = ([], [], [])
    for seed in range(16):
        made = queue_of_three(seed)
        band, norms = made.band(), made.norms()
        ratios[0].append(float(norms[0] / band.upper[0]))
        ratios[1].append(float(band.lower[0] / norms[0]))
        made = batch_of_four(seed)
        ratios[2].append(float(made.norms()[0] / made.band(rank=1).upper[0]))
    return tuple(sorted(values, reverse=True) for values in ratios)  # type: ignore[return-value]


def is_attained(ratios: list[float]) -> bool:
    """Three at the bound, up to the square root of the rounding of λ; none beyond."""
    return ratios[2] > 1 - 1e-5 and ratios[0] < 1 + 1e-8


def test_bounds_are_attained() -> None:
    for ratios in attained():
        assert is_attained(ratios), ratios


MUTANTS = {
    "half the radius": ("budget_left", lambda original: lambda *given: original(*given) / 4),
    "radius times 0.97": ("budget_left", lambda original: lambda *given: original(*given) * 0.97**2),
    "radius times 1.03": ("budget_left", lambda original: lambda *given: original(*given) * 1.03**2),
    "N/n left out": ("semi_axes", lambda original: lambda values, n, total: values),
    "N/n twice": ("semi_axes", lambda original: lambda values, n, total: values * (total / n) ** 2),
    "chi2 one too small": ("chi_squared", lambda original: lambda *given: (original(*given) - 1).clamp(min=0)),
    "chi2 one too large": ("chi_squared", lambda original: lambda *given: original(*given) + 1),
    "chi2 of the plain weights": ("chi_squared", lambda original: lambda q, mask, n: q.square().sum(-1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_formula_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, mutate = MUTANTS[name]
    monkeypatch.setattr(band_module, function, mutate(getattr(band_module, function)))
    assert not all(is_attained(ratios) for ratios in attained())


def two_keys() -> float:
    """Widest band of a queue of two at rank 1: the one direction in which they differ is known, and uses all of χ²."""
    bands = [batch("isotropic", "queue", 2, 6, 0.5, 0.3, seed).band(rank=1) for seed in range(8)]
    return max(float((band.upper / band.lower).max()) for band in bands)


def test_known_parts_use_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert two_keys() < 1 + 1e-9
    # and no more than they use: a band that subtracts them twice loses anchors
    monkeypatch.setattr(band_module, "budget_left", lambda chi2, known, *more: budget_left(chi2, known * 2**0.5, *more))
    assert not all(_inside(batch("isotropic", "queue", 6, 8, 0.05, 0.3, seed)) for seed in range(20))


def _inside(made: Batch) -> bool:
    band, norms = made.band(rank=2), made.norms()
    return bool(((band.lower <= norms * (1 + 1e-8)) & (norms <= band.upper * (1 + 1e-8))).all())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_full_rank_is_the_norm(loss: str, dtype: torch.dtype) -> None:
    made = batch("power law", loss, 33, 12, 0.2, 0.7, 3, dtype)
    band, norms = made.band(rank=12), made.norms()
    assert band.lower.dtype == torch.float64
    torch.testing.assert_close(band.lower, norms, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(band.upper, norms, rtol=1e-9, atol=1e-12)


def test_more_rank_is_narrower() -> None:
    made = batch("power law", "info_nce", 128, 32, 0.1, 0.8, 0)
    widths = [float((made.band(rank=rank).upper / made.band(rank=rank).lower).median()) for rank in (0, 4, 16, 32)]
    assert widths == sorted(widths, reverse=True) and widths[-1] < 1 + 1e-6


def test_factors_are_what_they_are_called() -> None:
    made = batch("isotropic", "info_nce", 20, 6, 0.5, 0.8, 1)
    band = made.band(rank=2)
    u, v = (torch.nn.functional.normalize(rows, dim=1) for rows in (made.query, made.key))
    s = u @ v.mT
    eye = torch.eye(20, dtype=torch.bool)
    p = torch.softmax(s / 0.5, 1)
    q = torch.softmax((s / 0.5).masked_fill(eye, -torch.inf), 1)
    torch.testing.assert_close(band.alignment, s.diagonal())
    torch.testing.assert_close(band.negative_mass, 1 - p.diagonal())
    torch.testing.assert_close(band.chi2, 19 * q.square().sum(1) - 1)
    torch.testing.assert_close(band.negative_similarity, (q * s).sum(1))
    spectrum = sk.spectrum(v, center=True)
    torch.testing.assert_close(band.tail_eigenvalue, spectrum[2])
    torch.testing.assert_close(band.spread, spectrum.sum())
    torch.testing.assert_close(band.effective_rank, sk.effective_rank(v, order=2, center=True))
    assert band.negatives == 19 and band.temperature == 0.5
    assert band.batch_lower <= made.norms().mean() <= band.batch_upper


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for loss in LOSSES:
        made = batch("clustered", loss, 40, 7, 0.3, 0.6, 2)
        for options in ({"rank": 3}, {"kind": "a_priori"}):
            whole = made.band(**options)
            with monkeypatch.context() as patch:
                patch.setattr("spectral_kernels.theory.keys.CHUNK", 100)
                torch.testing.assert_close(made.band(**options)[:6], whole[:6], rtol=1e-12, atol=1e-13)


def test_hi_narrows_the_a_priori_band() -> None:
    made = batch("isotropic", "info_nce", 64, 32, 0.2, 0.8, 5)
    u, v = (torch.nn.functional.normalize(rows, dim=1) for rows in (made.query, made.key))
    hi = float((u @ v.mT).fill_diagonal_(-1).max())
    assert made.outside(kind="a_priori", hi=hi) == 0
    assert made.band(kind="a_priori", hi=hi).batch_upper < made.band(kind="a_priori").batch_upper


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, "rank must be between 0 and 4, got 5"),
        ({"rank": -1}, "rank must be between 0 and 4, got -1"),
        ({"kind": "exact"}, "kind must be one of .*'exact'"),
        ({"kind": "a_priori", "rank": 1}, "rank goes with kind='logits'"),
        ({"hi": 0.5}, "hi goes with kind='a_priori'"),
        ({"kind": "a_priori", "hi": 2.0}, "hi must be between -1 and 1, got 2.0"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"loss": "triplet"}, "loss must be one of"),
        ({"loss": "nt_xent", "queue": torch.ones(3, 4)}, "queue does not go with"),
        ({"key": torch.tensor([[1.0], [1], [1], [torch.inf], [1], [1]]).expand(6, 4)}, "key row 3 holds NaN or Inf"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    z = torch.randn(6, 4)
    with pytest.raises(ValueError, match=message):
        gradient_band(**{"query": z, "key": z, **options})  # type: ignore[arg-type]
