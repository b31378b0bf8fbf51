"""One clear error that names the argument and the value."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.dispatch import overload
from spectral_kernels.dispatch.backends import Fit
from spectral_kernels.dispatch.backends import choose as choose_backend
from spectral_kernels.ops import whitening
from spectral_kernels.ops.greedy import OBJECTIVES

Z = torch.randn(6, 4)
BAD = Z.clone()
BAD[3, 1] = math.nan
BAD[5, 0] = math.inf
# messages' common parts
WHOLE = "indices must be whole numbers"
NUMBER = "must be a finite number above 0"
NO_ARRAY = "must be float64, float32 or float16, got an array of"
FEW = torch.tensor([True, True, False, False, False, False])

CASES: dict[str, tuple[Callable[[], object], str]] = {
    "covariance of a vector": (lambda: sk.covariance(torch.randn(4)), r"z must have shape \(\.\.\., n, d\)"),
    "integers": (lambda: sk.covariance(Z.long()), "z must be float64, float32, bfloat16 or float16, got torch.int64"),
    "array of integers": (lambda: sk.covariance(Z.numpy().astype(int)), "z must be float64, .* got torch.int64"),
    "array of long doubles": (lambda: sk.covariance(Z.numpy().astype(np.longdouble)), f"z {NO_ARRAY}"),
    "array of text": (lambda: sk.covariance(Z.numpy().astype("U8")), f"z {NO_ARRAY}"),
    "list": (lambda: sk.covariance(Z.tolist()), "z must be a tensor or an array, got list"),  # type: ignore[arg-type]
    "None": (lambda: sk.covariance(None), "z must be a tensor or an array, got NoneType"),  # type: ignore[arg-type]
    "sparse rows": (lambda: sk.covariance(Z.to_sparse()), "z must be a dense tensor, got torch.sparse_coo"),
    "grad norms of a queue and views": (
        lambda: sk.info_nce_grad_norms(Z, Z, queue=Z, loss="nt_xent"),
        "queue does not go with loss='nt_xent'",
    ),
    "grad norms loss": (lambda: sk.info_nce_grad_norms(Z, Z, loss="triplet"), "loss must be one of .*'triplet'"),
    "no rows": (lambda: sk.covariance(Z[None, :0]), r"z is empty: shape \(1, 0, 4\)"),
    "no batches": (lambda: sk.covariance(Z[None][:0]), r"z is empty: shape \(0, 6, 4\)"),
    "correction": (lambda: sk.covariance(Z, correction=6), "correction must be below n = 6, got 6"),
    "negative correction": (lambda: sk.covariance(Z, correction=-1), "correction must be at least 0, got -1"),
    "precision": (lambda: sk.covariance(Z, precision="fp8"), "precision must be one of .*'fp8'"),
    "backend": (lambda: sk.covariance(Z, backend="gpu"), "backend must be one of .*'gpu'"),
    "order": (lambda: sk.effective_rank(Z, order=-1), "order must be a number from 0 to math.inf, got -1"),
    "order nan": (lambda: sk.effective_rank(Z, order=math.nan), "order must be a number"),
    "spectrum": (lambda: sk.effective_rank(Z, spectrum="kernel"), "spectrum must be one of .*'kernel'"),
    "unbiased order": (lambda: sk.effective_rank(Z, unbiased=True), "unbiased needs order=2"),
    "unbiased rows": (lambda: sk.effective_rank(Z[:1], order=2, unbiased=True), "unbiased needs at least 2 rows"),
    "indices range": (
        lambda: sk.batch_effective_rank(Z, torch.tensor([[0, 6]])),
        r"indices must lie in \[0, 6\), got 6",
    ),
    "indices negative": (lambda: sk.batch_effective_rank(Z, [[0, -1]]), r"indices must lie in \[0, 6\), got -1"),
    "indices dtype": (lambda: sk.batch_effective_rank(Z, [[0.5, 1.0]]), f"{WHOLE}, got torch.float32"),
    "indices bool": (lambda: sk.batch_effective_rank(Z, [[True, False]]), f"{WHOLE}, got torch.bool"),
    "indices ragged": (lambda: sk.batch_effective_rank(Z, [[0, 1], [2]]), f"{WHOLE} of one shape, got list"),
    "indices text": (lambda: sk.batch_effective_rank(Z, "rows"), f"{WHOLE} of one shape, got str"),
    "indices shape": (lambda: sk.batch_effective_rank(Z, [0, 1]), r"indices must be .* 2 dimensions, got shape \(2,\)"),
    "indices empty": (lambda: sk.batch_effective_rank(Z, torch.zeros(0, 2, dtype=torch.int64)), "non-empty"),
    "method": (lambda: sk.whiten(Z, method="pca"), "method must be one of .*'pca'"),
    "shrinkage": (lambda: sk.whiten(Z, shrinkage=1.5), "shrinkage must be between 0 and 1, got 1.5"),
    "singular": (lambda: sk.whiten(Z[:3], shrinkage=0.0), "shrinkage = 0.0 leaves the covariance singular"),
    "singular zca": (lambda: sk.whiten(Z[:3], shrinkage=0.0, method="zca"), "singular"),
    "singular iteration": (lambda: sk.whiten(Z[:3], shrinkage=0.0, method="newton_schulz"), "singular"),
    "k": (lambda: sk.greedy_select(Z, 7), "k must be between 1 and 6, got 7"),
    "k zero": (lambda: sk.greedy_select(Z, 0), "k must be between 1 and 6, got 0"),
    "k float": (lambda: sk.greedy_select(Z, 2.0), "k must be an integer, got 2.0"),  # type: ignore[arg-type]
    "k of numpy": (lambda: sk.greedy_select(Z, np.float32(3)), "k must be an integer"),  # type: ignore[arg-type]
    "k bool": (lambda: sk.greedy_select(Z, True), "k must be an integer, got True"),
    "k large": (lambda: sk.greedy_select(Z, np.int64(13)), "k must be between 1 and 6, got 13"),  # type: ignore[arg-type]
    "candidates": (lambda: sk.greedy_select(Z, 2, candidates=0), "candidates must be at least 1, got 0"),
    "objective": (lambda: sk.greedy_select(Z, 2, objective="volume"), "objective must be one of .*'volume'"),
    "window": (lambda: sk.pool_select(Z, 2, window=(3.0, 1.0)), "window must satisfy 0 <= lo <= hi"),
    "window shape": (lambda: sk.pool_select(Z, 2, window=(3.0,)), "window must be a pair"),  # type: ignore[arg-type]
    "start": (lambda: sk.greedy_select(Z, 2, start=6), "start must be between 0 and 5, got 6"),
    "start masked": (lambda: sk.greedy_select(Z, 2, start=4, valid=FEW), "start = 4 is masked out"),
    "valid rows": (lambda: sk.greedy_select(Z, 3, valid=FEW), "valid leaves 2 rows, but 3"),
    "valid shape": (lambda: sk.greedy_select(Z, 2, valid=FEW[:3]), r"valid must be bool of shape \(6,\)"),
    "generator": (lambda: sk.greedy_select(Z, 2, generator=3), "generator must be a torch.Generator"),  # type: ignore[arg-type]
    "batch size": (lambda: sk.pool_select(Z, 7), "batch_size must be between 1 and 6, got 7"),
    "draws": (lambda: sk.pool_select(Z, 2, draws=0), "draws must be at least 1, got 0"),
    "policy": (lambda: sk.pool_select(Z, 2, policy="medium"), "policy must be one of .*'medium'"),
    "quantile": (lambda: sk.pool_select(Z, 2, policy=1.5), "policy must be one of .*1.5"),
    "temperature": (lambda: sk.nt_xent(Z, Z, temperature=0.0), "temperature must be a finite number above 0, got 0.0"),
    "temperature negative": (lambda: sk.info_nce(Z, Z, temperature=-0.1), "temperature must be .* got -0.1"),
    "temperature bool": (lambda: sk.nt_xent(Z, Z, temperature=np.bool_(True)), f"temperature {NUMBER}"),
    "temperature nan": (lambda: sk.nt_xent(Z, Z, temperature=np.float32("nan")), f"temperature {NUMBER}"),
    "temperature text": (lambda: sk.nt_xent(Z, Z, temperature="0.1"), f"temperature {NUMBER}, got '0.1'"),
    **{
        f"eps {eps}": (lambda e=eps: sk.coding_rate(Z, eps=e), f"eps {NUMBER}") for eps in (0, -1.0, math.nan, math.inf)
    },
    "error of few rows": (
        lambda: sk.effective_rank_error(Z[:4], center=True, unbiased=True),
        "z must have at least 5 rows with center=True, unbiased=True, got 4",
    ),
    "reduction": (lambda: sk.info_nce(Z, Z, reduction="max"), "reduction must be one of .*'max'"),
    "mismatched rows": (lambda: sk.info_nce(Z, Z[:5]), "key has 5 rows, but query has 6"),
    "mismatched d": (lambda: sk.info_nce(Z, torch.randn(6, 3)), "key has d = 3, but query has d = 4"),
    "mismatched queue": (lambda: sk.info_nce(Z, Z, queue=torch.randn(9, 3)), "queue has d = 3, but query has d = 4"),
    "mismatched dtype": (lambda: sk.nt_xent(Z, Z.double()), "z1 is torch.float64, but z0 is torch.float32"),
    "no negative": (lambda: sk.info_nce(Z[:1], Z[:1]), "there is no negative"),
    "one sample": (lambda: sk.nt_xent(Z[:1], Z[:1]), "there is no negative"),
    "layer": (lambda: sk.Whitening(4)(torch.randn(6, 3)), "z has d = 3, but this layer has d = 4"),
    "layer momentum": (lambda: sk.Whitening(4, momentum=0.0), "momentum must be above 0"),
    "layer d": (lambda: sk.Whitening(0), "d must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call()


# more of them, and where it is told on a GPU: test_errors.py
NOT_FINITE: dict[str, Callable[[str], object]] = {
    "z whiten, few": lambda b: sk.whiten(BAD.repeat(1, 3), backend=b),
    "z error": lambda b: sk.effective_rank_error(BAD),
    "z coding rate": lambda b: sk.coding_rate(BAD, backend=b),
    "z coding rate, few": lambda b: sk.coding_rate(BAD.repeat(1, 3), backend=b),
    "z coding rate, one feature": lambda b: sk.coding_rate(BAD[:, 1:2], backend=b),
    "pool ranks": lambda b: sk.batch_effective_rank(BAD, torch.tensor([[0, 3], [1, 5]]), backend=b),
    "pool spectra": lambda b: sk.batch_effective_rank(BAD, torch.tensor([[0, 3]]), order=1, backend=b),
}


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
@pytest.mark.parametrize("name", NOT_FINITE)
def test_first_row_that_is_not_finite_is_named(name: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"{name.split()[0]} row 3 holds NaN or Inf"):
        NOT_FINITE[name](backend)


# what only a registered op sees, called by itself or under torch.compile, where the host does not look
GREEDY = {
    "start": {"start": torch.tensor([[6]])},
    "draws": {"draws": torch.full((1, 2, 3), -1)},
    "valid": {"valid": torch.tensor([[True, False, False, False, False, False]])},
}
SEED = torch.tensor([3])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("name", GREEDY)
def test_greedy_op_outside_the_pool(name: str, backend: str, objective: str) -> None:
    given = {"start": torch.tensor([[0]]), "draws": torch.tensor([[[1], [2]]]), "valid": None, **GREEDY[name]}
    call = overload("greedy_select")
    with pytest.raises(ValueError, match=f"^{name} "):
        call(Z[None], given["start"], given["draws"], given["valid"], SEED, 2, objective, True, backend)


def test_greedy_in_cpp_reads_only_the_rows_it_draws() -> None:
    draws = torch.tensor([[[1], [2]]])
    picks = overload("greedy_select")(BAD[None], draws[:, 0], draws, None, SEED, 2, "effective_rank", True, "cpp")[0]
    assert picks.tolist() == [[1, 2]]


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("name", ("batch_effective_rank2", "batch_spectrum"))
@pytest.mark.parametrize("index", (-1, 6))
def test_index_op_outside_the_pool(name: str, backend: str, index: int) -> None:
    with pytest.raises(ValueError, match=f"^indices .*{index}"):
        overload(name)(Z, torch.tensor([[0, index]]), False, True, backend)


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_checks_can_be_switched_off(backend: str) -> None:
    try:
        sk.set_checks(False)
        assert sk.covariance(BAD, backend=backend).isnan().any()
    finally:
        sk.set_checks(True)


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sk.BackendError, match="backend 'cuda' cannot run covariance: covariance has no cuda"):
        sk.covariance(Z, backend="cuda")
    monkeypatch.setattr("spectral_kernels.dispatch.backends._TRITON_INTERPRETS", False)
    with pytest.raises(sk.BackendError, match="TRITON_INTERPRET=1"), sk.use_backend("triton"):
        sk.covariance(Z)
    monkeypatch.setattr("spectral_kernels.dispatch.backends.CPP_ERROR", "the C++ library was not built")
    with pytest.raises(sk.BackendError, match="not built"):
        sk.covariance(Z, backend="cpp")
    assert sk.covariance(Z).shape == (4, 4)


def test_cuda_is_chosen_where_it_suits_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")

    def choose(fit: Fit, backend: str | None = None) -> str:
        return choose_backend("greedy_select", device, backend, cuda=lambda: fit)

    monkeypatch.setattr("spectral_kernels.dispatch.backends.CUDA_ERROR", "this torch is built for the CPU only")
    assert choose(Fit()) == "triton"
    with pytest.raises(sk.BackendError, match="built for the CPU only"):
        choose(Fit(), "cuda")
    monkeypatch.setattr("spectral_kernels.dispatch.backends.CUDA_ERROR", None)
    assert choose(Fit()) == "cuda"
    # where it is not the fastest it runs only on request, where it cannot run never
    assert choose(Fit(faster=False)) == "triton"
    assert choose(Fit(faster=False), "cuda") == "cuda"
    assert choose(Fit("the pool is too large")) == "triton"
    with pytest.raises(sk.BackendError, match="too large"):
        choose(Fit("the pool is too large"), "cuda")


@pytest.mark.parametrize("limit, most", ((99 * 1024, 96), (163 * 1024, 128), (227 * 1024, 128)))
def test_whitening_fits_the_shared_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch, limit: int, most: int) -> None:
    """99 KB on sm_86, sm_89 and sm_120: up to 96 features; more go to Triton, and cuda says why it cannot."""
    device = torch.device("cuda")
    monkeypatch.setattr("spectral_kernels.dispatch.backends.CUDA_ERROR", None)
    monkeypatch.setattr(whitening, "_shared_limit", lambda _: limit)

    def choose(d: int, backend: str | None = None) -> str:
        fit = whitening._cuda_fit(device, "cholesky", d)
        return choose_backend("whiten", device, backend, cuda=lambda: fit)

    for d in (1, 96, 97, 112, 128, 129):
        assert choose(d) == ("cuda" if d <= most else "triton")
    if most < 128:
        with pytest.raises(sk.BackendError, match=f"d = 97 takes 102152 bytes of shared memory, cuda has {limit}"):
            choose(97, "cuda")


def test_backends_nest() -> None:
    with pytest.raises(ValueError, match="'fast'"):
        sk.use_backend("fast")
    with sk.use_backend("reference"), sk.use_backend(None):
        assert sk.dispatch.backends.forced_backend() is None
    with sk.use_backend("cpp"):
        with sk.use_backend("reference"):
            assert sk.dispatch.backends.forced_backend() == "reference"
        assert sk.dispatch.backends.forced_backend() == "cpp"
        assert sk.dispatch.backends.forced_backend("triton") == "triton"
    assert sk.dispatch.backends.forced_backend() is None
