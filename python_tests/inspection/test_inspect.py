"""`spectral-kernels inspect`: the numbers of the ops, whatever the pieces; files of every kind; bad ones refused."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import spectral_kernels as sk
from spectral_kernels import cli
from spectral_kernels.inspection import diagnosis
from spectral_kernels.inspection.diagnosis import diagnose


def embeddings(n: int = 700, d: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) ** -0.5 + 0.3
    z[n // 2 : n // 2 + n // 14] = z[: n // 14] * 3  # the same directions
    z[7] = 0
    return z.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_those_of_the_ops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    z = embeddings(dtype=dtype)
    monkeypatch.setattr(diagnosis, "CHUNK", 123 * 24)
    found = diagnose(z)
    wide = z.double()
    expected = {
        "R1": sk.effective_rank(wide, order=1), "R2": sk.effective_rank(wide, order=2),
        "Rinf": sk.effective_rank(wide, order=math.inf), "centred R1": sk.effective_rank(wide, order=1, center=True),
        "centred R2": sk.effective_rank(wide, order=2, center=True),
        "RankMe": sk.effective_rank(wide, order=1, spectrum="singular", normalize=False),
    }  # fmt: skip
    for name, value in expected.items():
        assert found.ranks[name] == pytest.approx(float(value), rel=1e-5), name
    unbiased = sk.effective_rank(wide[wide.norm(dim=1) > 0], order=2, unbiased=True)
    assert found.ranks["R2 unbiased"] == pytest.approx(float(unbiased), rel=0.01)  # the zero row counts in n here
    assert found.rank_error == pytest.approx(float(sk.effective_rank_error(wide)), rel=1e-6)
    assert found.spectrum.tolist() == pytest.approx(sk.spectrum(wide, center=False).tolist(), rel=1e-4, abs=1e-7)
    assert found.mean_cosine == pytest.approx(float(normalize(wide, dim=1).mean(0).square().sum()), rel=1e-5)
    unit = normalize(wide, dim=1)
    cosines = (unit @ unit.mT).fill_diagonal_(-1)
    assert found.duplicate_share == pytest.approx(float((cosines.amax(1) >= 0.98).double().mean()), abs=0.002)
    off = (-4 * (1 - cosines[torch.triu(torch.ones(700, 700), 1).bool()])).exp().mean().log()
    assert found.uniformity == pytest.approx(float(off), rel=1e-6)
    assert (found.zero_rows, found.rows, found.dim, found.queries) == (1, 700, 24, 700)
    assert found.batch_ranks is not None and found.greedy_ranks is not None
    assert found.greedy_ranks > found.batch_ranks
    again = diagnose(z)  # in one piece
    assert again.ranks["R2"] == pytest.approx(found.ranks["R2"], rel=1e-6)


def test_near_duplicates_of_many_rows_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "SAMPLE", 300)
    z = embeddings(3000)
    z[1500:] = z[:1500]
    found = diagnose(z)
    assert found.queries == 512 and found.duplicate_share > 0.98
    z = embeddings(3000)
    found = diagnose(z)
    assert found.duplicate_share == pytest.approx(1 / 7, abs=0.06)
    assert found.duplicate_error == pytest.approx(math.sqrt(found.duplicate_share * (1 - found.duplicate_share) / 512))


def test_bad_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "CHUNK", 50 * 5)
    z = embeddings(200, 5)
    z[130, 2] = float("nan")
    with pytest.raises(ValueError, match="row 130 of the embeddings holds NaN or Inf"):
        diagnose(z)
    with pytest.raises(ValueError, match="all 4 embeddings are zero rows"):
        diagnose(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        diagnose(torch.ones(1, 3))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "z.npy", embeddings().numpy())
    assert cli.main(["inspect", str(tmp_path / "z.npy"), "--out", str(tmp_path), "--subset", "32"]) == 0
    out = capsys.readouterr().out
    assert "z.npy: 700 rows × 24, float32, 1 zero rows" in out
    assert "near-duplicates" in out and "by Greedy-64" in out
    subset = np.load(tmp_path / "z_subset.npy")
    assert len(set(subset.tolist())) == 32
    with (tmp_path / "z_spectrum.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and sum(float(row["eigenvalue"]) for row in rows) == pytest.approx(699 / 700, rel=1e-5)
    assert (tmp_path / "z_spectrum.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["inspect", str(tmp_path / "none.npy")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "z.npy"), "--subset", "701"]) == 1
    assert "--subset must be" in capsys.readouterr().err
