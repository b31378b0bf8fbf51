"""Trainers that put their own sampler around a batch sampler, or into it."""

from types import FrameType
from typing import Any

from torch.utils.data import Sampler


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
    other batches would be lost, silently, so that the wrapper is told that there is one process, which is what Transformers
    does for a sampler of its own. Nothing that the wrapper lets a sampler say has that effect.

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
