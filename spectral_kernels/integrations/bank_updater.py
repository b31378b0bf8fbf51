"""The bank of a sampler, kept up by what a trainer's model makes of each batch."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_kernels.files.reading import FileError
from spectral_kernels.files.torch_files import read_tensors
from spectral_kernels.files.writing import replacing
from spectral_kernels.selection import MemoryBank
from spectral_kernels.selection.batch_sampler import BaseBatchSampler
from spectral_kernels.selection.global_batches import GlobalBatchSampler

FILE = "spectral_kernels.pt"


def _output(output: Any) -> Tensor:
    """A model's output as it is where that is a tensor, or its entry "sentence_embedding"."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and isinstance(output.get("sentence_embedding"), Tensor):
        embedding: Tensor = output["sentence_embedding"]
        return embedding
    raise TypeError(f"the module gave a {type(output).__name__}, in which embedding= must find the (B, d) embeddings")


class BankUpdater:
    """Writes the embeddings of each batch that is trained on into the sampler's bank, by exactly that batch's rows.

    A module's outputs are taken as the model is trained, at no extra forward pass: of a batch of B rows the first B rows that
    the module gives, in one call or several (later ones, such as a second view, are passed over). The rows are the sampler's
    own, in the order in which it handed them out: loaders may draw ahead, and the data need no column of indices. Under
    torch.distributed rows and embeddings of all processes are gathered, so that every process has the same bank.

    A callback (`transformers_callback`, `lightning_callback`) says where a batch ends; a loop of one's own calls
    `batch_end` after each batch.

    Args:
        sampler: a batch sampler with a bank, such as `GreedyBatchSampler`; one updater to a sampler.
        module: whose output holds the embeddings, such as an encoder; also under DistributedDataParallel the inner one.
        embedding: from that output to the embeddings (B, d); None: the output itself, or its entry "sentence_embedding".

    Raises:
        ValueError: a sampler without a bank, or with another updater.
    """

    def __init__(
        self,
        sampler: BaseBatchSampler | GlobalBatchSampler,
        module: nn.Module,
        embedding: Callable[[Any], Tensor] | None = None,
    ) -> None:
        bank = getattr(sampler, "bank", None)
        if not isinstance(bank, MemoryBank):
            raise ValueError(f"sampler is a {type(sampler).__name__}, which has no bank")
        if sampler.pending is not None:
            raise ValueError("sampler has an updater already")
        sampler.pending = deque()
        self.sampler, self.bank = sampler, bank
        self._embedding = embedding or _output
        self._made: list[Tensor] = []
        self._hook = module.register_forward_hook(self._take)

    def _take(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        pending = self.sampler.pending
        if module.training and pending and sum(map(len, self._made)) < len(pending[0]):
            self._made.append(self._embedding(output).detach())

    def batch_end(self) -> None:
        """Store the embeddings of the batch that was trained on last.

        Raises:
            RuntimeError: no batch was handed out, or the module gave fewer rows than it has.
        """
        pending, made = self.sampler.pending, self._made
        self._made = []
        if not pending:
            raise RuntimeError("a batch ended that the sampler did not hand out")
        rows = pending.popleft()
        count = sum(map(len, made))
        if count < len(rows):
            raise RuntimeError(
                f"a batch of {len(rows)} rows ended, but module gave the embeddings of {count} while it was training"
            )
        z = torch.cat(made)[: len(rows)]
        if _ranks() > 1:
            rows, z = _gathered(rows, z)
        self.bank.update(rows, z)

    def close(self) -> None:
        """Stop following the module."""
        self._hook.remove()
        self.sampler.pending, self._made = None, []

    def state_dict(self) -> dict[str, Any]:
        """The bank, and where each process's sampler stands after the last batch that ended; on every rank the same.

        Called on all ranks at once.
        """
        pending = self.sampler.pending
        batch = self.sampler.state_dict()["batch"]
        own = self.sampler.state_dict(consumed=batch - len(pending or ()))
        states = [own] * _ranks()
        if _ranks() > 1:
            dist.all_gather_object(states, own)
        return {"bank": self.bank.state_dict(), "samplers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken.

        Raises:
            ValueError: a state of another number of processes, or what bank and sampler refuse.
        """
        states = state["samplers"]
        if len(states) != _ranks():
            raise ValueError(f"the state is of {len(states)} processes, but there are {_ranks()}")
        self.sampler.load_state_dict(states[dist.get_rank() if _ranks() > 1 else 0])
        self.bank.load_state_dict(state["bank"])

    def save(self, folder: str | Path) -> None:
        """Write the state to a checkpoint's folder, whole or not at all, from rank 0; called on all ranks."""
        state = self.state_dict()
        if _ranks() == 1 or dist.get_rank() == 0:
            with replacing(Path(folder) / FILE) as file:
                torch.save(state, file)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder has no such file. FileError: it is damaged, or of another kind.
        """
        path = Path(folder) / FILE
        state = read_tensors(path)
        if (
            not isinstance(state, dict)
            or state.keys() != {"bank", "samplers"}
            or not isinstance(state["samplers"], list)
        ):
            raise FileError(path, "is no state of a BankUpdater")
        self.load_state_dict(state)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gathered(rows: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Those of all ranks, which may have other numbers of them."""
    rows = rows.to(z.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=z.device) for _ in range(_ranks())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=z.device))
    longest = int(torch.cat(sizes).max())
    parts = []
    for value in (rows, z):
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: len(value)] = value
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded)
        parts.append(torch.cat([part[: int(size)] for part, size in zip(everyone, sizes, strict=True)]))
    return parts[0], parts[1]
