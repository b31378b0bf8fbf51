"""What one would call instead: eager torch, library calls, CuPy's and cuSOLVER's eigenvalues; torch.compile last."""

from typing import Any

import torch

from gpu.context import Context
from gpu.speed import time_call
from gpu.timing import sets_for


def cupy_eigenvalues(z: torch.Tensor) -> Any:
    """Those of `spectrum` by cupy.linalg.eigvalsh."""
    import cupy

    x = torch.nn.functional.normalize(z, dim=-1)
    return cupy.linalg.eigvalsh(cupy.from_dlpack(x.mT @ x / z.shape[1]))


def run(context: Context) -> int:
    generator = torch.Generator(device=context.device).manual_seed(0)
    chosen, contenders = context.cases(), []
    for case in chosen:
        contenders.append((case, "eager", case.eager))
        contenders += [(case, label, call) for label, call in case.peers.items()]
        if context.on_gpu and case.name.startswith("spectrum"):
            contenders.append((case, "cupy.linalg.eigvalsh", cupy_eigenvalues))
    if context.on_gpu:
        contenders += [(case, "torch.compile", case.eager) for case in chosen if case.compiled]
    for case, label, call in contenders:
        if context.left < (20 if label == "torch.compile" else 0):
            context.write(case=case.name, what=label, skipped="out of time")
            continue
        found: dict[str, Any] = {"case": case.name, "what": label}
        try:
            if label == "torch.compile":
                torch._dynamo.reset()
                call = torch.compile(call, dynamic=False)
            sets = [case.make(generator, context.device) for _ in range(sets_for(case.work.bytes, context.device))]
            in_graph = label not in (*case.synchronises, "cupy.linalg.eigvalsh")
            try:
                found |= time_call(call, sets, context, in_graph and not (label == "eager" and case.score is not None))
            except RuntimeError as error:  # a capture that failed is no reason to know nothing
                found |= {"not_captured": str(error)[:100]} | time_call(call, sets, context, False)
        except Exception as error:  # one peer's failure is its own
            found["failed"] = f"{type(error).__name__}: {error}"[:300]
        context.write(**found)
    return 0
