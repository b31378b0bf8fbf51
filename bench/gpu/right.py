"""The op tests on the device: pytest over python_tests, a line for every test that failed."""

import os
import subprocess
import sys
from pathlib import Path

from gpu.context import Context

ROOT = Path(__file__).resolve().parents[2]
# whose tensors are made on the device; the others hold to the interpreter, or read machine code
FILES = ("on_gpu", "registry", "greedy", "effective_rank", "infonce_queue_gradient")


def run(context: Context) -> int:
    device = context.device.type
    workers = 2 if context.tiny else min(16, os.cpu_count() or 1)
    command = [
        sys.executable, "-m", "pytest", *(f"python_tests/ops/test_{name}.py" for name in FILES), "-q",
        "--device", device, "-n", str(workers),
        "--results", str(context.folder / "results.jsonl"), "-p", "no:cacheprovider", "--tb", "short",
    ]  # fmt: skip
    if context.tiny:
        command += ["-m", "not slow", "-k", "test_kinds and (covariance or greedy) and triton and unit"]
    else:
        command += ["-m", "not slow or gpu", "-k", context.only or "triton or cuda or gpu", "--dist", "worksteal"]
    if context.on_gpu:
        # a deadlock in a kernel must not hold up the others; the thread method ends the worker, xdist starts another
        command += ["--timeout", "60", "--timeout-method", "thread"]
    # float64 on the CPU beside: a thread each, or the workers wait for one another
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if context.on_gpu else {})
    # of a pytest that this runs in
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (context.folder / "right.txt").write_text(done.stdout[-2_000_000:] + done.stderr[-200_000:])
    last = done.stdout.strip().splitlines()[-1:]
    context.write(pytest=last[0] if last else done.stderr[-500:], returncode=done.returncode)
    return 0 if done.returncode == 0 else 1
