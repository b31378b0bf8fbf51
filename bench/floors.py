"""What GPUs can do, and what a call must at least cost on one: see roofline.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Bandwidth in byte/s, rates in flop/s by arithmetic, seconds of an empty kernel in a graph and of a dependent step."""

    name: str
    bandwidth: float
    rates: dict[str, float]
    launch: float = 1.5e-6
    # a barrier of a block, a reduction over it and a handful of operations
    step: float = 0.33e-6


_HOPPER = {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12, "fp64": 67e12}
GPUS = {
    "A100": Gpu("A100", 1.7e12, {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "fp64": 19.5e12}),
    "H100": Gpu("H100", 3.0e12, _HOPPER),
    "H200": Gpu("H200", 4.2e12, _HOPPER),
    "B200": Gpu("B200", 7.0e12, {"bf16": 2250e12, "tf32": 1100e12, "fp32": 75e12, "fp64": 37e12}),
}


@dataclass(frozen=True)
class Work:
    """Of one call: bytes moved, flops of one arithmetic, launches, dependent steps."""

    bytes: float
    flops: float = 0.0
    arithmetic: str = "fp32"
    launches: int = 1
    steps: int = 0

    def floor(self, gpu: Gpu) -> tuple[float, str]:
        """Seconds, and what takes them."""
        times = {
            "memory": self.bytes / gpu.bandwidth,
            self.arithmetic: self.flops / gpu.rates[self.arithmetic],
            "launches": self.launches * gpu.launch,
            "steps": self.steps * gpu.step,
        }
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit
