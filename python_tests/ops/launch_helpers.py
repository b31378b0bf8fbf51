"""Every op that Triton has, called on meta tensors: what it would launch on a GPU is recorded."""

from collections.abc import Callable

import torch
from torch import Tensor

from spectral_kernels.ops.covariance import triton as covariance
from spectral_kernels.ops.effective_rank import triton as effective_rank
from spectral_kernels.ops.greedy import triton as greedy
from spectral_kernels.ops.infonce import triton as infonce
from spectral_kernels.ops.spectrum import triton as spectrum
from spectral_kernels.ops.whitening import triton as whitening


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def greedy_call(b: int, n: int, d: int, all_rows: bool, objective: str) -> object:
    k = min(n, 256)
    start, draws = meta(b, 16, dtype=torch.int64), None if all_rows else meta(b, k, 64, dtype=torch.int64)
    return greedy.greedy_select(meta(b, n, d), start, draws, None, start[:, 0], k, objective, True)


def whitening_call(b: int, n: int, d: int, method: str) -> object:
    z, square, mean = meta(b, n, d), meta(b, d, d), meta(b, d)
    whitening.covariance_of(z, True)
    whitening.whitened(z, mean, square, True)
    return whitening.whiten_backward(z, z, mean, square, square, method, 1e-3, True)


def loss_call(n: int, d: int, with_queue: bool) -> object:
    z, values = meta(n, d), meta(n)
    queue = meta(4096, d) if with_queue else None
    infonce.info_nce(z, z, queue, 0.1, None, None, None, "ieee")
    infonce.info_nce_grad_norms(z, z, queue, 0.1, "info_nce", "ieee")
    return infonce.info_nce_backward(
        values, z, z, queue, values, values, 0.1, None, None, None, "ieee", with_queue, False
    )


# by name: an op of b batches of n rows of d features
CALLS: dict[str, Callable[[int, int, int], object]] = {
    "covariance": lambda b, n, d: covariance.covariance(meta(b, n, d), True, True, 0, "ieee"),
    "covariance backward": lambda b, n, d: covariance.covariance_backward(
        meta(b, d, d), meta(b, n, d), True, True, 0, "ieee"
    ),
    "rank": lambda b, n, d: effective_rank.effective_rank2(meta(b, n, d), False, True, False),
    "rank centred": lambda b, n, d: effective_rank.effective_rank2(meta(b, n, d), True, True, False),
    "rank unbiased": lambda b, n, d: effective_rank.effective_rank2(meta(b, n, d), True, True, True),
    "rank backward": lambda b, n, d: effective_rank.effective_rank2_backward(meta(b), meta(b, n, d), True, True, False),
    "batch rank": lambda b, n, d: effective_rank.batch_effective_rank2(
        meta(4096, d), meta(b, n, dtype=torch.int64), False, True
    ),
    "batch rank backward": lambda b, n, d: effective_rank.batch_effective_rank2_backward(
        meta(b), meta(4096, d), meta(b, n, dtype=torch.int64), False, True
    ),
    "spectrum": lambda b, n, d: spectrum.gathered_spectrum(
        meta(b, n, d), None, True, True, lambda matrix, dtype: matrix[..., 0].to(dtype)
    ),
    "whitening": lambda b, n, d: whitening_call(b, n, d, "cholesky"),
    "greedy": lambda b, n, d: greedy_call(b, n, d, False, "effective_rank"),
    "greedy of all rows": lambda b, n, d: greedy_call(b, n, d, True, "effective_rank"),
    "greedy by log-determinant": lambda b, n, d: greedy_call(b, n, d, True, "logdet"),
    "info_nce": lambda _, n, d: loss_call(n, d, False),
    "info_nce with a queue": lambda _, n, d: loss_call(n, d, True),
    "nt_xent": lambda _, n, d: infonce.nt_xent(meta(n, d), meta(n, d), 0.5, None, "ieee"),
    "nt_xent backward": lambda _, n, d: infonce.nt_xent_backward(
        meta(2 * n), meta(n, d), meta(n, d), meta(2 * n), meta(2 * n), 0.5, None, "ieee", False
    ),
}
