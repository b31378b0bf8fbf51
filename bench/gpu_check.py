"""Everything about a GPU in one command: load, compile, check, time, compare, profile.

    python bench/gpu_check.py --out FOLDER                       all phases; needs a GPU, nvcc is not needed, no network
    python bench/gpu_check.py --out FOLDER --phases load,speed   some of them
    python bench/gpu_check.py --rehearse                         on the CPU, small, with planted faults

Each phase is a process of its own with a limit in seconds: a crash, a hang or an error that sticks to the CUDA context
ends that phase only. Results are lines of JSON in FOLDER/results.jsonl, on disk as they come; FOLDER/table.txt is made of
them, and printed, last. A library that is missing ends the run, with exit status 3. The libraries are those that are
there: built elsewhere and carried along, or by `python setup.py build_ext --inplace`.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

# seconds
PHASES = {"load": 45, "warm": 60, "right": 150, "speed": 120, "peers": 60, "profile": 60, "sanitize": 120}
MISSING = 3


def run_phase(name: str, limit: float, options: argparse.Namespace, plant: str = "") -> dict[str, object]:
    """Run a phase in a process session of its own, ended whole when time is up; what became of it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--phase", name, "--out", str(options.out)]
    command += ["--device", options.device, "--limit", str(limit), "--only", options.only, "--plant", plant]
    begin = time.monotonic()
    with (options.out / "log.txt").open("a") as log:
        log.write(f"--- {name}\n")
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | str = process.wait(timeout=limit + 10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "ended at its limit"
    ended = "ok" if code == 0 else f"crashed, signal {-code}" if isinstance(code, int) and code < 0 else str(code)
    return {"phase": name, "ended": ended, "seconds": round(time.monotonic() - begin, 1)}


def run_phases(options: argparse.Namespace, names: list[str], plant: str = "") -> int:
    from gpu.context import append
    from gpu.report import table

    options.out.mkdir(parents=True, exist_ok=True)
    result = 0
    for name in names:
        limit = options.limits.get(name, PHASES[name])
        found = run_phase(name, limit, options, plant)
        append(options.out, **found)
        print(f"{found['phase']:8} {found['seconds']:6} s  {found['ended']}", flush=True)
        if found["ended"] != "ok":
            result = 1
            if name == "load":
                result = MISSING
                break
    text = table(options.out)
    (options.out / "table.txt").write_text(text)
    print(text)
    return result


def rehearse(options: argparse.Namespace) -> int:
    """All phases on the CPU, then again with faults; each must end its own phase only, and be reported."""
    from gpu.context import read

    options.device, wrong = "cpu", []
    root = Path(options.out or tempfile.mkdtemp())

    def go(label: str, phases: list[str], only: str, plant: str = "", **limits: float) -> tuple[int, dict[str, object]]:
        options.out, options.only, options.limits = root / label, only, limits
        print(f"=== {label}", flush=True)
        code = run_phases(options, phases, plant)
        return code, {str(line["phase"]): line["ended"] for line in read(options.out) if "ended" in line}

    def expect(label: str, holds: bool, found: object) -> None:
        if not holds:
            wrong.append(f"{label}: {found}")

    code, ended = go("clean", list(PHASES), "")
    expect("clean", code == 0 and set(ended.values()) == {"ok"} and list(ended) == list(PHASES), ended)
    code, ended = go("crash", ["load", "speed", "peers"], "4096x128 fp32", "crash")
    expect("crash", code == 1 and ended["speed"] == "crashed, signal 6" and ended["peers"] == "ok", ended)
    code, ended = go("hang", ["load", "warm", "profile"], "covariance", "hang", warm=1)
    expect("hang", code == 1 and ended["warm"] == "ended at its limit" and ended["profile"] == "ok", ended)
    code, ended = go("missing", ["load", "speed"], "", "missing")
    expect("missing", code == MISSING and list(ended) == ["load"], ended)
    code, ended = go("wrong", ["load", "speed", "peers"], "covariance", "wrong")
    timed = [line for line in read(options.out) if line["phase"] == "speed" and "us" in line]
    expect("wrong", code == 1 and ended["speed"] == "1" and ended["peers"] == "ok" and not timed, (ended, timed))
    print("\n".join(wrong) or "rehearsed: every planted fault ended its own phase only, and was reported")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--phases", default=",".join(PHASES), help="which, in which order")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--limits", default="", help="other limits, such as right=90,speed=60")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small, with planted faults")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, no figure means anything"
    )
    for hidden in ("--phase", "--plant"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse or options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if options.phase:
        import torch
        from gpu.context import Context

        context = Context(
            options.phase, options.out, torch.device(options.device), options.device == "cpu", options.limit,
            options.only, options.plant,
        )  # fmt: skip
        code: int = importlib.import_module(f"gpu.{options.phase}").run(context)
        return code
    if options.rehearse:
        return rehearse(options)
    if options.out is None:
        parser.error("--out is needed")
    names = options.phases.split(",")
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        parser.error(f"--phases: {', '.join(unknown)} is none of {', '.join(PHASES)}")
    pairs = (part.split("=") for part in options.limits.split(",") if part)
    options.limits = {name: float(limit) for name, limit in pairs}
    return run_phases(options, names)


if __name__ == "__main__":
    raise SystemExit(main())
