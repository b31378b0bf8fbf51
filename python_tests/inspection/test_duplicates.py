"""Near-duplicate pairs: those of all cosines, whatever the blocks, from files too; a stated subset of many rows; limits."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from spectral_kernels import cli
from spectral_kernels.inspection import duplicates
from spectral_kernels.inspection.duplicates import near_duplicates


def embeddings(n: int, d: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator)
    copies = torch.randint(n, (n // 3,), generator=generator)
    z[torch.randint(n, (n // 3,), generator=generator)] = z[copies] * 5 + 0.3 * torch.randn(
        n // 3, d, generator=generator
    )
    z[n // 2] = 0
    return z


def expected(z: Tensor, threshold: float) -> dict[tuple[int, int], float]:
    unit = normalize(z.double(), dim=1)
    cosines = (unit @ unit.mT).triu(1)
    return {(i, j): float(cosines[i, j]) for i, j in (cosines >= threshold).nonzero().tolist()}


@given(n=st.integers(3, 90), threshold=st.sampled_from([0.3, 0.9, 0.98, 1.0]), tile=st.sampled_from([1, 7, 32, 200]),
       held=st.sampled_from([1, 300, 2000]), seed=st.integers(0, 9))  # fmt: skip
def test_all_pairs_whatever_the_blocks(n: int, threshold: float, tile: int, held: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "TILE", tile)
        patch.setattr(duplicates, "HELD", held)
        z = embeddings(n, seed=seed)
        z[-1] = z[0] * 2
        shares: list[float] = []
        found = near_duplicates(z, threshold=threshold, progress=shares.append)
    wanted = expected(z, threshold - 1e-6)
    assert [tuple(pair) for pair in found.rows.tolist()] == sorted(wanted)
    assert found.cosines.tolist() == pytest.approx([wanted[pair] for pair in sorted(wanted)], abs=1e-6)
    assert (found.total, found.surplus) == (len(wanted), len({j for _, j in wanted}))
    assert (found.compared, found.given) == (n, n) and "drawn" not in found.line()
    assert shares == sorted(shares) and 0 < shares[-1] <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    z = embeddings(300).to(dtype)
    scaled = z * 1e200 if dtype == torch.float64 else z
    assert [tuple(pair) for pair in near_duplicates(scaled).rows.tolist()] == sorted(expected(z, 0.98 - 1e-6))


def test_of_many_rows_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST", 400)
    z = embeddings(1000)
    found = near_duplicates(z, threshold=0.9)
    pairs, wanted = {tuple(pair) for pair in found.rows.tolist()}, expected(z, 0.9)
    assert pairs < wanted.keys() and found.total == len(pairs) > 0.05 * len(wanted)
    assert "(among 400 rows drawn)" in found.line()
    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:400].tolist()
    assert pairs == {pair for pair in wanted if set(pair) <= set(drawn)}


def test_no_more_pairs_than_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "LISTED", 100)
    found = near_duplicates(torch.ones(60, 3))
    assert (len(found.rows), found.total, found.surplus) == (100, 60 * 59 // 2, 59)
    assert "100 pairs are listed" in found.line()


def test_bad_threshold() -> None:
    for threshold in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be above 0 and at most 1"):
            near_duplicates(torch.ones(3, 2), threshold=threshold)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    z = embeddings(700, 24)
    np.save(tmp_path / "z.npy", z.numpy())
    for threshold in ("0.98", "0.999", "1"):
        assert cli.main(["inspect", str(tmp_path / "z.npy"), "--out", str(tmp_path), "--duplicates", threshold]) == 0
        wanted = expected(z, float(threshold) - 1e-6)
        assert f"near-duplicate pairs     {len(wanted):,} within cosine {threshold}" in capsys.readouterr().out
        with (tmp_path / "z_duplicates.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {(int(row["keep"]), int(row["duplicate"])) for row in rows} == wanted.keys()
    assert cli.main(["inspect", str(tmp_path / "z.npy"), "--duplicates", "2"]) == 1
    assert "--duplicates must be above 0 and at most 1, got 2" in capsys.readouterr().err


SCRIPT = """
import sys
from spectral_kernels import cli
def peak():
    # not ru_maxrss, which begins with what the process that started this one had
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
cli.main(["inspect", sys.argv[1], "--out", sys.argv[3]])
before = peak()
assert cli.main(["inspect", sys.argv[2], "--out", sys.argv[3]]) == 0
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Of a file of 10 MB and one of 128 MB: what the second needs beyond the first; pairs among part of its rows."""
    files = [str(tmp_path / "small.npy"), str(tmp_path / "large.npy"), str(tmp_path)]
    for file, n in zip(files, (20_000, 250_000), strict=False):
        np.save(file, embeddings(n, 128).numpy())
    # large blocks go back at once, so that what is seen is held, not kept by glibc, which keeps up to 120 MB more
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *files], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    rise = float(done.stdout.split()[-1])
    assert rise < 60, f"{rise:.0f} MB"
