"""What a selector returns, and how random rows are drawn for it."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def check_valid(valid: Tensor | None, shape: torch.Size, needed: int, device: torch.device) -> Tensor | None:
    """A bool mask of the pool's rows with at least `needed` rows left in."""
    if valid is None:
        return None
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.shape != shape:
        got = f"{valid.dtype} {tuple(valid.shape)}" if isinstance(valid, Tensor) else type(valid).__name__
        raise ValueError(f"valid must be a bool tensor of shape {tuple(shape)}, got {got}")
    if valid.device != device:
        raise ValueError(f"valid is on {valid.device}, but pool is on {device}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        least = int(valid.sum(-1).min())
        if least < needed:
            raise ValueError(f"valid leaves {least} rows, but {needed} are to be picked")
    return valid


def draw_rows(pool: Tensor, valid: Tensor | None, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Random rows (b, *shape) of a pool (b, N, d), with replacement, uniform over the valid rows."""
    b, n = pool.shape[:2]
    device = pool.device if generator is None else generator.device
    if valid is None:
        return torch.randint(n, (b, *shape), generator=generator, device=device).to(pool.device)
    uniform = torch.rand((b, *shape), generator=generator, device=device, dtype=torch.float64).to(pool.device)
    ranks = valid.cumsum(-1)
    # the r-th valid row is the first at which the running count exceeds r
    wanted = (uniform.reshape(b, -1) * ranks[:, -1:]).long().clamp_max(ranks[:, -1:] - 1)
    return torch.searchsorted(ranks, wanted, right=True).reshape(b, *shape)


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
