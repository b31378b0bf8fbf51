"""The figures of `diagnose` where moments are badly conditioned: nearly equal rows, low rank, any scale."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels import cli
from spectral_kernels.inspection import diagnosis


@pytest.fixture(autouse=True)
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and are not what is tested here."""
    monkeypatch.setattr(diagnosis, "BATCHES", 2)


def published_rankme(z: Tensor) -> float:
    """Garrido et al. 2023, equation 1, from the singular values of the rows as they are."""
    values = torch.linalg.svdvals(z.double())
    p = values / values.sum()
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))


def assert_centred_ranks(z: Tensor, rel: float) -> None:
    """As of the singular values of the centred unit rows."""
    x = torch.nn.functional.normalize(z.double(), dim=1)
    p = torch.linalg.svdvals(x - x.mean(0)).square()
    p = p / p.sum()
    entropy = -(p * p.clamp_min(1e-300).log()).sum()
    found = sk.diagnose(z).ranks
    for name, right in (
        ("centred R1", entropy.exp()),
        ("centred R2", 1 / p.square().sum()),
        ("centred Rinf", 1 / p[0]),
    ):
        assert found[name] == pytest.approx(float(right), rel=rel), name


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [2**25, 700 * 32 * 8], ids=["one piece", "pieces"])
@pytest.mark.parametrize("spread", [1e-3, 2e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_equal_rows(dtype: torch.dtype, spread: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "CHUNK", chunk)
    x = (torch.nn.functional.normalize(draw(1, 32).double()) + spread * draw(2000, 32, seed=1).double()).to(dtype)
    assert_centred_ranks(x, 1e-5)


def test_an_outlier_first_and_clusters_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """No one row, and no one piece's mean, is near all others."""
    monkeypatch.setattr(diagnosis, "CHUNK", 100 * 16 * 8)
    x = draw(1, 16).double() + 1e-6 * draw(1000, 16, seed=1).double()
    x[0] = draw(16, seed=2) * 5
    x[500:] += 1e-4 * draw(16, seed=3)
    assert_centred_ranks(x, 1e-6)


def test_equal_rows_have_no_covariance() -> None:
    found = sk.diagnose(draw(1, 24).double() * torch.linspace(0.1, 7, 700)[:, None])
    assert found.ranks["centred R1"] == found.ranks["centred R2"] == 0
    assert found.ranks["R2"] == pytest.approx(1) and found.ranks["RankMe"] == pytest.approx(1)


@pytest.mark.parametrize(
    "z",
    [
        draw(4096, 10) @ draw(10, 256, seed=1),
        draw(3000, 3) @ draw(3, 300, seed=1),
        draw(2, 64).repeat(300, 1),
        draw(600, 40) * torch.arange(1, 41) ** -1.0,
        draw(600, 40) * torch.logspace(0, 3, 600)[:, None],
    ],
    ids=["rank 10", "rank 3", "two rows", "decaying", "lengths"],
)
def test_rankme_is_the_published_one(z: Tensor) -> None:
    """Of the raw rows; eigenvalues at the level of rounding add nothing, though their roots would."""
    found = sk.diagnose(z).ranks["RankMe"]
    assert found == pytest.approx(published_rankme(z), rel=1e-4)
    assert found == pytest.approx(float(sk.effective_rank(z.double(), spectrum="singular", normalize=False)), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37, 1e-300, 1e300])
def test_scale_changes_nothing(scale: float) -> None:
    z = draw(600, 16) * torch.arange(1, 17) ** -0.5 + 0.2
    scaled = (z.double() * scale).to(torch.float64 if abs(math.log10(scale)) > 50 else torch.float32)
    if scale == 1e-44:  # what is left of denormal numbers
        z = (scaled.double() / scale).float()
    found, right = sk.diagnose(scaled), sk.diagnose(z)
    for name, value in right.ranks.items():
        assert found.ranks[name] == pytest.approx(value, rel=1e-5), name
    others = ["rank_error", "mean_cosine", "uniformity", "duplicate_share", "batch_ranks", "greedy_ranks", "batch_chi2"]
    for name in others:
        assert getattr(found, name) == pytest.approx(getattr(right, name), rel=1e-3), name
    assert found.zero_rows == right.zero_rows


def test_rows_of_all_scales_at_once() -> None:
    z = draw(600, 16)
    mixed = z.double() * torch.logspace(-200, 200, 600, dtype=torch.float64)[:, None]
    found, right = sk.diagnose(mixed), sk.diagnose(z)
    for name in ("R1", "R2", "Rinf", "centred R2"):
        assert found.ranks[name] == pytest.approx(right.ranks[name], rel=1e-6)
    assert found.ranks["RankMe"] == pytest.approx(published_rankme(mixed / mixed.abs().max()), rel=1e-6)


def test_a_diagnosis_prints_and_draws(tmp_path: Path) -> None:
    found = sk.diagnose(draw(600, 16).requires_grad_())
    assert "RankMe of the raw rows" in repr(found) and repr(found).startswith("embeddings: 600 rows × 16, float32")
    assert found.plot(tmp_path / "z.png").read_bytes()[:4] == b"\x89PNG"


def test_a_subset_of_tiny_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "z.npy", (draw(600, 16) * 1e-20).numpy())
    assert cli.main(["inspect", str(tmp_path / "z.npy"), "--out", str(tmp_path), "--subset", "32"]) == 1
    assert "scale the embeddings up" in capsys.readouterr().err
