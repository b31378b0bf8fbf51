"""What a selector returns, and how random rows are drawn for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import float64_needed
from spectral_kernels.ops._rows import NORM_FLOOR


@dataclass(frozen=True)
class Selection:
    """Rows chosen from a pool.

    Attributes:
        indices: (..., k) int64, in the order of choice.
        effective_rank: order-2 effective rank after each pick, (..., k), or of each draw of `pool_select`, (draws,).
        objective: value of the objective after each pick, or of each draw.
    """

    indices: Tensor
    effective_rank: Tensor
    objective: Tensor


def check_window(window: tuple[float, float] | None) -> list[float] | None:
    """(lo, hi) in units of effective rank, 0 <= lo <= hi."""
    if window is None:
        return None
    try:
        lo, hi = (float(edge) for edge in window)
    except (TypeError, ValueError):
        raise ValueError(f"window must be a pair (lo, hi) of effective ranks, got {window!r}") from None
    if not 0 <= lo <= hi:
        raise ValueError(f"window must satisfy 0 <= lo <= hi, got {window!r}")
    return [lo, hi]


def check_generator(generator: torch.Generator | None) -> torch.Generator | None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    return generator


# times a word of eight bools: byte i of the product counts those of bytes 0 to i (on little-endian machines, as all are
# that torch has a wheel for)
_BYTE_SUMS = 0x0101010101010101


class ValidRows:
    """The rows that a mask (b, N) leaves, counted once, a word of eight rows at a time: pools have millions of rows."""

    def __init__(self, mask: Tensor) -> None:
        b, n = mask.shape
        padded = mask.new_zeros(b, -(-n // 8) * 8)
        padded[:, :n] = mask
        self._running = padded.view(torch.int64) * _BYTE_SUMS
        self._ends = (self._running >> 56).cumsum(-1)

    @property
    def count(self) -> Tensor:
        """(b, 1) int64."""
        return self._ends[:, -1:]

    def row(self, rank: Tensor) -> Tensor:
        """The rank-th row left, rank (b, m) int64 from 0."""
        # the first word at whose end the count exceeds the rank
        word = torch.searchsorted(self._ends, rank, right=True)
        running = self._running.gather(1, word)
        within = rank - (self._ends.gather(1, word) - (running >> 56))
        before = running.unsqueeze(-1).view(torch.uint8) <= within.unsqueeze(-1)
        return word * 8 + before.sum(-1)


def check_valid(valid: Tensor | None, shape: torch.Size, needed: int, device: torch.device) -> ValidRows | None:
    """The rows left by a bool mask of the pool's, of which there must be `needed`."""
    if valid is None:
        return None
    if valid.dtype != torch.bool or valid.shape != shape:
        raise ValueError(f"valid must be bool of shape {tuple(shape)}, got {valid.dtype} {tuple(valid.shape)}")
    if valid.device != device:
        raise ValueError(f"valid is on {valid.device}, but pool is on {device}")
    rows = ValidRows(valid.reshape(-1, shape[-1]))
    if device.type == "cpu" and not torch.compiler.is_compiling():
        checks.enough_left(rows.count, needed)
    return rows


def draw_rows(
    pool: Tensor, valid: ValidRows | None, shape: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """Random rows (b, *shape) of a pool (b, N, d), with replacement, uniform over the valid rows."""
    b, n = pool.shape[:2]
    device = pool.device if generator is None else generator.device
    if valid is None:
        return torch.randint(n, (b, *shape), generator=generator, device=device).to(pool.device)
    with float64_needed("drawing among valid rows", device):
        uniform = torch.rand((b, *shape), generator=generator, device=device, dtype=torch.float64).to(pool.device)
    rank = (uniform.reshape(b, -1) * valid.count).long().clamp_max(valid.count - 1)
    return valid.row(rank).reshape(b, *shape)


def sample_without_replacement(
    n: int, draws: int, size: int, generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """(draws, size) rows of [0, n), distinct within each draw; draws share permutations, so they overlap little."""
    device = like.device if generator is None else generator.device
    per_permutation = n // size
    rows = [
        torch.randperm(n, generator=generator, device=device)[: per_permutation * size].reshape(-1, size)
        for _ in range(-(-draws // per_permutation))
    ]
    return torch.cat(rows)[:draws].to(like.device)


def is_seen(rows: Tensor, normalize: bool = True) -> Tensor:
    """(..., n) bool: rows (..., n, d) longer than `NORM_FLOOR`; all but zero rows where they are not normalised."""
    largest = rows.abs().amax(-1)
    if not normalize:
        return largest > 0
    wide = rows.double()
    scale = torch.where(largest > 0, largest, 1.0).double()
    norm: Tensor = scale * torch.linalg.vector_norm(wide / scale[..., None], dim=-1)
    return norm > NORM_FLOOR


# rounds of `row_keys`, bits of the seed from one to the next, their factor, and the least bits of a key
KEY_ROUNDS, KEY_STEP, KEY_FACTOR, KEY_BITS = 5, 10, 0x9E3779B1, 10
SEED_BITS = 62


def draw_seed(pool: Tensor, generator: torch.Generator | None) -> Tensor:
    """(b,) int64 on the pool's device: what `row_keys` makes of the rows of each pool is drawn here."""
    device = pool.device if generator is None else generator.device
    return torch.randint(1 << SEED_BITS, (pool.shape[0],), generator=generator, device=device).to(pool.device)


def row_keys(rows: Tensor, n: int, seed: Tensor | int) -> Tensor:
    """Keys of rows (int64) of a pool of n, all different: the order of the rows by them is random, as `seed` is.

    A bijection of [0, 2^bits), the least such that holds n rows and 1024, in a few instructions: no kernel sorts rows or
    keeps their keys. Other implementations: `ops/greedy/pool_triton.py`, csrc/greedy_key.h.
    """
    bits = max(KEY_BITS, (n - 1).bit_length())
    mask, half = (1 << bits) - 1, (bits + 1) // 2
    key = rows
    for step in range(KEY_ROUNDS):
        key = ((key ^ (seed >> KEY_STEP * step & mask)) * KEY_FACTOR) & mask
        key = key ^ (key >> half)
    return key ^ (seed >> (SEED_BITS - bits) & mask)
