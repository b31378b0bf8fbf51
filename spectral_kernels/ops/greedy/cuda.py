"""Greedy selection by csrc/greedy.cu: all multiprocessors hold the pool in their shared memory for the whole selection."""

import torch
from torch import Tensor

from spectral_kernels import errors
from spectral_kernels.ops.greedy.reference import in_range


def greedy_select(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, seed: Tensor, k: int, objective: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = in_range(pool, valid, objective, normalize) if pool.dtype == torch.float64 else pool.float()
    chosen: tuple[Tensor, Tensor, Tensor] = torch.ops.spectral_kernels_cuda.greedy_select(
        rows, start, draws, valid, seed, k, objective == "logdet", normalize, errors.words(pool)
    )
    return chosen
