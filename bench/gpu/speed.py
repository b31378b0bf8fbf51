"""Our ops on every case: checked, then timed in a graph and from Python, and the routes that could run instead."""

import math
from typing import Any

import torch

from gpu.context import Context
from gpu.timing import Sets, captured, clocked, enqueued, quantiles, sets_for


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    scale = exact.abs().max()
    found = float((got.double() - exact).abs().max() / scale) if scale > 0 else float(got.double().abs().max())
    return found if math.isfinite(found) else math.inf


def check(case: Any, label: str, call: Any, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """`passed`, the error and the eager form's; of a selection what it reaches."""
    ours, eager = call(*inputs), case.eager(*inputs)
    if case.score is not None:
        error, eager_error = case.score(inputs, ours), case.score(inputs, eager)
        passed = error >= case.share * eager_error and len(set(ours.tolist())) == len(ours)
    else:
        exact = case.exact(*inputs)
        error, eager_error = relative_error(ours, exact), relative_error(eager, exact)
        passed = error <= 2 * eager_error + (case.allowed if label == "ours" else case.grants.get(label, case.allowed))
    return {"passed": passed, "error": float(f"{error:.3g}"), "eager_error": float(f"{eager_error:.3g}")}


def time_call(call: Any, sets: Sets, context: Context, in_graph: bool = True) -> dict[str, Any]:
    """µs a call: in a graph where that can be, else by the clock."""
    if context.on_gpu and in_graph:
        return {"timer": "graph", **quantiles(captured(call, sets))}
    return {"timer": "clock", **quantiles(clocked(call, sets, context.device))}


def run(context: Context) -> int:
    if context.plant == "wrong":
        plant_wrong_covariance()
    generator = torch.Generator(device=context.device).manual_seed(torch.seed() % 2**31)
    # what a kernel leaves unwritten is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    failed = 0
    for case in context.cases():
        if context.left < 0:
            context.write(case=case.name, skipped="out of time")
            continue
        for label, call in {"ours": case.ours, **case.routes}.items():
            found: dict[str, Any] = {"case": case.name, "what": label}
            try:
                torch.use_deterministic_algorithms(True, warn_only=True)
                found |= check(case, label, call, case.make(generator, context.device))
                torch.use_deterministic_algorithms(False)
                if found["passed"]:
                    count = sets_for(case.work.bytes, context.device)
                    sets = [case.make(generator, context.device) for _ in range(count)]
                    found |= time_call(call, sets, context, label not in case.synchronises)
                    if label == "ours":
                        calls = 40 if found["us"] < 5e3 else 3
                        found["from_python_us"] = round(enqueued(call, sets, context.device, calls), 1)
                    del sets
            except Exception as error:  # the other cases are still worth their time; a sticky error fails them all
                found |= {"passed": False, "failed": f"{type(error).__name__}: {error}"[:400]}
            failed += label == "ours" and not found["passed"]
            context.write(**found)
            if context.plant == "crash":
                import os

                os.abort()
    return 1 if failed else 0


def plant_wrong_covariance() -> None:
    import spectral_kernels as sk

    right = sk.covariance
    sk.covariance = lambda *inputs, **options: 1.1 * right(*inputs, **options)
