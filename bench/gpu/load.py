"""Versions, both libraries, the card's ceilings, one call of each op. A library that is missing ends the whole run."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from gpu.context import Context
from gpu.timing import clocked

ROOT = Path(__file__).resolve().parents[2]


def said(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "triton": importlib.metadata.version("triton"),
        # a copied tree may have no git
        "commit": os.environ.get("COMMIT") or said("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
    }  # fmt: skip
    if context.on_gpu:
        card = torch.cuda.get_device_properties(context.device)
        found |= {
            "gpu": card.name, "capability": f"{card.major}.{card.minor}", "multiprocessors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
            "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }  # fmt: skip
    return found


def ceilings(context: Context) -> dict[str, float]:
    """A large copy in byte/s, read and written, and square products in flop/s, on random data."""
    side, elements = (8192, 1 << 28) if context.on_gpu else (128, 1 << 16)

    def seconds(call: Any, *inputs: torch.Tensor) -> float:
        return statistics.median(clocked(call, [inputs], context.device, 0.2)) * 1e-6

    source = torch.randn(elements, device=context.device)
    found = {"copy": 8 * elements / seconds(torch.Tensor.copy_, torch.empty_like(source), source)}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        square = torch.randn(side, side, device=context.device).to(dtype)
        found[name] = 2 * side**3 / seconds(torch.matmul, square, square)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def run(context: Context) -> int:
    from spectral_kernels.dispatch import backends

    context.write(environment=environment(context))
    missing = {"C++": backends.CPP_ERROR}
    if context.on_gpu:
        missing["CUDA"] = backends.CUDA_ERROR
    if context.plant == "missing":
        missing["CUDA"] = "planted: the CUDA library was not built"
    missing = {name: reason for name, reason in missing.items() if reason is not None}
    if missing:
        context.write(missing=missing)
        return 1
    import spectral_kernels as sk

    z = torch.randn(512, 64, device=context.device)
    for name, call in {
        "covariance": lambda: sk.covariance(z),
        "spectrum": lambda: sk.spectrum(z),
        "effective_rank": lambda: sk.effective_rank(z, order=2),
        "whiten": lambda: sk.whiten(z),
        "greedy_select": lambda: sk.greedy_select(z, 16).indices,
        "nt_xent": lambda: sk.nt_xent(z, z.flip(0)),
    }.items():
        begin = time.perf_counter()
        finite = bool(call().isfinite().all())
        context.write(first_call=name, seconds=round(time.perf_counter() - begin, 2), finite=finite)
    context.write(ceilings=ceilings(context))
    return 0
