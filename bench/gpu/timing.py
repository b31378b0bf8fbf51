"""Times of calls: by a CUDA graph and events on a GPU, by the clock where there is none or a call synchronises."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import quantile

# between two uses of the same inputs, so many times L2's size is touched by others
L2_TIMES = 2
MOST_SETS = 64
# cycles that keep the stream busy while the host enqueues what is timed: 0.5 ms
BUSY = 1_000_000

Sets = list[Any]


def sets_for(touched: float, device: torch.device) -> int:
    """How many sets of inputs, of `touched` bytes a call, make every call read from memory."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(2, math.ceil(L2_TIMES * l2 / max(touched, 1.0)) + 1))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(call: Callable[..., object], sets: Sets, device: torch.device, seconds: float = 0.5) -> list[float]:
    """µs of each of several calls, waited for one by one."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 or (time.perf_counter() - began < seconds and len(times) < 30):
        inputs = sets[len(times) % len(sets)]
        synchronize(device)
        begin = time.perf_counter()
        call(*inputs)
        synchronize(device)
        times.append((time.perf_counter() - begin) * 1e6)
        if time.perf_counter() - began > 4 * seconds:
            break
    return times[1:] or times


def enqueued(call: Callable[..., object], sets: Sets, device: torch.device, calls: int = 40) -> float:
    """µs that the host takes for a call that is not waited for: what a training loop pays if the GPU is not its limit."""
    found = []
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        for i in range(calls):
            call(*sets[i % len(sets)])
        found.append((time.perf_counter() - begin) * 1e6 / calls)
        synchronize(device)
    return min(found)


def captured(call: Callable[..., object], sets: Sets, seconds: float = 0.5) -> list[float]:
    """µs a call, of several replays of a graph with a call on every set."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for inputs in sets[:2]:
            call(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < seconds and len(times) < 40):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(sets))
        if time.perf_counter() - began > 4 * seconds:
            break
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in µs."""
    p20, p80 = quantile(times, 0.2), quantile(times, 0.8)
    return {"p20": round(p20, 2), "us": round(statistics.median(times), 2), "p80": round(p80, 2)}
