"""Hardware counters of the kernels in doubt, by ncu, a case at a time."""

import os
import shutil
import subprocess
import sys

import torch

from gpu.context import Context

CASES = (
    "covariance 65536x128 fp32",
    "covariance 16384x2048 bf16",
    "greedy_select effective_rank 256 of 4096x128, all rows",
    "spectrum 64x(256x128) fp32",
    "info_nce_grad_norms 4096x128 bf16",
    "batch_effective_rank order 2 64x(256x128) fp32",
)
METRICS = ",".join((
    "gpu__time_duration.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum", "sm__inst_executed_pipe_fma.sum", "sm__inst_executed_pipe_fp64.sum",
    "smsp__inst_executed.sum", "launch__registers_per_thread", "launch__grid_size", "launch__block_size",
    "launch__shared_mem_per_block", "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio",
))  # fmt: skip


def one(context: Context, name: str) -> int:
    from gpu_cases import cases

    case = next(case for case in cases(context.tiny) if case.name == name)
    inputs = case.make(torch.Generator(device=context.device).manual_seed(0), context.device)
    case.ours(*inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    case.ours(*inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def run(context: Context) -> int:
    name = os.environ.get("GPU_CHECK_CASE")
    if name is not None:
        return one(context, name)
    ncu = shutil.which("ncu")
    if ncu is None or not context.on_gpu:
        context.write(skipped="there is no ncu" if ncu is None else "there is no GPU")
        return 0
    for name in [name for name in CASES if context.only in name]:
        if context.left < 5:
            context.write(case=name, skipped="out of time")
            continue
        done = subprocess.run(
            [ncu, "--profile-from-start", "off", "--clock-control", "none", "--metrics", METRICS,
             "--print-units", "base", sys.executable, *sys.argv],
            env=os.environ | {"GPU_CHECK_CASE": name}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        with (context.folder / "ncu.txt").open("a") as file:
            file.write(f"## {name}\n{done.stdout}\n")
        context.write(case=name, returncode=done.returncode, said=done.stderr[-200:])
    return 0
