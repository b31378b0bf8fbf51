"""Counters of last arrivers: kept from launch to launch, but never in memory that a CUDA graph's pool hands out again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_kernels.kernels import sums


class Gpu:
    """What `counters` asks of torch, answered on the CPU: memory of the pool that is in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool, self.capturing, self.backend = (0, 0), False, "native"
        self.segments: list[dict[str, Any]] = []
        # held, or a later one gets the address of an earlier one
        self.made: list[Tensor] = []
        zeros = torch.zeros

        def allocate(count: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            made = zeros(count, dtype=dtype)
            self.made.append(made)
            self.segments.append(
                {"address": made.data_ptr() - 512, "total_size": 4 * count + 512, "segment_pool_id": self.pool}
            )
            return made

        monkeypatch.setattr(torch, "zeros", allocate)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: self.backend)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: self.segments)
        monkeypatch.setattr(sums, "_counters", {})

    def counters(self, count: int = 5) -> Tensor:
        like: Any = SimpleNamespace(device=torch.device("cuda", 0))
        return sums.counters(like, count)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_are_made_once(gpu: Gpu) -> None:
    held = gpu.counters()
    assert gpu.counters(100) is held
    assert gpu.counters(5000) is not held
    assert gpu.counters(5000) is gpu.counters(10)


def test_of_a_warm_up_inside_a_graph_pool_are_not_kept(gpu: Gpu) -> None:
    gpu.pool = (0, 3)
    first = gpu.counters()
    assert gpu.counters() is not first
    gpu.pool = (0, 0)
    held = gpu.counters()
    assert held is not first
    # made outside it they serve inside it too
    gpu.pool = (0, 3)
    assert gpu.counters() is held


def test_of_a_capture_are_its_own(gpu: Gpu) -> None:
    held = gpu.counters()
    gpu.capturing = True
    captured = gpu.counters()
    assert captured is not held
    gpu.capturing = False
    assert gpu.counters() is held


def test_of_an_allocator_that_does_not_tell_are_not_kept(gpu: Gpu) -> None:
    gpu.backend = "cudaMallocAsync"
    assert gpu.counters() is not gpu.counters()
