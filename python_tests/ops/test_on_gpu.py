"""What only a GPU can show: large sizes, repeats beside another stream, graphs, offsets beyond 2³¹, bad data."""

import math

import pytest
import torch
from registry import CASES, DEVICE, Case
from test_registry import compare, outputs, rows, to_device
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.dispatch import op

pytestmark = pytest.mark.gpu

ON_GPU = ("triton", "cuda")
# the ops of one case each: options were compared at small sizes
ONE_EACH = list({case.op: case for case in CASES}.values())
WHITENING = [case for case in CASES if "whiten" in case.op and "cholesky" in case.label]


def large(case: Case) -> bool:
    """Whether float64 on the CPU has the case at thousands of rows in a second or so."""
    return not any(part in case.op for part in ("info_nce", "nt_xent", "spectrum"))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_large(case: Case, backend: str, dtype: torch.dtype) -> None:
    if case.exact and dtype != torch.float32:
        return
    for shape in ((1, 3000, 128), (3, 1029, 300)) if large(case) else ((1, 700, 128), (3, 259, 300)):
        compare(case, backend, rows(shape, dtype, "plain"))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_same_bits_again_beside_a_busy_stream(case: Case, backend: str) -> None:
    z = rows((2, 777, 96), torch.float32, "plain")
    if not case.runs_on(backend, 96):
        return
    with torch.device("cpu"):
        arguments = [to_device(part) for part in case.arguments(z)]
    first = [part.clone() for part in outputs(op(case.op)(*arguments, backend))]
    side = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device=DEVICE)
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for repeat in range(200):
        if repeat % 4 == 0:
            with torch.cuda.stream(side):
                torch.mm(noise, noise)
        for one, again in zip(first, outputs(op(case.op)(*arguments, backend)), strict=True):
            different += (one.nan_to_num() != again.nan_to_num()).sum()
    assert int(different) == 0


def uses_eigh(case: Case, backend: str) -> bool:
    """Whether torch's eigenvalues or vectors are in the op, which no graph can hold."""
    spectral = "spectrum" in case.op and (backend == "triton" or "backward" in case.op)
    return spectral or ("whiten" in case.op and "cholesky" not in case.label)


@pytest.mark.parametrize("case", ONE_EACH + WHITENING, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_graph_replays(case: Case, backend: str) -> None:
    """Fresh values in the captured tensors; results those of a call that is not captured."""
    if not case.runs_on(backend, 96) or uses_eigh(case, backend):
        return
    with torch.device("cpu"):
        arguments = [to_device(part) for part in case.arguments(rows((1, 321, 96), torch.float32, "plain"))]
        fresh = [to_device(part) for part in case.arguments(rows((1, 321, 96), torch.float32, "plain"))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(case.op)(*arguments, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(op(case.op)(*arguments, backend))
    for old, new in zip(arguments, fresh, strict=True):
        if isinstance(old, Tensor) and old.is_floating_point():
            old.copy_(new)
    expected = outputs(op(case.op)(*arguments, backend))
    for _ in range(100):
        graph.replay()
    for one, two in zip(captured, expected, strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())


def test_offsets_beyond_31_bits() -> None:
    n, d = 2**24 + 2**21, 128
    pool = torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16)
    last = torch.arange(n - 512, n, device=DEVICE).view(2, 256)
    assert pool.numel() > 2**31
    found = sk.batch_effective_rank(pool, last, backend="triton")
    torch.testing.assert_close(found, sk.effective_rank(pool[last], order=2, backend="reference"), rtol=1e-3, atol=0)
    valid = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    valid[-300:] = True
    picks = sk.greedy_select(pool, 64, candidates=16, valid=valid, backend="triton").indices
    assert int(picks.min()) >= n - 300 and picks.unique().numel() == 64
    moment = sk.covariance(pool, normalize=True, center=False, backend="triton")
    assert math.isclose(float(moment.trace()), 1.0, rel_tol=1e-3)


def test_second_stream_first_use() -> None:
    """Counters and workspaces belong to a stream."""
    z = torch.randn(5000, 64, device=DEVICE)
    expected = sk.covariance(z), sk.effective_rank(z, order=2)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append((sk.covariance(z), sk.effective_rank(z, order=2)))
    torch.cuda.synchronize()
    assert all(torch.equal(one, two) for pair in found for one, two in zip(pair, expected, strict=True))


def test_compiled_and_under_cudagraph_trees() -> None:
    z = torch.randn(2000, 64, device=DEVICE)
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        call = torch.compile(lambda rows: sk.effective_rank(rows, order=2) + sk.covariance(rows).sum(), mode=mode)
        for _ in range(6):
            rows_now = torch.randn_like(z)
            expected = sk.effective_rank(rows_now, order=2) + sk.covariance(rows_now).sum()
            torch.testing.assert_close(call(rows_now), expected)
    # after trees have come and gone the counters are still zero
    assert torch.equal(sk.covariance(z), sk.covariance(z))
    torch.testing.assert_close(sk.covariance(z), sk.covariance(z, backend="reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", (None, *ON_GPU))
@pytest.mark.parametrize("objective", ("effective_rank", "logdet"))
@pytest.mark.parametrize("candidates", (None, 64))
@pytest.mark.parametrize("n", (4096, 6000))
def test_greedy_at_real_size(n: int, candidates: int | None, objective: str, backend: str | None) -> None:
    scale = torch.logspace(0, -1.5, 128, device=DEVICE)
    pool = torch.randn(n, 128, device=DEVICE) * scale
    options = {"candidates": candidates, "objective": objective, "start": 5}
    chosen, exact = (
        sk.greedy_select(pool, 256, generator=torch.Generator(DEVICE).manual_seed(1), backend=each, **options)
        for each in (backend, "reference")
    )
    assert chosen.indices.unique().numel() == 256
    if objective == "effective_rank":
        assert torch.equal(chosen.indices, exact.indices)
    torch.testing.assert_close(chosen.objective[-1], exact.objective[-1], rtol=1e-4, atol=0)


def test_peak_memory_of_a_loss() -> None:
    """O(B·d): a matrix (B, B) of float32 would be 17 GB."""
    b, d = 65536, 128
    query, key = (torch.randn(b, d, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sk.info_nce(query, key).backward()
    assert (torch.cuda.max_memory_allocated() - before) / (4 * b * d) <= 12


def test_bad_rows_are_told_at_the_next_call() -> None:
    """Without a wait of its own: docs of `check`."""
    good = torch.randn(5000, 64, device=DEVICE)
    for d, call in ((64, sk.covariance), (300, sk.covariance), (64, lambda z: sk.nt_xent(z, good)),
                    (64, lambda z: sk.greedy_select(z, 8).indices)):  # fmt: skip
        bad = torch.randn(5000, d, device=DEVICE)
        bad[17, 3] = math.nan
        call(bad)
        with pytest.raises(ValueError, match="row 17 holds NaN or Inf"):
            sk.check()
        call(bad)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="row 17 holds NaN or Inf"):
            sk.covariance(good)
    sk.covariance(good)
    sk.check()


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_mask_of_too_few_rows(backend: str) -> None:
    pool, valid = torch.randn(5000, 64, device=DEVICE), torch.zeros(5000, dtype=torch.bool, device=DEVICE)
    valid[100:103] = True
    indices = sk.greedy_select(pool, 8, candidates=None, valid=valid, backend=backend).indices
    assert sorted(indices[:3].tolist()) == [100, 101, 102] and indices[3:].tolist() == [-1] * 5
    with pytest.raises(ValueError, match="valid batch 0 leaves fewer rows"):
        sk.check()
