"""What a call costs on a GPU, told without one: launches and allocations of the Triton host code on meta tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from launch_helpers import CALLS, greedy_call, meta
from modes import Watched
from torch import Tensor

from spectral_kernels.kernels.launch import Record, recording
from spectral_kernels.ops.infonce import triton as infonce
from spectral_kernels.ops.whitening import cuda as whitening

B, D = 65536, 128


@contextmanager
def watched() -> Iterator[tuple[list[Record], list[int]]]:
    """Launches, and the bytes of everything that is made; views are not."""
    sizes: list[int] = []

    def see(_: Any, made: list[Tensor]) -> None:
        sizes.extend(part.numel() * part.element_size() for part in made if not part._is_view())

    with recording() as records, Watched(see):
        yield records, sizes


def info_nce_calls(dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], object]]]:
    """Launches granted, and the call, of every pass at B = 65536."""
    z, values, both = meta(B, D, dtype=dtype), meta(B), meta(2 * B)
    plain = (None, None, None, "ieee")
    rest = (values, values, 0.1, *plain)
    return {
        "info_nce": (1, lambda: infonce.info_nce(z, z, None, 0.1, *plain)),
        "info_nce backward": (2, lambda: infonce.info_nce_backward(values, z, z, None, *rest, False, True)),
        "queue backward": (1, lambda: infonce.info_nce_backward(values, z, z, z, *rest, False, True)),
        "queue backward, its own too": (2, lambda: infonce.info_nce_backward(values, z, z, z, *rest, True, True)),
        "queue": (1, lambda: infonce.info_nce(z, z, z, 0.1, *plain)),
        "norms": (1, lambda: infonce.info_nce_grad_norms(z, z, None, 0.1, "info_nce", "ieee")),
        "norms of nt_xent": (1, lambda: infonce.info_nce_grad_norms(z, z, None, 0.1, "nt_xent", "ieee")),
        "nt_xent": (1, lambda: infonce.nt_xent(z, z, 0.1, None, "ieee")),
        "nt_xent backward": (2, lambda: infonce.nt_xent_backward(both, z, z, both, both, 0.1, None, "ieee", True)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", info_nce_calls(torch.float32))
def test_losses(name: str, dtype: torch.dtype) -> None:
    """Few launches, and memory of a few matrices (B, d): never one of (B, B)."""
    granted, call = info_nce_calls(dtype)[name]
    with watched() as (records, sizes):
        call()
    assert len(records) <= granted
    assert 4 * B <= sum(sizes) <= 12 * B * D * 4
    assert sum(sizes) < B * B / 8


def launches(name: str, b: int, n: int, d: int) -> int:
    with recording() as records:
        CALLS[name](b, n, d)
    return len(records)


@pytest.mark.parametrize("n", [5, 4096, 65536])
@pytest.mark.parametrize("d", [5, 64, 128, 512, 2048])
def test_covariance(n: int, d: int) -> None:
    assert launches("covariance", 1, n, d) <= (4 if d > 128 and n >= 1024 else 2)


@pytest.mark.parametrize("n", [5, 256, 4096, 65536])
def test_rank(n: int) -> None:
    """Of up to 128 features, centred or not; of more where there are fewer rows than features; else norms come before."""
    assert launches("rank", 1, n, D) == launches("rank centred", 1, n, D) == 1
    assert launches("rank", 1, n, 8 * D) == (1 if n < 8 * D else 2)


@pytest.mark.parametrize("d", [32, 128, 1024])
def test_batch_rank(d: int) -> None:
    assert launches("batch rank", 64, 256, d) == 1


@pytest.mark.parametrize("n", (1000, 4096, 50000))
def test_greedy(n: int) -> None:
    for all_rows in (True, False):
        for objective in ("effective_rank", "logdet"):
            with recording() as records:
                greedy_call(1, n, D, all_rows, objective)
            # the Gram matrix of a small pool
            assert len(records) <= 2 + (all_rows and objective == "effective_rank" and n <= 4096)


@pytest.mark.parametrize("n", [5, 200, 4096, 65536])
@pytest.mark.parametrize("d", [5, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whitening(n: int, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Cholesky; of up to 128 features, where csrc has the matrix."""
    kernels = 0

    def whitening_matrix(covariance: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        nonlocal kernels
        kernels += 1
        return torch.empty_like(covariance), covariance.new_empty(1, dtype=torch.int32)

    monkeypatch.setattr(whitening, "whitening_matrix", whitening_matrix)
    z = meta(1, n, d, dtype=dtype)
    with watched() as (records, _):
        y, mean, covariance, matrix = whitening.whiten(z, "cholesky", 1e-3, True)
    assert len(records) + kernels <= 3
    with watched() as (records, _):
        whitening.whiten_backward(y, z, mean, covariance, matrix, "cholesky", 1e-3, True)
    assert len(records) <= 4
