"""What trainers do with a batch sampler: put their own around it, or into it, throw batches away, train on them later."""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler

from spectral_kernels import checks


def refuse_sampler(rows: Any) -> None:
    """Raise the TypeError by which Lightning knows that it cannot give a batch sampler another sampler, as it would do."""
    if isinstance(rows, Sampler):
        raise TypeError(
            f"a batch sampler deals out its rows to the ranks by itself, and takes no {type(rows).__name__}: "
            "Trainer(use_distributed_sampler=False)"
        )


def pass_through(caller: FrameType) -> tuple[int, int] | None:
    """Number and rank of the processes, where what calls the batch sampler is Accelerate's wrapper; else None.

    `BatchSamplerShard` gives each process every num_processes-th batch. Of a sampler that deals out its rows by itself the
    other batches would be lost silently. So the wrapper is set to one process, as Transformers does for its own sampler:
    Accelerate has no option for it.

    Raises:
        ValueError: split_batches, which cuts a batch that was chosen as a whole.
    """
    wrapper = caller.f_locals.get("self")
    kind = type(wrapper)
    if (kind.__module__, kind.__name__) != ("accelerate.data_loader", "BatchSamplerShard"):
        return None
    assert wrapper is not None
    found = getattr(wrapper, "dealt_out", (wrapper.num_processes, wrapper.process_index))
    if found[0] > 1 and wrapper.split_batches:
        raise ValueError(
            "split_batches=True cuts batches that were chosen as a whole: leave it out, batch_size is a process's"
        )
    # shards are equally long already: a last batch that is short need not be filled up
    wrapper.dealt_out, wrapper.num_processes, wrapper.process_index, wrapper.even_batches = found, 1, 0, False
    return found


class TrainersBatchSampler(Sampler[list[int]], ABC):
    """A batch sampler as trainers use it; a subclass says how many batches there are and what is in them.

    Attributes:
        batch_size: rows of a batch.
        pending: batches handed out that `BankUpdater` has not seen trained on; None without one.
    """

    batch_size: int

    def __init__(self) -> None:
        self.pending: deque[Tensor] | None = None
        self._skipped = 0

    @abstractmethod
    def _length(self) -> int:
        """Batches of an epoch."""

    @abstractmethod
    def _epoch(self) -> Iterator[Tensor]:
        """Rows (batch_size,) int64 of each batch, on the CPU; nothing runs before the first is requested."""

    def _share_among(self, num_replicas: int, rank: int) -> None:
        """A trainer says which processes the batches are for."""

    def will_be_skipped(self, batches: int) -> None:
        """The trainer that resumes throws away so many batches of the epoch that was loaded, which are not in what is left of
        it: batches of row 0 stand for them.
        """
        self._skipped = checks.integer(batches, "batches", 0)

    def __len__(self) -> int:
        self._find_wrapper(sys._getframe(1))
        return self._length()

    def __iter__(self) -> Iterator[list[int]]:
        self._find_wrapper(sys._getframe(1))
        return self._lists()

    def _find_wrapper(self, caller: FrameType) -> None:
        dealt_out = pass_through(caller)
        if dealt_out is not None:
            self._share_among(*dealt_out)

    def _lists(self) -> Iterator[list[int]]:
        # a DataLoader with workers calls iter twice, and requests from one
        for _ in range(self._skipped):
            yield [0] * self.batch_size
        self._skipped = 0
        if self.pending is not None:
            self.pending.clear()
        for rows in self._epoch():
            if self.pending is not None:
                self.pending.append(rows)
            chosen: list[int] = rows.tolist()
            yield chosen
