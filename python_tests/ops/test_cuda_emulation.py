"""The CUDA kernels' own code, run thread by thread on the host, against float64."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emulation_helpers import load_emulation

from spectral_kernels.ops.whitening import cuda as whitening_cuda
from spectral_kernels.ops.whitening import reference as whitening
from spectral_kernels.ops.whitening import shared_bytes


@pytest.fixture(scope="module")
def emulation() -> ModuleType:
    return load_emulation()


Array = np.ndarray[Any, Any]
# relative to the largest eigenvalue
TOLERANCE = {"float32": 1e-6, "float64": 1e-13}


def second_moment(rows: Array) -> Array:
    return rows.T @ rows / len(rows)


def matrix(kind: str, d: int) -> Array:
    """A positive semidefinite matrix, in float64."""
    rng = np.random.default_rng(d)
    if kind == "zero":
        return np.zeros((d, d))
    if kind == "identity":
        return np.eye(d)
    if kind == "diagonal":
        return np.diag(rng.random(d))
    if kind == "rank one":
        return second_moment(np.ones((1, d)))
    if kind == "deficient":
        return second_moment(rng.standard_normal((max(1, d // 3), d)))
    if kind == "clusters":
        basis, _ = np.linalg.qr(rng.standard_normal((d, d)))
        found: Array = basis * np.repeat((1.0, 0.5, 1e-3), -(-d // 3))[:d] @ basis.T
        return (found + found.T) / 2
    if kind == "graded":
        return second_moment(rng.standard_normal((2 * d, d)) * np.geomspace(1, 1e-6, d))
    if kind == "tiny entries":
        return second_moment(rng.standard_normal((2 * d, d)) * np.geomspace(1, 1e-30, d))
    if kind == "blocks":
        block = second_moment(rng.standard_normal((9, 3)))
        return np.kron(np.eye(-(-d // 3)), block)[:d, :d]
    rows = rng.standard_normal((2 * d + 1, d))
    return second_moment(rows / np.linalg.norm(rows, axis=1, keepdims=True)) * float(kind or 1)


def effective_rank(values: Array) -> float:
    p = values.astype(np.float64) / values.astype(np.float64).sum()
    return float(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()))


def eigenvalues(matrices: Array) -> Array:
    return np.linalg.eigvalsh(matrices.astype(np.float64))[..., ::-1].clip(0)


def check(emulation: ModuleType, matrices: Array) -> None:
    """All values and the largest alone, in two orders of the threads."""
    exact = eigenvalues(matrices)
    values = emulation.spectrum(matrices, largest=False, descending=False)
    assert values.shape == exact.shape
    assert values.dtype == matrices.dtype
    bound = TOLERANCE[str(matrices.dtype)] * exact[:, :1]
    assert (np.abs(values - exact) <= bound).all(), np.abs(values - exact).max()
    assert (values >= 0).all()
    assert (np.diff(values, axis=1) <= bound).all()
    largest = emulation.spectrum(matrices, largest=True, descending=False)
    assert (np.abs(largest - exact[:, :1]) <= bound).all()
    # a missing barrier shows
    assert np.array_equal(values, emulation.spectrum(matrices, largest=False, descending=True))
    assert np.array_equal(largest, emulation.spectrum(matrices, largest=True, descending=True))


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize("d", (1, 2, 5, 31, 32, 33, 64, 123, 128, 129, 200))
def test_spectrum_against_float64(emulation: ModuleType, d: int, dtype: str) -> None:
    matrices = matrix("", d)[None].astype(dtype)
    check(emulation, matrices)
    values = emulation.spectrum(matrices, largest=False, descending=False)
    rank = effective_rank(eigenvalues(matrices)[0])
    assert effective_rank(values[0]) == pytest.approx(rank, rel=1e-6 if dtype == "float32" else 1e-12)


KINDS = ("zero", "rank one", "deficient", "clusters", "graded", "tiny entries", "blocks")
SCALED = ("identity", "diagonal", "1e4", "1e-4", "1e-30", "1e30")
SLOW = [pytest.param(d, KINDS, marks=pytest.mark.slow) for d in (100, 128, 150)]


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize(
    "d, kinds",
    (
        *((d, KINDS + SCALED) for d in (1, 7, 40)), (130, ("", "zero")), *SLOW,
        pytest.param(600, ("clusters", "graded"), marks=pytest.mark.slow),
    ),
)  # fmt: skip
def test_spectra_of_difficult_matrices(emulation: ModuleType, d: int, kinds: tuple[str, ...], dtype: str) -> None:
    """All in one batch."""
    check(emulation, np.stack([matrix(kind, d) for kind in kinds]).astype(dtype))


@pytest.mark.parametrize("largest", (False, True))
@pytest.mark.parametrize("d", (6, 130))
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_spectrum_of_a_bad_matrix_is_nan(emulation: ModuleType, bad: float, d: int, largest: bool) -> None:
    matrices = np.stack([matrix("", d)] * 2)
    matrices[1, d // 2, d - 1] = bad
    values = emulation.spectrum(matrices, largest=largest, descending=False)
    assert np.isfinite(values[0]).all()
    assert np.isnan(values[1]).all()


def test_emulation_sees_a_missing_barrier(emulation: ModuleType) -> None:
    """The machine itself: without a barrier the order of threads shows, one that not all reach is an error."""
    assert emulation.neighbours(barrier=True, descending=False) == emulation.neighbours(barrier=True, descending=True)
    assert emulation.neighbours(barrier=False, descending=False) != emulation.neighbours(barrier=False, descending=True)
    with pytest.raises(RuntimeError, match="barrier that not every thread reaches"):
        emulation.divergent("barrier")
    with pytest.raises(RuntimeError, match="lanes of a warp meet in different operations"):
        emulation.divergent("shuffle")
    with pytest.raises(RuntimeError, match="all threads wait for one another"):
        emulation.divergent("spin")


# --- whitening matrices -----------------------------------------------------------------------------------------------


def inverse_factor(
    emulation: ModuleType, covariance: torch.Tensor, mean: torch.Tensor, shrinkage: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, whether it is singular, and the covariance as it is left; the same in two orders of the threads."""
    eps = torch.finfo(covariance.dtype).eps
    found = []
    for descending in (False, True):
        work = covariance.numpy().copy()
        matrix, singular = emulation.whitening_matrix(
            work, mean.numpy(), shrinkage, (32 * eps) ** 2, 0.0 if shrinkage else covariance.shape[-1] * eps,
            descending=descending,
        )  # fmt: skip
        found.append([torch.from_numpy(part) for part in (matrix, singular, work)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(77.0), other.nan_to_num(77.0))
    return tuple(found[0])  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("shrinkage", (0.0, 1e-6, 1e-2, 1.0))
@pytest.mark.parametrize("d", (1, 5, 16, 17, 31, 64, 123, 128))
def test_whitening_matrix(emulation: ModuleType, d: int, shrinkage: float, dtype: torch.dtype) -> None:
    spread = torch.logspace(0, -2, d, dtype=torch.float64)
    rows = torch.randn(2, 2 * d + 5, d, dtype=torch.float64) * spread * torch.tensor([1e-4, 1e4])[:, None, None]
    mean = rows.mean(-2).to(dtype)
    centered = rows - rows.mean(-2, keepdim=True)
    covariance = (centered.mT @ centered / rows.shape[-2]).to(dtype)
    matrix, singular, kept = inverse_factor(emulation, covariance, mean, shrinkage)
    exact = whitening.whitening_matrix(covariance, "cholesky", shrinkage)
    assert matrix.dtype == dtype
    assert torch.equal(kept, covariance)
    assert not singular.any()
    assert (matrix.triu(1) == 0).all()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(matrix, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("d", (3, 40, 128))
def test_whitening_matrix_of_few_rows(emulation: ModuleType, d: int) -> None:
    """A covariance of rank d / 3: shrinkage makes it regular, without it is told singular."""
    rows = torch.randn(1, d // 3 + 1, d, dtype=torch.float64)
    mean = rows.mean(-2)
    rows = rows - mean[:, None]
    covariance = rows.mT @ rows / rows.shape[-2]
    matrix, singular, _ = inverse_factor(emulation, covariance, mean, 1e-4)
    white = matrix @ whitening.shrink(covariance, 1e-4) @ matrix.mT
    torch.testing.assert_close(white, torch.eye(d, dtype=white.dtype)[None], atol=1e-9, rtol=0)
    assert not singular.any()
    matrix, singular, _ = inverse_factor(emulation, covariance, mean, 0.0)
    assert singular.all()
    assert matrix.isnan().all()


def test_whitening_memory_is_what_the_choice_of_a_backend_takes_it_for(emulation: ModuleType) -> None:
    for d in range(1, 129):
        assert shared_bytes(d) == emulation.whitening_bytes(d)


def test_whitening_matrix_of_identical_rows(emulation: ModuleType) -> None:
    """A covariance that is rounding noise beside its mean becomes 0, and W the identity; its neighbour is as ever."""
    noise = 1e-14 * torch.randn(2, 20, 20)
    covariance = noise @ noise.mT
    covariance[1] += torch.eye(20)
    matrix, _, kept = inverse_factor(emulation, covariance, torch.ones(2, 20), 1e-4)
    assert torch.equal(matrix[0], torch.eye(20))
    assert (kept[0] == 0).all()
    assert torch.equal(kept[1], covariance[1])
    torch.testing.assert_close(matrix[1], torch.eye(20), atol=1e-6, rtol=0)


def test_whitening_matrix_of_an_indefinite_covariance(emulation: ModuleType) -> None:
    """Its neighbours are as ever."""
    covariance = torch.eye(50).repeat(3, 1, 1)
    covariance[1] -= 0.1 * torch.ones(50, 50)
    matrix, singular, _ = inverse_factor(emulation, covariance, torch.zeros(3, 50), 1e-5)
    assert singular.tolist() == [0, 1, 0]
    assert matrix[1].isnan().all()
    assert torch.equal(matrix[0], torch.eye(50))
    assert torch.equal(matrix[2], torch.eye(50))


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("shrinkage", (0.0, 1e-4))
def test_whitening_matrix_of_a_bad_covariance_is_nan(emulation: ModuleType, shrinkage: float, bad: float) -> None:
    covariance = torch.eye(40).repeat(2, 1, 1)
    covariance[1, 5, 5] = bad
    matrix, _, _ = inverse_factor(emulation, covariance, torch.zeros(2, 40), shrinkage)
    assert matrix[0].isfinite().all()
    assert matrix[1].isnan().any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("center", (True, False))
@pytest.mark.parametrize("n, d", ((2, 3), (40, 5), (123, 33), (300, 128)))
def test_whitening_by_both(
    emulation: ModuleType, n: int, d: int, center: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op of the cuda backend, forward and backward: Triton's launches interpreted, with this matrix between them."""
    shrinkage = 1e-2

    def whitening_matrix(
        covariance: torch.Tensor, mean: torch.Tensor, shrinkage: float, negligible: float, least: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        matrix, singular = emulation.whitening_matrix(
            covariance.numpy(), mean.numpy(), shrinkage, negligible, least, descending=False
        )
        return torch.from_numpy(matrix), torch.from_numpy(singular)

    monkeypatch.setattr(whitening_cuda, "whitening_matrix", whitening_matrix)
    z = (torch.randn(2, n, d, dtype=torch.float64) + 1).to(dtype)
    grad = torch.randn(2, n, d, dtype=torch.float64).to(dtype)
    found = whitening_cuda.whiten(z, "cholesky", shrinkage, center)
    exact = whitening.whiten(z.double(), "cholesky", shrinkage, center)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    back = whitening_cuda.whiten_backward(grad, z, *found[1:], "cholesky", shrinkage, center)
    assert back.dtype == dtype
    wanted = whitening.whiten_backward(grad.double(), z.double(), *exact[1:], "cholesky", shrinkage, center)
    torch.testing.assert_close(back.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
