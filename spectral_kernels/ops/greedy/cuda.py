"""Greedy selection by csrc/greedy.cu: a cluster of 16 CTAs holds the pool in its shared memory for the whole selection."""

import torch
from torch import Tensor

from spectral_kernels import checks


def greedy_select(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, k: int, all_rows: bool, objective: str,
    window: list[float] | None, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.finite_rows(pool, "pool")
    rows = pool if pool.dtype == torch.float64 else pool.float()
    chosen: tuple[Tensor, Tensor, Tensor] = torch.ops.spectral_kernels_cuda.greedy_select(
        rows, start, draws, valid, k, all_rows, objective == "logdet", window, normalize
    )
    return chosen
