"""Equal rows, and rows that are unseen: none is favoured, on any backend, and equal seeds give equal picks."""

import pytest
import torch
from registry import BACKENDS, generator
from test_greedy import picks_alike
from test_greedy_emulation import check, inputs, seeds, select
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.dispatch import overload
from spectral_kernels.ops._selection import is_seen, row_keys


def excess(counts: Tensor) -> float:
    """Chi-square of counts that should be equal, in standard deviations above what chance gives."""
    expected, freedom = float(counts.sum()) / len(counts), len(counts) - 1
    return float(((counts.double() - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


# --- keys of rows -----------------------------------------------------------------------------------------------------


def random_keys(n: int, draws: int) -> Tensor:
    return row_keys(torch.arange(n), n, torch.randint(1 << 62, (draws, 1), generator=generator(n)))


@pytest.mark.parametrize("n", (1, 2, 3, 640, 1024, 1025, 5000, 100_000))
def test_keys_are_distinct_and_below_twice_the_rows(n: int) -> None:
    keys = random_keys(n, 3)
    assert all(len(row.unique()) == n for row in keys)
    assert int(keys.min()) >= 0 and int(keys.max()) < max(1024, 2 * n)


@pytest.mark.parametrize("n", (2, 3, 5, 64, 640, 1000, 1024))
def test_every_row_is_first_equally_often(n: int) -> None:
    assert excess(random_keys(n, 5000).argmin(1).bincount(minlength=n)) < 5


@pytest.mark.parametrize("n", (3, 5, 17, 64))
def test_the_second_row_says_nothing_of_the_first(n: int) -> None:
    first, second = random_keys(n, 20_000).topk(2, largest=False).indices.unbind(1)
    pairs = (first * n + second).bincount(minlength=n * n).view(n, n)[~torch.eye(n, dtype=torch.bool)]
    assert excess(pairs) < 5


def test_neighbours_in_a_large_pool_lie_as_far_apart_as_any_rows() -> None:
    n = 1000
    first, second = random_keys(n, 5000).topk(2, largest=False).indices.unbind(1)
    assert excess(((second - first) % n).bincount(minlength=n)[1:].view(27, 37).sum(1)) < 5
    # the number of places that an order moves its rows by
    order = random_keys(n, 20).argsort(1)
    assert float((order - torch.arange(n)).double().abs().mean()) == pytest.approx(n / 3, rel=0.03)


# --- shares -----------------------------------------------------------------------------------------------------------

POOLS = {
    "equal": lambda n, d: torch.ones(n, d),
    "copies": lambda n, d: torch.randn(3, d)[torch.randint(3, (n,))],
    "near copies": lambda n, d: torch.randn(3, d)[torch.randint(3, (n,))] * (1 + 1e-7 * torch.randn(n, 1)),
    "scaled copies": lambda n, d: torch.randn(3, d)[torch.randint(3, (n,))] * torch.logspace(-3, 3, n)[:, None],
    "collapsed but for some": lambda n, d: torch.where(torch.arange(n)[:, None] % 9 == 0, torch.randn(n, d), 1.0),
    "half equal": lambda n, d: torch.where(torch.arange(n)[:, None] < n // 2, torch.ones(d), torch.randn(n, d)),
    "half unseen": lambda n, d: torch.where(torch.arange(n)[:, None] < n // 2, 1e-14, 1.0) * torch.randn(n, d),
    "cold": lambda n, d: torch.zeros(n, d),
}


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("candidates", (None, 1, 8))
@pytest.mark.parametrize("kind", ("equal", "cold"))
def test_equal_rows_are_picked_equally_often(backend: str, candidates: int | None, kind: str) -> None:
    pool = POOLS[kind](40, 4)
    count = torch.zeros(40, dtype=torch.int64)
    for seed in range(120):
        chosen = sk.greedy_select(pool, 8, candidates=candidates, generator=generator(seed), backend=backend)
        count[chosen.indices] += 1
    # without replacement counts vary less than chi-square's
    assert excess(count) < 4


def test_a_collapsed_bank_is_sampled_evenly() -> None:
    for kind in ("equal", "collapsed but for some"):
        bank = sk.MemoryBank(640, 32)
        bank.update(torch.arange(640), POOLS[kind](640, 32))
        sampler, count = sk.GreedyBatchSampler(bank, 32), torch.zeros(640)
        for epoch in range(6):
            sampler.set_epoch(epoch)
            for batch in sampler:
                count[batch] += 1
        alike = count if kind == "equal" else count[torch.arange(640) % 9 != 0][:560]
        assert excess(alike) < 4, kind
        assert excess(torch.stack([tenth.sum() for tenth in alike.view(10, -1)])) < 4, kind


# --- the same picks everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("candidates", (None, 5, 40))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_cpp_picks_what_the_reference_picks(kind: str, candidates: int | None, dtype: torch.dtype) -> None:
    for n, masked in ((1, False), (2, True), (5, False), (123, True), (129, False)):
        valid = (torch.rand(n) < 0.8) | (torch.arange(n) == 0) if masked else torch.ones(n, dtype=torch.bool)
        for normalize in (True, False):
            picks = picks_alike(
                POOLS[kind](n, 6).to(dtype), int(valid.sum()), candidates=candidates, normalize=normalize,
                valid=valid if masked else None,
            )  # fmt: skip
            assert torch.equal(picks.unique(), valid.nonzero()[:, 0])


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("candidates", (None, 5))
def test_triton_picks_what_the_reference_picks(kind: str, candidates: int | None) -> None:
    pool = POOLS[kind](70, 6)
    for normalize in (True, False):
        picks_alike(pool, 20, "triton", candidates=candidates, normalize=normalize)


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("candidates", (None, 3, 40))
def test_the_chip_picks_what_the_reference_picks(kind: str, candidates: int | None) -> None:
    """By key; by place, the entries being draws, and being rows."""
    _, start, draws, valid, _ = inputs((1, 90, 6), torch.float32, 14, candidates, masked=True)
    pool = POOLS[kind](90, 6)[None]
    *_, by_draw, _ = check(pool, start, draws, valid, 14, multiprocessors=3)
    assert by_draw == (candidates == 3)
    check(pool, start, draws, None, 14, "effective_rank", False, multiprocessors=2)


def test_a_pool_of_more_rows_than_the_least_keys() -> None:
    pool = torch.ones(1, 1500, 2)
    pool[:, 5:] = 0
    check(pool, torch.tensor([[2]]), None, None, 12)
    found = [sk.greedy_select(pool[0], 12, generator=generator(), backend=backend).indices for backend in BACKENDS]
    assert all(torch.equal(part, found[0]) for part in found)
    assert sorted(found[0][:5].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_draw_wins(backend: str) -> None:
    """A row drawn twice stands where it was drawn first; what is taken is passed over."""
    pool = torch.ones(1, 20, 3)
    start, draws = torch.tensor([[4]]), torch.tensor([[[0, 0, 0], [7, 3, 7], [4, 9, 2], [19, 1, 9]]])
    arguments = (pool, start, draws, None, seeds(pool), 4, "effective_rank", True)
    assert overload("greedy_select")(*arguments, backend)[0].tolist() == [[4, 7, 9, 19]]
    for n in (20, 5):  # the entries are draws, or rows
        fewer = torch.ones(1, n, 3)
        few = torch.tensor([[[0] * 4, [3, 2, 3, 1], [4, 1, 2, 1], [2, 0, 2, 0]]])
        (indices, *_), plan = select(fewer, start, few, None, 4)
        assert plan[2] == (n == 20)
        assert indices.tolist() == [[4, 3, 1, 2]]


def test_any_number_of_threads() -> None:
    pool, before = POOLS["copies"](2000, 16), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(sk.greedy_select(pool, 300, candidates=None, generator=generator(), backend="cpp").indices)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


# --- unseen rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", (None, 4))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_rows_up_to_the_floor_come_last_and_then_count(
    backend: str, candidates: int | None, dtype: torch.dtype
) -> None:
    pool = torch.nn.functional.normalize(torch.randn(30, 5, dtype=dtype))
    lengths = (1e-14, 0.9e-12, 0, 1e-20, 1e-30, 1e-38, 1e-13, 0, 1e-12 / 3, 1e-16)
    pool[:10] *= torch.tensor(lengths, dtype=dtype)[:, None]
    pool[10] *= 1.1e-12
    assert is_seen(pool).nonzero()[:, 0].tolist() == list(range(10, 30))
    chosen = sk.greedy_select(pool, 30, candidates=candidates, generator=generator(1), backend=backend)
    assert sorted(chosen.indices[20:].tolist()) == list(range(10))
    for picks in range(1, 31):
        exact = sk.effective_rank(pool[chosen.indices[:picks]].double(), order=2, backend="reference")
        assert float(chosen.effective_rank[picks - 1]) == pytest.approx(float(exact), rel=1e-5)
    # as they are, only zero rows are unseen
    chosen = sk.greedy_select(pool, 30, candidates=candidates, normalize=False, generator=generator(1), backend=backend)
    assert sorted(chosen.indices[28:].tolist()) == [2, 7]
    cold = sk.greedy_select(torch.zeros(5, 3), 5, backend=backend)
    assert sorted(cold.indices.tolist()) == [0, 1, 2, 3, 4] and cold.effective_rank.tolist() == [0] * 5


@pytest.mark.parametrize("cold", (False, True))
def test_a_start_that_is_unseen_is_passed_over(cold: bool) -> None:
    pool = 1e-14 * torch.randn(12, 4)
    if not cold:
        pool[8] = 1
    firsts = {int(sk.greedy_select(pool, 1, start=3, generator=generator(seed)).indices[0]) for seed in range(40)}
    assert len(firsts) > 8 if cold else firsts == {8}


@pytest.mark.parametrize("backend", ("cpp", "reference"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_bank_and_greedy_agree_on_what_is_unseen(backend: str, dtype: torch.dtype) -> None:
    scales = torch.tensor([0, 1e-38, 1e-20, 1e-14, 0.9e-12, 1.1e-12, 1e-8, 1, 1e8, 1e20, 1e37])
    z = (torch.nn.functional.normalize(torch.randn(11, 8)) * scales[:, None]).to(dtype)
    bank = sk.MemoryBank(11, 8, dtype=dtype)
    with sk.use_backend(backend):
        bank.update(torch.arange(11), z)
        chosen = sk.greedy_select(z, 11, candidates=None, generator=generator())
    assert bank.seen.tolist() == [False] * 5 + [True] * 6 == is_seen(z).tolist()
    assert bank.num_seen == 6
    assert sorted(chosen.indices[6:].tolist()) == [0, 1, 2, 3, 4]
    lengths = bank.embeddings.double().norm(dim=1)
    torch.testing.assert_close(lengths, bank.seen.double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
