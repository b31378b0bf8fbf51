"""Everything about a GPU in one command: build, check every op against float64, then time it beside the alternatives.

    python bench/gpu.py --out bench/results/gpu         under 8 minutes; needs a CUDA build of torch, Triton, nvcc, no network
    python bench/gpu.py --out FOLDER --only greedy      some cases
    python bench/gpu.py --dry-run --out FOLDER          the same steps on the CPU, small: no figure of it means anything

Cases are gpu_cases.py's. Ours and the eager torch form see the same fresh inputs; a case whose error is beyond the eager
form's and what it grants is reported and not timed. Times are µs a call, p20/p50/p80 over replays of a CUDA graph in which
every call reads other inputs than the one before, so that they come from memory and not from L2; what synchronises is timed
by the clock. The floor is roofline.py's with the bandwidth measured here; the case furthest from it is profiled.

Written to the folder: gpu.json (all of it), gpu.csv (a row a case), profile.txt.
"""

import argparse
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402

L2_TIMES = 2
MOST_SETS = 64
REPLAYS = 30


@dataclass
class Row:
    """What was found of a case; times are µs, None where there is none."""

    case: str
    error: float | None = None
    eager_error: float | None = None
    passed: bool = False
    why: str = ""
    backend_launches: int | None = None
    ours_us: float | None = None
    ours_p20_us: float | None = None
    ours_p80_us: float | None = None
    ours_uncaptured_us: float | None = None
    others_us: dict[str, float] = field(default_factory=dict)
    floor_us: float | None = None
    limit: str = ""
    goal_us: float | None = None


class Timer:
    """Times calls over several sets of inputs: by a graph and events on a GPU, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def clocked(self, call: Callable[..., object], sets: list[Any], repeats: int) -> list[float]:
        times = []
        for repeat in range(repeats + 1):
            self.synchronize()
            begin = time.perf_counter()
            call(*sets[repeat % len(sets)])
            self.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return times[1:]

    def captured(self, call: Callable[..., object], sets: list[Any]) -> list[float]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for inputs in sets[:3]:
                call(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for inputs in sets:
                call(*inputs)
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(sets))
        return times


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))]


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    scale = exact.abs().max()
    found = float((got.double() - exact).abs().max() / scale) if scale > 0 else float(got.double().abs().max())
    return found if math.isfinite(found) else math.inf


# --- the steps --------------------------------------------------------------------------------------------------------


def build() -> str:
    """Both libraries, in place; what the build said of a library that there is not."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = "\n".join(line for line in done.stderr.splitlines() if line.startswith("spectral_kernels:"))
    return said if done.returncode == 0 else f"setup.py failed: {done.stderr[-500:]}"


def environment(device: torch.device) -> dict[str, Any]:
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    import triton

    found: dict[str, Any] = {
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "cuda": torch.version.cuda, "commit": os.environ.get("COMMIT") or said("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
            "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }  # fmt: skip
    return found


def ceilings(timer: Timer) -> dict[str, float]:
    """A large copy in byte/s, read and written, and square products in flop/s, on random data."""
    side, elements = (8192, 1 << 28) if timer.on_gpu else (128, 1 << 16)

    def seconds(call: Callable[..., object], *inputs: torch.Tensor) -> float:
        return statistics.median(timer.clocked(call, [inputs], 20)) * 1e-6

    source = torch.randn(elements, device=timer.device)
    found = {"copy": 8 * elements / seconds(torch.Tensor.copy_, torch.empty_like(source), source)}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        square = torch.randn(side, side, device=timer.device).to(dtype)
        found[name] = 2 * side**3 / seconds(torch.matmul, square, square)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def check(case: Any, row: Row, generator: torch.Generator, device: torch.device) -> None:
    """Sets `passed`, the errors and, where it failed, why."""
    inputs = case.make(generator, device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ours, eager = case.ours(*inputs), case.eager(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    if case.score is not None:
        reached, usual = case.score(inputs, ours), case.score(inputs, eager)
        row.error, row.eager_error = reached, usual
        row.passed = reached >= case.share * usual and len(set(ours.tolist())) == len(ours)
        row.why = "" if row.passed else f"reaches {reached:.5g}, the eager loop {usual:.5g}; or rows repeat"
        return
    exact = case.exact(*inputs)
    row.error, row.eager_error = relative_error(ours, exact), relative_error(eager, exact)
    row.passed = row.error <= 2 * row.eager_error + case.allowed
    row.why = "" if row.passed else f"error {row.error:.1e}, the eager form's {row.eager_error:.1e}"


def measure(case: Any, row: Row, generator: torch.Generator, timer: Timer, compiled: bool) -> None:
    one = case.make(generator, timer.device)
    size = sum(part.numel() * part.element_size() for part in one)
    l2 = torch.cuda.get_device_properties(timer.device).L2_cache_size if timer.on_gpu else 0
    count = min(MOST_SETS, max(3, math.ceil(L2_TIMES * l2 / size)))
    sets = [one] + [case.make(generator, timer.device) for _ in range(count - 1)]
    contenders = {"ours": case.ours, "eager": case.eager, **case.peers}
    if case.compiled and compiled:
        contenders["torch.compile"] = torch.compile(case.eager)
    for label, call in contenders.items():
        try:
            if timer.on_gpu and label not in case.synchronises and not (label == "eager" and case.score):
                times = timer.captured(call, sets)
            else:
                times = timer.clocked(call, sets, 5 if label != "ours" else 10)
        except RuntimeError as error:
            torch.cuda.synchronize() if timer.on_gpu else None
            if label == "ours":
                row.passed, row.why = False, f"not captured: {str(error).splitlines()[0]}"
                return
            times = timer.clocked(call, sets, 5)
        if label == "ours":
            row.ours_p20_us, row.ours_us, row.ours_p80_us = (quantile(times, q) for q in (0.2, 0.5, 0.8))
            row.ours_uncaptured_us = statistics.median(timer.clocked(call, sets, 20))
        else:
            row.others_us[label] = statistics.median(times)


def kernels_of(case: Any, generator: torch.Generator, device: torch.device) -> tuple[int, str]:
    """How many kernels and fills a call launches, and the profiler's table of them."""
    from torch.profiler import ProfilerActivity, profile

    inputs = case.make(generator, device)
    case.ours(*inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        case.ours(*inputs)
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25)


def loss_memory(device: torch.device) -> str:
    """Peak memory of InfoNCE at B = 65536, forward and backward, in matrices (B, d) of float32."""
    import spectral_kernels as sk

    b, d = 65536, 128
    query, key = (torch.randn(b, d, device=device, requires_grad=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sk.info_nce(query, key).backward()
    torch.cuda.synchronize()
    matrices = (torch.cuda.max_memory_allocated() - before) / (4 * b * d)
    verdict = "O(B d)" if matrices <= 12 else "TOO MUCH"
    return f"InfoNCE at B = {b}, d = {d}, both passes: {matrices:.1f} matrices (B, d) at the peak, {verdict}"


# --- the report -------------------------------------------------------------------------------------------------------


def printed(rows: list[Row]) -> list[str]:
    width = max((len(row.case) for row in rows), default=0)
    lines = [
        f"{'µs a call':{width}}     p20     p50     p80  eager*  launches   floor share   goal   others take, times ours"
    ]
    for row in rows:
        if not row.passed:
            lines.append(f"{row.case:{width}}  NOT TIMED: {row.why}")
            continue
        if row.ours_us is None or row.floor_us is None:
            continue
        others = ", ".join(f"{label} {value / row.ours_us:.2f}" for label, value in row.others_us.items())
        goal = "" if row.goal_us is None else f"{row.goal_us:.0f} {'met' if row.ours_us <= row.goal_us else 'NOT MET'}"
        lines.append(
            f"{row.case:{width}} {row.ours_p20_us:7.1f} {row.ours_us:7.1f} {row.ours_p80_us:7.1f} "
            f"{row.ours_uncaptured_us:7.1f} {row.backend_launches or 0:9d} {row.floor_us:7.1f} "
            f"{100 * row.floor_us / row.ours_us:4.0f} %  {goal:11} {others}"
        )
    return [*lines, "* uncaptured, called from Python and waited for"]


def write(folder: Path, found: dict[str, Any], rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    with (folder / "gpu.csv").open("w", newline="") as file:
        names = [name for name in asdict(Row("")) if name != "others_us"]
        labels = list(dict.fromkeys(label for row in rows for label in row.others_us))
        writer = csv.writer(file)
        writer.writerow([*names, *(f"{label}_us" for label in labels)])
        for row in rows:
            values = asdict(row)
            writer.writerow([*(values[name] for name in names), *(row.others_us.get(label, "") for label in labels)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which no further case is begun")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-build", action="store_true", help="take the libraries as they are")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small sizes")
    options = parser.parse_args()
    begin = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run goes through the steps without one")
    device = torch.device("cpu" if options.dry_run else "cuda")
    said = "" if options.no_build else build()
    print(f"{time.monotonic() - begin:4.0f} s  built. {said}", flush=True)

    from gpu_cases import cases
    from roofline import GPUS, Gpu

    torch.utils.deterministic.fill_uninitialized_memory = True
    timer = Timer(device)
    found = {"environment": environment(device), "ceilings": ceilings(timer), "build": said, "dry_run": options.dry_run}
    name = next((name for name in GPUS if name in str(found["environment"].get("gpu", ""))), "H100")
    gpu: Gpu = replace(GPUS[name], bandwidth=found["ceilings"]["copy"])
    print(json.dumps(found["environment"]), json.dumps({k: f"{v:.3g}" for k, v in found["ceilings"].items()}), sep="\n")

    generator = torch.Generator(device=device).manual_seed(int(time.time()))
    rows = [Row(case.name, goal_us=case.goal) for case in cases(options.dry_run) if options.only in case.name]
    by_name = {case.name: case for case in cases(options.dry_run)}
    for row in rows:
        if time.monotonic() - begin > options.limit:
            row.why = "out of time"
            continue
        case = by_name[row.case]
        try:
            check(case, row, generator, device)
            if row.passed:
                if timer.on_gpu:
                    row.backend_launches, _ = kernels_of(case, generator, device)
                measure(case, row, generator, timer, timer.on_gpu and not options.no_compile)
                seconds, row.limit = case.work.floor(gpu)
                row.floor_us = seconds * 1e6
        except Exception as error:  # the others are still worth their time
            row.passed, row.why = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{time.monotonic() - begin:4.0f} s  {row.case}  {row.why or f'{row.ours_us:.1f} µs'}", flush=True)
        write(options.out, found, rows)
    if timer.on_gpu:
        timed = [row for row in rows if row.passed and row.ours_us and row.floor_us]
        if timed:
            worst = min(timed, key=lambda row: row.floor_us / row.ours_us)
            (options.out / "profile.txt").write_text(
                f"{worst.case}\n{kernels_of(by_name[worst.case], generator, device)[1]}"
            )
            print(f"furthest from its floor, profiled: {worst.case}")
        found["memory"] = loss_memory(device)
        print(found["memory"])
    write(options.out, found, rows)
    print(f"\n{name}'s rates, copy as measured; torch {torch.__version__}, commit {found['environment']['commit']}")
    if options.dry_run:
        print("A dry run: small sizes on the CPU beside the floors of the full ones; no figure below means anything.")
    print("\n".join(printed(rows)))
    failed = [row for row in rows if not row.passed]
    print(f"{len(rows) - len(failed)} of {len(rows)} cases passed their check, {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
