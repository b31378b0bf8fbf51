"""MemoryBank: what is stored, how it ages, what it refuses, and that its cost does not grow with n."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_helpers import through_a_file
from torch.nn.functional import normalize

import spectral_kernels as sk
from spectral_kernels.selection import MemoryBank


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True, scope="module", params=["cpp", "reference"])
def backend(request):
    """Every test runs on the C++ path and on torch's."""
    with sk.use_backend(request.param):
        yield request.param


def filled(n: int = 12, d: int = 5, **options) -> MemoryBank:
    bank = MemoryBank(n, d, **options)
    bank.update(torch.arange(n), rows(n, d))
    return bank


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=6))
def test_update_agrees_with_a_dictionary(batches):
    """Duplicates included: the later row wins."""
    bank, model = MemoryBank(10, 3, dtype=torch.float64), {}
    for step, indices in enumerate(batches):
        z = rows(len(indices), 3, seed=step, dtype=torch.float64)
        if step % 2:
            z[0] = 0.0
        bank.update(torch.tensor(indices), z)
        for index, row in zip(indices, z, strict=True):
            model[index] = (step, normalize(row, dim=0)) if row.any() else None
    known = {index: entry for index, entry in model.items() if entry is not None}
    expected = torch.zeros(10, 3, dtype=torch.float64)
    age = torch.full((10,), -1)
    for index, (step, row) in known.items():
        expected[index], age[index] = row, len(batches) - 1 - step
    torch.testing.assert_close(bank.embeddings, expected, rtol=0, atol=1e-15)
    assert bank.age.tolist() == age.tolist()
    assert bank.seen.tolist() == (age >= 0).tolist()
    assert bank.num_seen == len(known) == int(bank.seen.sum())
    staleness = bank.staleness()
    ages = [len(batches) - 1 - step for step, _ in known.values()]
    assert staleness.seen == len(known) / 10
    assert staleness.max_age == max(ages, default=0)
    assert staleness.mean_age == pytest.approx(sum(ages) / len(ages) if ages else 0.0)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(stored, given_dtype):
    """Normalised in full precision before the cast: a row whose norm overflows fp16 included."""
    bank = MemoryBank(6, 4, dtype=stored)
    z = (rows(3, 4).tanh() * 60_000).to(given_dtype)
    bank.update(torch.tensor([5, 0, 2]), z)
    assert bank.embeddings.dtype == stored
    expected = normalize(z.double(), dim=1)
    eps = max(torch.finfo(stored).eps, 1e-7 if given_dtype != torch.float64 else 0.0)
    torch.testing.assert_close(bank.gather(torch.tensor([5, 0, 2])).double(), expected, rtol=eps, atol=eps)


def test_non_contiguous_rows_and_strided_indices():
    bank = MemoryBank(8, 4)
    z = rows(4, 10).t()[::2][:, :4]
    indices = torch.arange(10)[::2]
    assert not z.is_contiguous()
    assert not indices.is_contiguous()
    bank.update(indices[:4], z[:4])
    torch.testing.assert_close(bank.gather(torch.tensor([0, 2, 4, 6])), normalize(z[:4], dim=1))
    assert bank.num_seen == 4


def test_update_detaches_and_gather_copies():
    bank = MemoryBank(3, 2)
    z = rows(3, 2).requires_grad_()
    bank.update(torch.arange(3), z * 2)
    assert not bank.embeddings.requires_grad
    before = bank.embeddings.clone()
    bank.gather(torch.tensor([0, 1])).zero_()
    assert torch.equal(bank.embeddings, before)
    with torch.inference_mode():
        bank.update(torch.tensor([0]), torch.ones(1, 2))
    bank.update(torch.tensor([0]), torch.ones(1, 2))


def test_reset_and_length():
    bank = filled()
    assert (len(bank), bank.n, bank.d, bank.step) == (12, 12, 5, 1)
    assert "seen=12" in repr(bank)
    bank.reset()
    assert not bank.embeddings.any()
    assert (bank.num_seen, bank.step, bank.staleness().seen) == (0, 0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_through_a_file(dtype):
    bank = filled(dtype=dtype)
    bank.update(torch.tensor([1, 7]), rows(2, 5, seed=1))
    other = MemoryBank(12, 5, dtype=dtype)
    other.load_state_dict(through_a_file(bank.state_dict()))
    assert torch.equal(other.embeddings, bank.embeddings)
    assert other.age.tolist() == bank.age.tolist()
    assert (other.step, other.num_seen) == (2, 12)
    # a copy: what the one learns later the other does not
    other.update(torch.tensor([0]), torch.ones(1, 5))
    assert not torch.equal(other.embeddings[0], bank.embeddings[0])
    assert other.to("cpu") is other


def as_dlpack(z: torch.Tensor) -> object:
    """What knows the protocol, and nothing else of a tensor."""
    return type("Exported", (), {"__dlpack__": z.__dlpack__, "__dlpack_device__": z.__dlpack_device__})()


@pytest.mark.parametrize("given_as", [torch.Tensor.clone, torch.Tensor.numpy, as_dlpack])
def test_from_embeddings(given_as):
    z = rows(12, 5, dtype=torch.float64) * 3
    z[4] = 0
    before = z.clone()
    bank, known = MemoryBank.from_embeddings(given_as(z)), filled(dtype=torch.float64)
    known.update(torch.arange(12), z)
    assert torch.equal(bank.embeddings, known.embeddings) and torch.equal(z, before)
    assert (bank.num_seen, bank.seen[4].item(), bank.step) == (11, False, 1)
    bank.update(torch.tensor([4]), torch.ones(1, 5))  # and follows a model from there
    assert bank.num_seen == 12 and torch.equal(z, before)
    half = MemoryBank.from_embeddings(given_as(z), dtype=torch.bfloat16, device="cpu")
    assert half.embeddings.dtype == torch.bfloat16 and half.device.type == "cpu"
    torch.testing.assert_close(half.embeddings.double(), known.embeddings, rtol=2**-8, atol=0)


def bad_row(value: float) -> torch.Tensor:
    z = torch.ones(3, 5)
    z[1, 2] = value
    return z


@pytest.mark.parametrize(
    ("indices", "z", "message"),
    [
        (torch.arange(3), torch.ones(3, 4), "z has d = 4, but the bank has d = 5"),
        (torch.arange(2), torch.ones(3, 5), "indices has 2 entries, but z has 3 rows"),
        (torch.tensor([0, 12, 1]), torch.ones(3, 5), r"indices must lie in \[0, 12\), got 12"),
        (torch.tensor([0, -1, 1]), torch.ones(3, 5), r"indices must lie in \[0, 12\), got -1"),
        (torch.arange(3).float(), torch.ones(3, 5), "indices must be whole numbers, got torch.float32"),
        ("012", torch.ones(3, 5), "indices must be whole numbers of one shape, got str"),
        (torch.zeros(0, dtype=torch.int64), torch.ones(0, 5), "z is empty"),
        (torch.arange(3)[None], torch.ones(3, 5), "indices must be non-empty with 1 dimensions"),
        (torch.arange(3), torch.ones(5), "z must have 2 dimensions"),
        (torch.arange(3), torch.ones(3, 5, dtype=torch.int64), "z must be float64"),
        (torch.arange(3), bad_row(float("nan")), "z row 1 holds NaN or Inf"),
        (torch.arange(3), bad_row(float("-inf")), "z row 1 holds NaN or Inf"),
    ],
)
def test_update_refuses(indices, z, message):
    bank = filled()
    before = bank.embeddings.clone()
    with pytest.raises(ValueError, match=message):
        bank.update(indices, z)
    assert torch.equal(bank.embeddings, before)
    assert bank.step == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryBank(0, 3), "n must be at least 1, got 0"),
        (lambda: MemoryBank(3, 0), "d must be at least 1, got 0"),
        (lambda: MemoryBank(3.0, 3), "n must be an integer, got 3.0"),
        (lambda: MemoryBank(3, 3, dtype=torch.int64), r"dtype must be float64.*got torch\.int64"),
        (lambda: MemoryBank.from_embeddings(bad_row(float("nan")).numpy()), "z row 1 holds NaN or Inf"),
        (lambda: MemoryBank.from_embeddings(torch.ones(3)), "z must have 2 dimensions"),
        (lambda: filled().gather(torch.tensor([-1])), r"indices must lie in \[0, 12\), got -1"),
    ],
)
def test_other_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_checks_can_be_turned_off():
    bank = filled()
    sk.set_checks(False)
    try:
        bank.update(torch.arange(3), bad_row(float("nan")))
    finally:
        sk.set_checks(True)
    assert bank.embeddings[1].isnan().any()


def test_an_update_is_heard_of_by_autograd():
    bank = filled()
    weight = torch.ones(12, 5, requires_grad=True)
    loss = (weight * bank.embeddings).sum()
    bank.update(torch.arange(3), rows(3, 5, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cost_does_not_grow_with_n():
    """A pass over the big bank would take hundreds of times as long as a batch does."""

    def seconds(bank: MemoryBank) -> float:
        indices, z = torch.randint(bank.n, (64,), generator=torch.Generator().manual_seed(0)), rows(64, 32)
        best = float("inf")
        for _ in range(20):
            # of this thread alone: others may be busy
            began = time.thread_time()
            bank.update(indices, z)
            bank.gather(indices)
            _ = bank.num_seen
            best = min(best, time.thread_time() - began)
        return best

    assert seconds(MemoryBank(500_000, 32)) < 10 * seconds(MemoryBank(200, 32)) + 1e-3
