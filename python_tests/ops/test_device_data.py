"""What no host check sees of data on a GPU: masks that leave too few rows, indices out of range, NaN and Inf.

The kernels themselves must not be led out of bounds. CUDA's run on the host Triton's in the interpreter, which
reads past its tensors as a GPU would.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from emulation_helpers import chip_select
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels import checks
from spectral_kernels.ops._selection import row_keys
from spectral_kernels.ops.effective_rank import triton as effective_rank
from spectral_kernels.ops.greedy import reference
from spectral_kernels.ops.greedy import triton as greedy
from spectral_kernels.ops.spectrum.triton import gathered_spectrum

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

FAR = 1 << 40
N, K = 20, 4
# of the keys of a pool's rows
SEED = torch.tensor([12345 << 40])


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """As on a GPU, where the host does not look."""
    checks.set_checks(False)
    yield
    checks.set_checks(True)


def guarded(value: Tensor) -> Tensor:
    """The same numbers in the middle of poison, which what reads beside them takes in."""
    room = 4 * value.numel()
    poison = math.nan if value.dtype.is_floating_point else 1
    held = torch.full((2 * room + value.numel(),), poison, dtype=value.dtype)
    held[room : room + value.numel()] = value.reshape(-1)
    return held[room : room + value.numel()].view(value.shape)


def pick(
    backend: str, pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None,
    objective: str, normalize: bool = True, k: int = K,
) -> tuple[Tensor, ...]:  # fmt: skip
    seed = SEED.expand(len(pool)).contiguous()
    if backend == "triton":
        return greedy.greedy_select(pool, start, draws, valid, seed, k, objective, normalize)
    return chip_select(pool, start, draws, valid, seed, k, objective, normalize, descending=True)[0]


def draws_of(kind: str, n: int = N) -> Tensor | None:
    return None if kind == "all rows" else torch.randint(n, (1, K, 4 if kind == "draws" else 2 * n))


BACKENDS = ("triton", "cuda")
OBJECTIVES = ("effective_rank", "logdet")
# the chip keeps scores by draw, or, of more draws than rows, by row
KINDS = ("all rows", "draws", "many draws")
# Triton makes a Gram matrix of the smaller pool
POOLS = [
    (backend, n, kind)
    for backend, n in (("triton", N), ("triton", 64 * K + 5), ("cuda", N))
    for kind in (KINDS if backend == "cuda" else KINDS[:2])
]


@pytest.mark.parametrize("left", (0, 2))
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend, n, kind", POOLS)
def test_a_mask_that_leaves_too_few_rows(backend: str, objective: str, kind: str, left: int, n: int) -> None:
    """What it leaves is picked; then -1, at the rank that the picks have. The pool beside is as ever."""
    pool = guarded(torch.randn(2, n, 4))
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0] = False
    valid[0, torch.randperm(n)[:left]] = True
    start = torch.tensor([[3], [3]])
    draws = draws_of(kind, n)
    draws = None if draws is None else draws.expand(2, -1, -1).contiguous()
    indices, ranks, objectives = pick(backend, pool, start, draws, guarded(valid), objective)
    assert indices[0, :left].sort().values.tolist() == valid[0].nonzero()[:, 0].tolist()
    assert (indices[0, left:] == -1).all()
    for trace in (ranks, objectives):
        assert trace.isfinite().all()
        last = trace[0, left - 1] if left else torch.zeros(())
        assert (trace[0, left:] == last).all()
    alone = pick(backend, pool[1:], start[1:], None if draws is None else draws[1:], valid[1:], objective)
    for both, one in zip((indices, ranks, objectives), alone, strict=True):
        assert torch.equal(both[1:], one)


@pytest.mark.parametrize("bad, normalize", ((math.nan, True), (math.inf, True), (-math.inf, False)))
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend, n, kind", POOLS)
def test_rows_that_are_not_finite_are_never_picked(
    backend: str, objective: str, kind: str, bad: float, n: int, normalize: bool
) -> None:
    """As if a mask had taken them out."""
    pool = torch.randn(1, n, 5)
    draws = draws_of(kind, n)
    valid = torch.ones(1, n, dtype=torch.bool)
    valid[0, 3] = valid[0, n - 1] = False
    start = torch.tensor([[3, 1]])
    expected = reference.greedy_select(pool, start, draws, valid, SEED, K, objective, normalize)
    pool[0, 3, 4] = pool[0, n - 1, 0] = bad
    found = pick(backend, guarded(pool), start, draws, None, objective, normalize)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_without_a_finite_row(backend: str, objective: str) -> None:
    indices, *traces = pick(backend, torch.full((1, N, 3), math.nan), torch.tensor([[0]]), None, None, objective)
    assert (indices == -1).all()
    assert all((trace == 0).all() for trace in traces)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend, kind", [(backend, kind) for backend, n, kind in POOLS if n == N])
@pytest.mark.parametrize("far", (-1, N, FAR))
def test_starts_and_draws_outside_the_pool_are_passed_over(backend: str, objective: str, kind: str, far: int) -> None:
    pool, start = torch.randn(1, N, 4), torch.tensor([[7, 5]])
    draws = draws_of(kind)
    expected = pick(backend, pool, start, draws, None, objective)
    # before the others, and in the place of a row that a step cannot take twice
    start = torch.cat([torch.tensor([[far]]), start], 1)
    draws = None if draws is None else torch.cat([torch.full((1, K, 1), far), draws], 2)
    found = pick(backend, guarded(pool), guarded(start), draws, None, objective)
    for part, other in zip(found, expected, strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", (-1, FAR))
def test_no_start_and_no_draw_inside_the_pool(backend: str, objective: str, far: int) -> None:
    """As with draws that are all taken: the rows of the lowest keys."""
    pool = torch.randn(1, N, 4)
    draws = torch.full((1, K, 3), far)
    indices = pick(backend, pool, torch.tensor([[far]]), draws, None, objective)[0]
    assert indices[0].tolist() == row_keys(torch.arange(N), N, SEED).argsort()[:K].tolist()


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_squares_overflow(backend: str, objective: str, normalize: bool) -> None:
    """Finite, but no score of theirs is: all threads still agree on a row."""
    pool = 1e200 * torch.randn(1, N, 4, dtype=torch.float64)
    indices = pick(backend, pool, torch.tensor([[2]]), None, None, objective, None, normalize)[0]
    picked = indices[indices >= 0].tolist()
    assert len(set(picked)) == len(picked)


# --- indices into a pool ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far, center", ((-1, False), (N, True), (FAR, False)))
@pytest.mark.parametrize("b, d", ((9, 6), (140, 130), (20, 150)))
def test_a_batch_with_an_index_outside_the_pool_is_nan(far: int, b: int, d: int, center: bool) -> None:
    """Forward and backward, whole rows and tiles of either side; the batches beside it are as ever."""
    pool = guarded(torch.randn(N, d))
    # rows 0 to 9 for the batches that stay, the others for the one that is led astray
    indices = torch.randint(10, (3, b)) + torch.tensor([[0], [10], [0]])
    options = (center, True)
    rank = effective_rank.batch_effective_rank2(pool, indices, *options)
    gradient = effective_rank.batch_effective_rank2_backward(torch.ones(3), pool, indices, *options)
    indices[1, b // 2] = far
    astray = effective_rank.batch_effective_rank2(pool, guarded(indices), *options)
    assert astray[1].isnan()
    assert torch.equal(astray[::2], rank[::2])
    astray = effective_rank.batch_effective_rank2_backward(torch.ones(3), pool, guarded(indices), *options)
    assert torch.equal(astray[:10], gradient[:10])
    assert astray[indices[1, : b // 2]].isnan().all()


@pytest.mark.parametrize("b, d", ((9, 6), (20, 150)))
def test_the_spectrum_of_such_a_batch_is_nan(b: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    # torch's solver raises on NaN, here and on a GPU
    monkeypatch.setattr(effective_rank, "gathered_spectrum", lambda *given: gathered_spectrum(*given, solve=keep))

    def keep(moment: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(moment)
        return moment[..., 0].to(dtype)

    pool, indices = guarded(torch.randn(N, d)), torch.randint(N, (2, b))
    indices[1, 2] = FAR
    effective_rank.batch_spectrum(pool, indices, True, True)
    assert seen[0][0].isfinite().all()
    assert seen[0][1].isnan().any()


@pytest.mark.parametrize("spectrum", ("covariance", "singular"))
@pytest.mark.parametrize("order", (0, 0.5, 1, 3, math.inf))
def test_no_order_makes_a_number_of_a_spectrum_that_is_nan(
    order: float, spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as csrc/spectrum.cu gives."""
    values = torch.tensor([[3.0, 1.0], [math.nan, math.nan], [0.0, 0.0]])
    monkeypatch.setattr("spectral_kernels.ops.effective_rank.eigenvalue_spectrum", lambda *_, **__: values)
    rank = sk.effective_rank(torch.randn(3, 4, 2), order=order, spectrum=spectrum)
    assert rank[0].isfinite() and rank[1].isnan() and rank[2] == 0


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("d", (6, 150))
def test_the_rank_of_rows_that_are_not_finite_is_nan(d: int, value: float) -> None:
    z = torch.randn(2, N, d)
    z[1, 3, 2] = value
    for center in (False, True):
        rank = effective_rank.effective_rank2(z, center, True, False)
        assert rank[0].isfinite()
        assert rank[1].isnan()
