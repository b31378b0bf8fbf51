"""Samplers that resume while the bank changes: in random streams the resumed one goes on beside the uninterrupted one."""

import math
import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_helpers import KINDS, PARTITIONS, D, make, through_a_file, warm_bank
from torch import Tensor

from spectral_kernels.selection import MemoryBank
from spectral_kernels.selection.sharding import derived_generator

STREAMS = 5  # of an example: the long form runs 5,000


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        assert type(value) is type(other[name]) and same, name


def change(bank: MemoryBank, event: tuple[str, Any]) -> None:
    what, arguments = event
    getattr(bank, what)(*arguments)


class Twin:
    """A sampler, its bank and its iteration."""

    def __init__(self, kind: str, n: int, follows: bool, options: dict[str, Any]) -> None:
        self.bank = MemoryBank(n, D)
        self.sampler = make(kind, self.bank if follows else n, **options)
        self.iterator: Any = None
        self.entered = True  # False from a load to the first batch

    def next(self) -> list[int] | str | None:
        """A batch, None at the end of an epoch, or what the error says."""
        self.iterator = self.iterator or iter(self.sampler)
        self.entered = True
        try:
            return next(self.iterator)
        except StopIteration:
            self.iterator = None
            return None
        except ValueError as error:
            self.iterator = None
            return str(error)


class Stream:
    """One random stream; `twins` resumed from the states of `main`, which is never interrupted, and go on beside it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        self.kind, self.n, self.ranks = pick(KINDS), self.random.randint(4, 60), self.random.randint(1, 3)
        self.generator = torch.Generator().manual_seed(seed)
        self.drop_last, self.seed = pick((True, False)), seed % 5
        self.size = self.random.randint(1, max(1, self.n // self.ranks // pick((1, 2, 4))))
        self.options: dict[str, Any] = {"batch_size": self.size, "drop_last": self.drop_last, "seed": self.seed}
        self.options |= {"num_replicas": self.ranks, "rank": self.random.randrange(self.ranks)}
        self.partition = self.kind in PARTITIONS
        self.selects = self.kind.startswith(("pool", "greedy"))
        if self.selects:
            self.options |= {"min_seen": pick((0.0, 0.3, 0.9))}
        if self.kind.startswith("pool"):
            self.options |= {"window": pick((None, None, (1.2, 2.0)))}
        if self.kind.startswith(("greedy", "live")):
            self.options |= {"candidates": pick((None, 2, 5)), "objective": pick(("effective_rank", "logdet"))}
        self.follows = self.selects or pick((True, False))  # the rows of a bank
        self.main = self.twin()
        self.twins: list[Twin] = []
        self.visited: set[int] = set()
        self.shard: list[int] = []
        self.batches: list[list[int]] = []
        self.log: list[tuple[str, Any]] = []  # of the running epoch
        # after each number of batches: place in the log, the bank, the rows visited
        self.marks: list[tuple[int, dict[str, Any], set[int]]] = []

    def twin(self) -> Twin:
        return Twin(self.kind, self.n, self.follows, self.options)

    def run(self, steps: int) -> None:
        if self.random.random() < 0.8:
            self.change(("update", (torch.arange(self.n), torch.randn(self.n, D, generator=self.generator))))
        for _ in range(steps):
            what = self.random.choices(
                ("next", "update", "retire", "admit", "reset", "coverage", "set_epoch", "save"),
                (12, 3, 1, 1, 0.2, 0.2, 0.4, 2),
            )[0]
            if what == "next":
                self.next()
            elif what == "coverage":
                self.forget()
            elif what == "set_epoch":
                self.set_epoch()
            elif what == "save":
                self.save()
            else:
                self.change((what, self.arguments(what)))
            self.look()

    def arguments(self, what: str) -> tuple[Tensor, ...]:
        if what == "reset":
            return ()
        count = self.random.randint(1, max(1, self.n // self.random.choice((1, 2, 8))))
        rows = torch.tensor([self.random.randrange(self.n) for _ in range(count)])
        if what == "retire":
            keeps = self.random.choice(self.main.bank.active.nonzero()[:, 0].tolist())
            rows = torch.cat(
                (rows[rows != keeps], rows[:0] if bool((rows != keeps).any()) else (rows[:1] + 1) % self.n)
            )
        if what != "update":
            return (rows,)
        # small whole numbers: equal rows, and zero ones, which are forgotten
        return rows, torch.randint(-1, 2, (count, D), generator=self.generator).float()

    def change(self, event: tuple[str, Any]) -> None:
        for twin in (self.main, *self.twins):
            change(twin.bank, event)
        self.log.append(event)

    def forget(self) -> None:
        for twin in (self.main, *self.twins):
            twin.sampler.reset_coverage()
        self.visited.clear()
        self.marks = [(place, bank, set()) for place, bank, _ in self.marks]
        self.log.append(("reset_coverage", None))

    def set_epoch(self) -> None:
        """Ends the running epoch; one that was loaded and has not gone on keeps its place, and is not set again."""
        now = self.main.sampler.epoch
        epoch = now + self.random.randint(all(twin.entered for twin in self.twins) ^ 1, 2)
        for twin in (self.main, *self.twins):
            twin.sampler.set_epoch(epoch)
            twin.iterator, twin.entered = None, True
        self.marks = []

    def deal(self) -> list[int]:
        active = self.main.bank.active.tolist() if self.follows else [True] * self.n
        order = torch.randperm(self.n, generator=derived_generator(self.seed, self.main.sampler.epoch)).tolist()
        order = [row for row in order if active[row]]
        size = self.share(len(order), self.ranks)
        return [order[(p * self.ranks + self.options["rank"]) % len(order)] for p in range(size)]

    def share(self, rows: int, parts: int) -> int:
        return rows // parts if self.drop_last else -(-rows // parts)

    def next(self) -> None:
        begins = self.main.iterator is None
        batch = self.main.next()
        for twin in self.twins:
            assert twin.next() == batch
            if isinstance(batch, list):
                one, other = twin.sampler.last_selection, self.main.sampler.last_selection
                assert (one is None) == (other is None) and (one is None or torch.equal(one.indices, other.indices))
        if isinstance(batch, str):
            shard = self.share(self.main.bank.num_active, self.ranks)
            assert begins and batch == f"batch_size = {self.size} exceeds the {shard} rows of a rank's shard"
            return
        if begins:
            self.shard, self.batches, self.log = self.deal(), [], []
            self.marks = []
            if batch is not None:
                # the bank has not changed since the epoch began
                self.mark()
        if batch is None:
            self.ended()
            return
        self.log.append(("batch", batch))
        self.batches.append(batch)
        self.visited.update(batch)
        self.mark()
        left = len(self.shard) - self.size * (len(self.batches) - 1)
        assert len(batch) == (min(self.size, left) if self.partition else self.size)
        assert len(set(batch)) == len(batch) and set(batch) <= set(self.shard)
        if self.selects:
            seen = self.main.bank.seen
            cold = int(seen[self.shard].sum()) < max(self.size, math.ceil(self.options["min_seen"] * len(self.shard)))
            random_rows = self.main.sampler.last_selection is None
            assert random_rows if cold else not random_rows or not bool(seen[batch].any())

    def mark(self) -> None:
        state = self.main.bank.state_dict()
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        self.marks.append((len(self.log), copies, set(self.visited)))

    def ended(self) -> None:
        rows = [row for batch in self.batches for row in batch]
        assert len(self.batches) == self.share(len(self.shard), self.size)
        if self.partition:
            assert len(rows) == len(set(rows))
            assert self.drop_last or set(rows) == set(self.shard)

    def look(self) -> None:
        active = {row for row, is_active in enumerate(self.main.bank.active.tolist()) if is_active}
        active = active if self.follows else set(range(self.n))
        state = self.main.sampler.state_dict()
        assert all(value is None or type(value) in (int, bool, str, Tensor) for value in state.values())
        for twin in (self.main, *self.twins):
            assert len(twin.sampler) == self.share(self.share(len(active), self.ranks), self.size)
            assert twin.sampler.coverage == len(self.visited & active) / len(active)
            assert twin.sampler.epoch == self.main.sampler.epoch
            if twin.entered and self.main.iterator is not None:
                # whatever is active in the bank by now
                assert twin.sampler.sampler.rows().tolist() == self.shard
        for twin in self.twins:
            assert_equal(twin.sampler.state_dict(), state)

    def save(self) -> None:
        """Resume another twin from here, or from batches ago, and let it catch up."""
        consumed = None
        if self.marks and self.random.random() < 0.5:
            consumed = self.random.randrange(len(self.marks))
        twin = self.twin()
        if len(self.twins) == 2:
            # an old one is loaded anew
            used = self.twins.pop(0)
            twin = self.random.choice((twin, used))
        now = len(self.log), self.main.bank.state_dict(), self.visited
        place, bank, visited = now if consumed is None else self.marks[consumed]
        saved = through_a_file({"sampler": self.main.sampler.state_dict(consumed), "bank": bank})
        state = saved["sampler"]
        assert set(state["visited"].nonzero()[:, 0].tolist()) == visited
        for part in self.random.choice((("bank", "sampler"), ("sampler", "bank"), ("sampler", "bank", "sampler"))):
            getattr(twin, part).load_state_dict(saved[part])
        twin.iterator, twin.entered = None, False
        assert_equal(twin.sampler.state_dict(), state)
        if state["batch"]:
            with pytest.raises(ValueError, match="consumed must be between"):
                twin.sampler.state_dict(state["batch"] - 1)
        if self.random.random() < 0.5:
            twin.sampler.set_epoch(state["epoch"])
            assert_equal(twin.sampler.state_dict(), state)
        for event in self.log[place:]:
            if event[0] == "batch":
                assert twin.next() == event[1]
            elif event[0] == "reset_coverage":
                twin.sampler.reset_coverage()
            else:
                change(twin.bank, event)
        if self.main.iterator is None and self.main.sampler.state_dict()["batch"]:
            assert twin.next() is None, "the epoch had ended"
        assert_equal(twin.bank.state_dict(), self.main.bank.state_dict())
        self.twins.append(twin)


@given(st.integers(0, 2**40))
def test_a_resumed_stream_is_the_uninterrupted_one(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the memory bank is cold")
        for stream in range(STREAMS):
            Stream(STREAMS * seed + stream).run(steps=25)


N = 48


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_dealt_out_as_it_begins(kind: str) -> None:
    bank = warm_bank(N)
    sampler, resumed = (make(kind, bank, 4, min_seen=0.1) for _ in range(2))
    list(sampler)
    sampler.set_epoch(4)
    state = sampler.state_dict()
    assert state["active"] is None
    resumed.load_state_dict(state)
    bank.retire(torch.arange(20))
    epoch = list(sampler)
    assert list(resumed) == epoch and len(epoch) == 7
    assert min(row for batch in epoch for row in batch) >= 20
    # begun, though nothing of it was used
    next(iter(sampler))
    state = sampler.state_dict(consumed=0)
    assert state["active"].equal(bank.active)
    bank.admit(torch.arange(20))
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 7
    assert len(list(resumed)) == 12


def test_an_older_iteration_keeps_to_its_own_shard() -> None:
    bank = warm_bank(N)
    sampler = make("greedy", bank, 4, num_replicas=2, rank=0, seed=1)
    older = iter(sampler)
    first, shard = next(older), set(sampler.sampler.rows().tolist())
    next(iter(sampler))
    assert set(sampler.sampler.rows().tolist()) != shard
    assert {row for batch in (first, *older) for row in batch} <= shard


def test_retired_rows_of_an_epoch_are_unseen_ones() -> None:
    """Whether or not all other rows have an embedding."""
    for forgotten in (0, 1):
        bank = warm_bank(N)
        sampler = make("greedy", bank, 12, min_seen=0.0)
        batches = iter(sampler)
        next(batches)
        bank.update(torch.arange(N), warm_bank(N, list(range(forgotten))).embeddings)
        bank.retire(torch.arange(24, 48))
        assert sum(row >= 24 or row < forgotten for row in next(batches)) in (6, 7)


def test_less_than_was_loaded_cannot_be_taken_back() -> None:
    sampler = make("greedy partition", warm_bank(N), 4)
    batches = iter(sampler)
    for _ in range(5):
        next(batches)
    sampler.load_state_dict(sampler.state_dict(consumed=3))
    assert sampler.last_selection is None
    next(iter(sampler))
    assert [sampler.state_dict(consumed)["batch"] for consumed in (3, 4)] == [3, 4]
    with pytest.raises(ValueError, match="consumed must be between 3 and 4, got 2"):
        sampler.state_dict(consumed=2)
