"""States that no sampler or bank has written: one ValueError that names the entry, and nothing is loaded."""

from typing import Any

import pytest
import torch
from sampler_helpers import KINDS, D, make, warm_bank
from torch import Tensor

from spectral_kernels.selection import MemoryBank

N, BATCH = 24, 4


def filled() -> MemoryBank:
    bank = warm_bank(N)
    bank.update(torch.tensor([3]), torch.zeros(1, D))
    bank.retire(torch.tensor([0, 5]))
    return bank


def sampler_of(kind: str) -> Any:
    """Of one rank or of two, of a bank or of all rows."""
    if kind == "random":
        return make(kind, N, BATCH)
    if kind in ("random of a bank", "greedy"):
        return make(kind, filled(), BATCH, num_replicas=2, rank=1, min_seen=0.5)
    return make(kind, filled(), BATCH, drop_last=kind != "greedy partition")


IDENTITY = ("kind", "n", "batch_size", "drop_last", "replacement", "seed", "num_replicas", "rank")
ENTRIES = (*IDENTITY, "epoch", "batch", "active", "taken", "order", "visited")

NAN, HUGE = float("nan"), 2**63
ANY = ["1", [], [0, 1], list(range(100_000)), {"epoch": {"n": 1}}, object()]
ANY += [1.5, NAN, -1, -HUGE, HUGE, 2**200, True, 1 + 1j]
ANY += [torch.tensor(value) for value in (1.0, NAN, True, 1 + 1j, [1, 1])]
ANY += [torch.tensor(1, device="meta"), torch.ones(N, 1), torch.ones(N, requires_grad=True), torch.ones(0)]


def hostile(value: Any) -> list[Any]:
    """What does not belong where `value` does."""
    if isinstance(value, Tensor):
        forms = [value.to_sparse(), value.to("meta"), value.to(torch.complex64), value.tolist()]
        forms += [value[None], value[..., None], torch.cat((value, value)), value[:0], None]
        forms += [value.half(), value.half().requires_grad_()]
        # rows named twice, and rows out of range
        forms += [value[:1].expand(len(value)), value + N, -1 - value] if value.dtype == torch.int64 else []
        return ANY + [form for form in forms if not (isinstance(form, Tensor) and identical(form, value))]
    if isinstance(value, bool):
        return [*ANY[:-4], None, not value, int(value), float(value), torch.tensor(value)]
    return [*ANY, None, *([float(value), str(value)] if isinstance(value, int) else [])]


def identical(one: Tensor, other: Tensor) -> bool:
    plain = one.device.type != "meta" and one.layout == torch.strided and one.dtype == other.dtype
    return plain and not one.requires_grad and one.shape == other.shape and torch.equal(one, other)


def allowed(name: str, value: Any, own: Any) -> bool:
    """What is hostile elsewhere and belongs here."""
    if name == "epoch":
        return type(value) is int and value >= 0
    if name == "order":
        # made anew, as after batches of a cold bank
        return isinstance(value, Tensor) and identical(value, torch.empty(0, dtype=torch.int64))
    if name == "active" and own is None:
        return value is None
    return type(value) is type(own) and not isinstance(value, Tensor) and value == own


def held(sampler: Any) -> list[Any]:
    """All that a sampler holds, less what its shard remembers."""
    own = {name: value for name, value in vars(sampler.sampler).items() if name != "_rows"}
    return [*vars(sampler).values(), *own.values(), *vars(sampler._progress).values()]


def refused(sampler: Any, state: Any, message: str) -> None:
    before, visited = held(sampler), sampler.visited.clone()
    with pytest.raises(ValueError, match=message) as error:
        sampler.load_state_dict(state)
    assert len(str(error.value)) < 500, "however large the entry"
    after = held(sampler)
    assert len(after) == len(before) and all(one is other for one, other in zip(after, before, strict=True))
    assert torch.equal(sampler.visited, visited)


def halfway(kind: str) -> tuple[Any, Any]:
    sampler = sampler_of(kind)
    sampler.set_epoch(3)
    batches = iter(sampler)
    next(batches), next(batches)
    return sampler, batches


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("kind", (*KINDS, "random of a bank"))
def test_entries_of_a_sampler(kind: str, name: str) -> None:
    sampler, batches = halfway(kind)
    state = sampler.state_dict()
    assert set(state) == set(ENTRIES)
    other, _ = halfway(kind)
    for value in hostile(state[name]):
        if not allowed(name, value, state[name]):
            refused(other, {**state, name: value}, rf"^{name} of the state")
    rest = {key: state[key] for key in state if key != name}
    refused(other, rest, f"^the state of the batch sampler lacks {name}$")
    fresh = sampler_of(kind)
    refused(fresh, {**state, name: object()}, rf"^{name} of the state")
    assert list(fresh) == list(sampler_of(kind)), "it begins as if nothing had been tried"
    other.load_state_dict(state)
    assert list(other) == list(batches)


@pytest.mark.parametrize("state", (None, "state", 3, [], list(ENTRIES), torch.ones(3), NAN), ids=str)
def test_what_is_no_state(state: Any) -> None:
    sampler, _ = halfway("greedy partition")
    refused(sampler, state, "^the state of the batch sampler must be a dict")
    with pytest.raises(ValueError, match=r"^the state of the memory bank must be a dict"):
        filled().load_state_dict(state)


def test_rows_that_do_not_belong_together() -> None:
    sampler, _ = halfway("greedy partition")
    state = sampler.state_dict()
    taken, order, active = state["taken"], state["order"], state["active"]
    assert len(taken) == 8 and len(order) > 8
    retired, none, few = taken.clone(), torch.zeros(N, dtype=torch.bool), torch.arange(N) < BATCH - 1
    retired[3] = 5
    for change, message in (
        ({"taken": retired}, "^taken of the state must name rows of the shard that were left, each once"),
        ({"taken": taken[[0, 1, 2, 3, 4, 5, 6, 6]]}, "^taken of the state must name rows"),
        ({"order": torch.cat((order[1:], taken[:1]))}, "^order of the state must name rows"),
        ({"order": torch.cat((order[1:], order[1:2]))}, "^order of the state must name rows"),
        ({"order": torch.cat((order[1:], torch.tensor([5])))}, "^order of the state must name rows"),
        ({"order": -1 - order}, r"^order of the state must lie in \[0, 24\), got -"),
        ({"order": torch.cat((order, order))}, "^order of the state must be at most 14 rows"),
        ({"active": none}, "^active of the state leaves a rank fewer rows than batch_size = 4"),
        ({"active": few}, "^active of the state leaves a rank fewer rows than batch_size = 4"),
        ({"active": None}, "^active of the state must be a bool for each of 24 rows, got None"),
        ({"active": active & (torch.arange(N) < 12)}, "^(taken|order) of the state"),
        ({"batch": 7}, "^batch of the state must be between 0 and 6, got 7"),
        ({"batch": 3}, "^taken of the state must be 12 rows"),
        ({"batch": 0}, "^taken of the state must be 0 rows"),
        ({"batch": 0, "taken": taken[:0]}, "^order of the state must be 0 rows"),
        ({"batch": 0, "taken": taken[:0], "active": None}, "^order of the state must be 0 rows"),
    ):
        refused(sampler, {**state, **change}, message)
    alone, _ = halfway("random")
    for change, message in (
        ({"active": ~none}, "^active of the state must be None without a bank, got torch.bool"),
        ({"batch": 7}, "^batch of the state must be between 0 and 6, got 7"),
        ({"n": 23}, "^n of the state is 23, but this batch sampler has 24$"),
    ):
        refused(alone, {**alone.state_dict(), **change}, message)
    sampler.load_state_dict({**state, "order": order[:0]})


@pytest.mark.parametrize("name", ("embeddings", "updated", "active", "step"))
def test_entries_of_a_bank(name: str) -> None:
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in filled().state_dict().items()}
    assert state["step"] == 2
    wrong = hostile(state[name])
    if name == "step":  # a later one is as good
        wrong = [value for value in wrong if type(value) is not int or not 2 < value < HUGE]
    if name == "embeddings":
        rows = [state[name].clone() for _ in range(4)]
        rows[0][7], rows[1][7, 1], rows[2][3], rows[3][7] = NAN, float("inf"), 1.0, 0.0  # 3 is unseen, 7 is not
        wrong += [*rows, state[name].clone().requires_grad_()]
    if name == "updated":  # at steps that have not been
        seen = state[name] >= 0
        wrong += [torch.where(seen, 2, -1), torch.where(seen, state[name], -2)]
    if name == "active":
        wrong += [torch.zeros(N, dtype=torch.bool), state[name] & (torch.arange(N) != 7)]
    bank = filled()
    before = list(vars(bank).values())
    tensors = {key: value.clone() for key, value in vars(bank).items() if hasattr(value, "clone")}
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{name} of the state|whose {name} is") as error:
            bank.load_state_dict({**state, name: value})
        assert len(str(error.value)) < 500
        assert all(one is other for one, other in zip(vars(bank).values(), before, strict=True))
        assert all(torch.equal(vars(bank)[key], value) for key, value in tensors.items())
    with pytest.raises(ValueError, match=f"^the state of the memory bank lacks {name}$"):
        bank.load_state_dict({key: state[key] for key in state if key != name})
    bank.load_state_dict(state)
    assert not bank.embeddings.requires_grad
