"""Batches that are chosen for all ranks together, where the loss gathers its negatives."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_kernels.selection.batch_sampler import BaseBatchSampler
from spectral_kernels.selection.memory_bank import MemoryBank
from spectral_kernels.selection.wrapped import TrainersBatchSampler


class GlobalBatchSampler(TrainersBatchSampler):
    """Each rank's part of the batches that one sampler chooses for all of them.

    Ranks that choose within their own shards make batches that are diverse each, not together; where the negatives are
    gathered it is the union that counts. Rank 0 chooses, and one broadcast of a batch's row numbers tells the others; all
    ranks iterate together, and the bank of rank 0 decides (`BankUpdater` gathers what all ranks embed).

    Args:
        sampler: made with `num_replicas=1, rank=0`, its batch_size that of all ranks together, and the same on every rank.
            Its last batch, where it is short, is filled up with its own first rows so that all ranks get as many.
        group: the process group; None is torch.distributed's own. Without one there is one rank.

    Attributes:
        whole: the sampler. drop_last, bank, n: as it has them.

    Raises:
        ValueError: a sampler that deals out its rows to ranks, or whose batch_size the ranks do not divide, which is told as
            an epoch begins.
    """

    def __init__(self, sampler: BaseBatchSampler, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if sampler.num_replicas != 1:
            raise ValueError(
                f"sampler deals out its rows to {sampler.num_replicas} ranks: give it num_replicas=1, rank=0"
            )
        self.whole, self.group = sampler, group
        self.sampler, self.n, self.drop_last = sampler.sampler, sampler.n, sampler.drop_last
        self.bank: MemoryBank | None = getattr(sampler, "bank", None)

    @property
    def num_replicas(self) -> int:
        """Ranks of the group there is now."""
        return dist.get_world_size(self.group) if _runs() else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return dist.get_rank(self.group) if _runs() else 0

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Rows of one rank's batch."""
        size, left = divmod(self.whole.batch_size, self.num_replicas)
        if left:
            raise ValueError(
                f"batch_size = {self.whole.batch_size} of the sampler is no multiple of {self.num_replicas} ranks"
            )
        return size

    @property
    def epoch(self) -> int:
        """The epoch that was set, loaded or begun last."""
        return self.whole.epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its beginning."""
        self.whole.set_epoch(epoch)

    def _length(self) -> int:
        return self.whole._length()

    def _epoch(self) -> Iterator[Tensor]:
        ranks, rank, _ = self.num_replicas, self.rank, self.batch_size
        batches = self.whole._epoch() if rank == 0 else iter(())
        while (rows := self._from_first(next(batches, None))) is not None:
            short = -len(rows) % ranks
            yield torch.cat((rows, rows[torch.arange(short) % len(rows)]))[rank::ranks]

    def _from_first(self, value: Any) -> Any:
        """What rank 0 has."""
        told = [value]
        if self.num_replicas > 1:
            dist.broadcast_object_list(told, group=self.group, group_src=0)
        return told[0]

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where rank 0's sampler stands, on every rank; called on all of them at once. See the sampler's `state_dict`."""
        state: dict[str, Any] = self._from_first(self.whole.state_dict(consumed) if self.rank == 0 else None)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken, on every rank."""
        self.whole.load_state_dict(state)


def _runs() -> bool:
    return dist.is_available() and dist.is_initialized()
