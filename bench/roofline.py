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
from pathlib import Path

from floors import GPUS, Gpu, Work


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
