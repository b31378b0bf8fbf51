"""The table of a run, made of its lines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from floors import GPUS
from gpu_cases import cases

from gpu.context import read


def cases_table(lines: list[dict[str, Any]], card: str, bandwidth: float) -> list[str]:
    """Two lines and more a case; floors and goals only where a card was measured."""
    gpu = replace(GPUS[next((name for name in GPUS if name in card), "H100")], bandwidth=bandwidth)
    out = []
    for case in cases():
        found = [line for line in lines if line.get("case") == case.name and "what" in line]
        ours = next((line for line in found if line["what"] == "ours"), None)
        if ours is None:
            continue
        if "us" not in ours:
            why = ours.get("failed") or f"error {ours['error']:.1e}, the eager form's {ours['eager_error']:.1e}"
            out.append(f"{case.name}\n    NOT TIMED: {why}")
            continue
        floor, measure = case.work.floor(gpu)[0] * 1e6, ""
        if card:
            measure = f", floor {floor:.1f} = {100 * floor / ours['us']:.0f} %"
        if card and case.goal is not None:
            measure += f", goal {case.goal:.0f} {'met' if ours['us'] <= case.goal else 'NOT MET'}"
        out.append(
            f"{case.name}\n    {ours['us']:.1f} us [{ours['p20']:.1f}, {ours['p80']:.1f}] ({ours['timer']}), from Python "
            f"{ours['from_python_us']:.0f}{measure}; error {ours['error']:.1e} (eager {ours['eager_error']:.1e})"
        )
        for line in found:
            if line is ours:
                continue
            if "us" in line:
                out.append(
                    f"    {line['what']}: {line['us']:.1f} us ({line['timer']}), {line['us'] / ours['us']:.2f}x ours"
                    + (f"; error {line['error']:.1e}" if "error" in line else "")
                )
            else:
                said = line.get("failed") or line.get("skipped") or f"error {line.get('error')}"
                out.append(f"    {line['what']}: no time: {said}")
    return out


def table(folder: Path) -> str:
    lines = read(folder)
    out: list[str] = []
    bandwidth, card = 1.0, ""
    for line in lines:
        for name in ("environment", "ceilings", "missing", "pytest", "tool", "first_call"):
            if name in line:
                out.append(f"{line['phase']}: " + str({k: v for k, v in line.items() if k not in ("phase", "at")}))
        if "ceilings" in line:
            bandwidth = line["ceilings"]["copy"]
        card = line.get("environment", {}).get("gpu", card)
    failed = [line for line in lines if "test" in line and line["outcome"] == "failed"]
    out += [f"FAILED {line['test']}: {line['why']}" for line in failed[:60]]
    out += cases_table(lines, card, bandwidth)
    out += [f"phase {line['phase']}: {line['ended']}, {line['seconds']} s" for line in lines if "ended" in line]
    if not card:
        out.append("On the CPU, small: no figure above means anything.")
    return "\n".join(out) + "\n"
