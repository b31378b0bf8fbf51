"""compute-sanitizer over small calls of every op: memory, races, barriers."""

import os
import shutil
import subprocess
import sys

import torch

from gpu.context import Context

TOOLS = ("memcheck", "racecheck", "synccheck")


def calls(context: Context) -> int:
    """Every op once, both passes, at sizes that leave parts of tiles empty."""
    import spectral_kernels as sk

    torch.manual_seed(0)
    z = torch.randn(300, 65, device=context.device)
    wide = torch.randn(700, 130, device=context.device, dtype=torch.bfloat16)
    for rows in (z, wide):
        leaf = rows.clone().requires_grad_()
        for call in (
            lambda x: sk.covariance(x, normalize=True).sum(),
            lambda x: sk.effective_rank(x, order=2),
            lambda x: sk.effective_rank(x),
            lambda x: sk.whiten(x, shrinkage=0.01).square().sum(),
            lambda x: sk.nt_xent(x, x.roll(1, 0)),
            lambda x: sk.info_nce(x[:100], x[100:200], queue=x[200:]),
            lambda x: sk.batch_effective_rank(x, torch.arange(200, device=x.device).view(4, 50)).sum(),
        ):
            call(leaf).backward()
        sk.info_nce_grad_norms(rows, rows.roll(1, 0))
        for objective in ("effective_rank", "logdet"):
            for candidates in (None, 16):
                for backend in ("triton", "cuda"):
                    sk.greedy_select(rows, 24, candidates=candidates, objective=objective, backend=backend)
    torch.cuda.synchronize()
    return 0


def run(context: Context) -> int:
    if os.environ.get("GPU_CHECK_CALLS"):
        return calls(context)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or not context.on_gpu:
        context.write(skipped="there is no compute-sanitizer" if sanitizer is None else "there is no GPU")
        return 0
    running = {
        tool: subprocess.Popen(
            [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", sys.executable, *sys.argv],
            env=os.environ | {"GPU_CHECK_CALLS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=(context.folder / f"sanitize_{tool}.txt").open("w"), stderr=subprocess.STDOUT,
        )
        for tool in TOOLS
    }  # fmt: skip
    codes = {tool: process.wait() for tool, process in running.items()}
    for tool, code in codes.items():
        lines = (context.folder / f"sanitize_{tool}.txt").read_text().splitlines()
        context.write(tool=tool, returncode=code, last=lines[-1:], found=[x for x in lines if "Error" in x][:5])
    return 1 if any(codes.values()) else 0
