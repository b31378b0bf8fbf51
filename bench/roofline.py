"""Floors: what an op must at least cost on a GPU, from counted bytes, flops, launches and dependent steps.

    python bench/roofline.py                                     every case of gpu_cases.py on an H100
    python bench/roofline.py --gpu H200 --measured FILE          beside the medians of bench/gpu_check.py

A floor is the largest of four times: bytes read and written once over the bandwidth of memory; products over the rate of
the unit that does them, symmetric ones counted half; launches; steps of which each needs the one before. Rates are the
vendor's, bandwidth is a large copy as measured; what they leave out (latency, the last wave, L2) no kernel escapes wholly.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path


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

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Seconds by what takes them."""
        return {
            "memory": self.bytes / gpu.bandwidth,
            self.arithmetic: self.flops / gpu.rates[self.arithmetic],
            "launches": self.launches * gpu.launch,
            "steps": self.steps * gpu.step,
        }

    def floor(self, gpu: Gpu) -> tuple[float, str]:
        """Seconds, and what takes them."""
        times = self.times(gpu)
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit


def table(gpu: Gpu, works: dict[str, Work], measured: dict[str, float]) -> list[str]:
    """A line a case: its counts, its floor, and the share of it that a measured median (µs) reaches."""
    width = max(map(len, works), default=0)
    lines = [f"{'':{width}}  {'MB':>8} {'GFLOP':>8} {'steps':>6} {'floor µs':>9}  limit      measured µs   share"]
    for name, work in works.items():
        seconds, limit = work.floor(gpu)
        counts = f"{work.bytes / 1e6:8.2f} {work.flops / 1e9:8.2f} {work.steps:6d}"
        line = f"{name:{width}}  {counts} {seconds * 1e6:9.1f}  {limit:9}"
        if name in measured:
            line += f" {measured[name]:12.1f}  {100 * seconds * 1e6 / measured[name]:5.0f} %"
        lines.append(line)
    return lines


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from gpu_cases import cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", choices=sorted(GPUS))
    parser.add_argument("--measured", type=Path, help="results.jsonl of bench/gpu_check.py")
    options = parser.parse_args()
    measured = {}
    if options.measured is not None:
        lines = [json.loads(line) for line in options.measured.read_text().splitlines()]
        measured = {line["case"]: line["us"] for line in lines if line.get("what") == "ours" and "us" in line}
    print(f"{options.gpu}: {GPUS[options.gpu].bandwidth / 1e12:.1f} TB/s")
    print("\n".join(table(GPUS[options.gpu], {case.name: case.work for case in cases()}, measured)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
