"""Memory bank: the last embedding of every sample, and how old it is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import backends, cpp_call
from spectral_kernels.ops._rows import accumulation_dtype, read_rows
from spectral_kernels.ops._selection import is_seen
from spectral_kernels.selection.state import complete, described, is_plain

# of a state that is loaded: steps are int64, and are counted on
LAST_STEP = 1 << 62


@dataclass(frozen=True)
class Staleness:
    """How old a bank's embeddings are.

    Attributes:
        seen: share of the rows that hold an embedding, in [0, 1].
        mean_age, max_age: over the seen rows, in calls of `update`; 0 when no row is seen.
    """

    seen: float
    mean_age: float
    max_age: int


class MemoryBank:
    """Last seen embedding of each of n samples, addressed by the sample's index (docs/theory.md §5).

    Rows are refreshed from the training step's own output, at no extra forward pass. An unseen row
    is zero, which is how the selectors recognise it. `update` and `gather` cost O(batch), whatever
    n.

    The bank is not a `torch.nn.Module` on purpose: DistributedDataParallel would broadcast its n x
    d buffer on every forward pass, and `model.half()` would convert it. Every process keeps a bank
    of its own; give `update` the indices and embeddings gathered from all processes, as the
    contrastive loss does, or a process knows only the samples it has trained on itself.

    Where the data change, a row is a slot: `retire` takes a sample that has expired out of what the
    samplers choose from, `admit` puts a new one in its place. All rows are active to begin with.

    Args:
        n: number of samples.
        d: number of features.
        dtype: of the embeddings stored: float64, float32, bfloat16 or float16.
        device: where the bank lives; None is torch's default device.

    Attributes:
        embeddings: (n, d), unit rows, zero where unseen. The bank's own storage: read it, do not
            write it.
        step: calls of `update` so far.
        num_active: rows that samplers choose from.

    Raises:
        ValueError: n or d below 1, a dtype that is not one of the four.
    """

    def __init__(
        self,
        n: int,
        d: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        n, d = checks.integer(n, "n", 1), checks.integer(d, "d", 1)
        if dtype not in checks.FLOATING:
            raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
        self.embeddings = torch.zeros(n, d, dtype=dtype, device=device)
        # the step of each row's last update, so that ageing costs nothing; -1 is unseen
        self._updated = torch.full((n,), -1, dtype=torch.int64, device=device)
        self._num_seen = torch.zeros((), dtype=torch.int64, device=device)
        self._active = torch.ones(n, dtype=torch.bool, device=device)
        self.num_active = n
        self.step = 0

    @classmethod
    def from_embeddings(
        cls, z: Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "MemoryBank":
        """A bank that holds the embeddings of all samples from the start, where they are known up front.

        Args:
            z: (n, d), float64, float32, bfloat16 or float16, a tensor or an array (numpy, DLPack); it is copied, its rows
                L2-normalised. Rows of length up to 1e-12 are unseen.
            dtype, device: of the bank; None is that of z.

        Raises:
            ValueError: wrong shape or dtype; a row that holds NaN or Inf, the first one is named.
        """
        z = checks.floating(z, "z", ndim=2)
        bank = cls(*z.shape, dtype=z.dtype if dtype is None else dtype, device=z.device if device is None else device)
        bank.update(torch.arange(bank.n), z)
        return bank

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.embeddings.shape[0]

    @property
    def d(self) -> int:
        """Number of features."""
        return self.embeddings.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the bank lives."""
        return self.embeddings.device

    @property
    def seen(self) -> Tensor:
        """(n,) bool: rows that hold an embedding."""
        return self._updated >= 0

    @property
    def active(self) -> Tensor:
        """(n,) bool: rows that samplers choose from. The bank's own storage: read it, do not write it."""
        return self._active

    @property
    def num_seen(self) -> int:
        """Rows that hold an embedding; counted as they are updated, so this does not scan the bank."""
        return int(self._num_seen)

    @property
    def age(self) -> Tensor:
        """(n,) int64: updates of the bank since the row's own, 0 for the newest; -1 where unseen."""
        return torch.where(self.seen, self.step - 1 - self._updated, -1)

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        stored = f"dtype={self.embeddings.dtype}, device={str(self.device)!r}"
        return f"MemoryBank({self.n}, {self.d}, {stored}, step={self.step}, seen={self.num_seen})"

    @torch.no_grad()
    def update(self, indices: Tensor, z: Tensor) -> None:
        """Store new embeddings, L2-normalised, detached and cast to the bank's dtype.

        Where an index occurs twice, the later row wins. A row of length up to 1e-12 has no direction
        to speak of: its sample becomes unseen. A retired row stays as it is: its sample was on its way when it was retired.

        Args:
            indices: (b,) whole numbers in [0, n), a tensor, array or list.
            z: (b, d), float64, float32, bfloat16 or float16, contiguous or not, on any device.

        Raises:
            ValueError: wrong shape or dtype, indices out of range, a row of z that holds NaN or
                Inf; the bank is then as it was. On CUDA looking for such rows waits for the stream;
                `set_checks(False)` leaves it out.
        """
        z = checks.floating(z, "z", ndim=2)
        if z.shape[1] != self.d:
            raise ValueError(f"z has d = {z.shape[1]}, but the bank has d = {self.d}")
        rows = self._rows(indices)
        if len(rows) != len(z):
            raise ValueError(f"indices has {len(rows)} entries, but z has {len(z)} rows")
        if self._uses_cpp():
            self._update_by_cpp(rows, z.to(self.device))
        else:
            self._update_by_torch(rows, z)
        self.step += 1

    def _uses_cpp(self) -> bool:
        forced = backends.forced_backend()
        return self.device.type == "cpu" and backends.CPP_ERROR is None and forced in (None, "cpp")

    def _update_by_cpp(self, rows: Tensor, z: Tensor) -> None:
        update = cpp_call("memory_bank_update")
        self._num_seen += update(self.embeddings, self._updated, self._active, rows, z.detach(), self.step)
        # whoever saved the embeddings for a backward pass is to hear of it, as from torch's own writing
        torch.autograd.graph.increment_version(self.embeddings)

    def _update_by_torch(self, rows: Tensor, z: Tensor) -> None:
        values = z.to(self.device, torch.promote_types(accumulation_dtype(z.dtype), self.embeddings.dtype))
        finite = values.isfinite().all(1)
        if checks.enabled() and not bool(finite.all()):
            checks.bad_row(~finite, "z")
        zero = ((finite & ~is_seen(values)) | ~self._active[rows])[:, None]
        values = torch.where(zero, 0.0, read_rows(values, True)).to(self.embeddings.dtype)

        # every occurrence of an index writes the row of its last one, so the order of writing is free
        ordered, order = rows.sort(stable=True)
        last = torch.searchsorted(ordered, ordered, right=True) - 1
        winner = order[last]
        before = self._updated[ordered] >= 0
        after = ~zero[winner, 0]
        counted = last == torch.arange(len(last), device=self.device)
        self._num_seen += (counted & after).sum() - (counted & before).sum()
        self.embeddings[ordered] = values[winner]
        self._updated[ordered] = torch.where(after, self.step, -1)

    def retire(self, indices: Tensor) -> None:
        """Forget samples (b,) that have expired; samplers leave their rows out from the next epoch on.

        Raises:
            ValueError: indices not int64, empty or out of range, or of all rows that are left.
        """
        rows = self._rows(indices)
        left = self._active.clone()
        left[rows] = False
        if not bool(left.any()):
            raise ValueError("indices names every active row: a bank needs one")
        self._change(rows, left)

    def admit(self, indices: Tensor) -> None:
        """Make rows (b,) active, for new samples: what was known of the old ones is forgotten.

        Raises:
            ValueError: indices not int64, empty or out of range.
        """
        rows = self._rows(indices)
        active = self._active.clone()
        active[rows] = True
        self._change(rows, active)

    def _change(self, rows: Tensor, active: Tensor) -> None:
        self.embeddings[rows] = 0
        self._updated[rows] = -1
        self._num_seen.copy_(self.seen.sum())
        # a new tensor: a sampler may still hold the old one
        self._active, self.num_active = active, int(active.sum())

    def gather(self, indices: Tensor) -> Tensor:
        """Embeddings (b, d) of the samples `indices` (b,), zero where unseen; a copy.

        Raises:
            ValueError: indices not int64, empty or out of range.
        """
        rows = self._rows(indices)
        if not self._uses_cpp():
            return self.embeddings[rows]
        copied: Tensor = cpp_call("memory_bank_gather")(self.embeddings, rows)
        return copied

    def staleness(self) -> Staleness:
        """Share of active rows seen, and their mean and maximum age. O(n)."""
        age = self.age[self.seen]
        if len(age) == 0:
            return Staleness(0.0, 0.0, 0)
        return Staleness(len(age) / self.num_active, int(age.sum()) / len(age), int(age.max()))

    def reset(self) -> None:
        """Forget every embedding; which rows are active stays as it is."""
        self.embeddings.zero_()
        self._updated.fill_(-1)
        self._num_seen.zero_()
        self.step = 0

    def to(self, device: torch.device | str) -> "MemoryBank":
        """Move to a device, in place; returns the bank."""
        self.embeddings = self.embeddings.to(device)
        self._updated = self._updated.to(device)
        self._num_seen = self._num_seen.to(device)
        self._active = self._active.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """`embeddings` (n, d), `updated` (n,) int64, `active` (n,) bool and `step`; the tensors are the bank's own."""
        return {"embeddings": self.embeddings, "updated": self._updated, "active": self._active, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state in; it may lie on another device.

        Raises:
            ValueError: an entry is missing, or of another type, shape or dtype, or not what a bank
                writes; the bank is then as it was.
        """
        own = self.state_dict()
        complete(state, "memory bank", own)
        step = checks.integer(state["step"], "step of the state", 0, LAST_STEP)
        for name in ("embeddings", "updated", "active"):
            loaded, kept = state[name], own[name]
            if not is_plain(loaded, kept.dtype, kept.ndim) or loaded.shape != kept.shape:
                raise ValueError(
                    f"{name} of the state is {described(loaded)}, but the bank has {kept.dtype} {tuple(kept.shape)}"
                )
        embeddings, updated, active = state["embeddings"], state["updated"].to(self.device), state["active"]
        active = active.to(self.device, copy=True)
        checks.finite_rows(embeddings, "embeddings of the state")
        if int(updated.min()) < -1 or int(updated.max()) >= step:
            raise ValueError(f"updated of the state must lie in [-1, {step})")
        if not bool(active.any()) or bool((updated[~active] >= 0).any()):
            raise ValueError("active of the state must name a row, and every row whose updated is not -1")
        if not torch.equal((embeddings != 0).any(1).to(self.device), updated >= 0):
            raise ValueError("embeddings of the state must be zero in the rows whose updated is -1, and in no other")
        self.embeddings.copy_(embeddings)
        self._updated.copy_(updated)
        self._num_seen.copy_(self.seen.sum())
        self._active, self.num_active = active, int(active.sum())
        self.step = step

    def _rows(self, indices: Tensor) -> Tensor:
        return checks.row_indices(indices, "indices", self.n, 1).to(self.device)
