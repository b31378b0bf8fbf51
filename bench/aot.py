"""Compile every shipped Triton configuration to a cubin for sm_80, sm_90 and sm_100, with no GPU, and hold it to a budget.

    python bench/aot.py              compare with bench/aot_budget.json
    python bench/aot.py --update     rewrite it
    python bench/aot.py --only tiles --arch 90

Each `triton.py` lists in `aot_calls()` what to launch on meta tensors; the launches are recorded (`ops/_triton.py`) and
compiled one by one. Registers, stack and shared memory are read back from the cubin. It fails on a kernel or a
configuration that no call reaches, on stack use (spills) in sm_90, on shared memory above the architecture's, and, under
the Triton that wrote the budget, on more registers or shared memory than it grants.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("aot.py compiles: unset TRITON_INTERPRET")

# said once per process by newer Tritons; both settings compile here
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
warnings.filterwarnings("ignore", module="triton")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from spectral_kernels.ops._triton import Configuration, Record, recording  # noqa: E402

BUDGET = ROOT / "bench" / "aot_budget.json"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
Usage = dict[str, int]


def kernel_modules() -> list[ModuleType]:
    """Every module of the package that holds Triton kernels."""
    paths = [ROOT / "spectral_kernels" / "ops" / "_triton.py"]
    paths += sorted((ROOT / "spectral_kernels" / "ops").glob("*/triton.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [importlib.import_module(name) for name in names]


def key_of(record: Record) -> str:
    """Name of one compiled variant: kernel, dtypes of its tensors ("-" for none) and constants."""
    tensors = []
    for name, kind in record.signature.items():
        if kind.startswith("*"):
            tensors.append(kind[1:])
        elif record.constants.get(name, 0) is None:
            tensors.append("-")
    constants = []
    for name, value in record.constants.items():
        if name.isupper():
            if value is True:
                constants.append(name)
            elif value is not False:
                constants.append(f"{name}={value}")
    warps = f"warps={record.configuration.num_warps} stages={record.configuration.num_stages}"
    return f"{record.kernel.fn.__name__}({' '.join(tensors)}) {' '.join(constants)} {warps}"


def shipped_kernels(module: ModuleType) -> Iterator[Any]:
    for name, value in vars(module).items():
        if (
            isinstance(value, triton.JITFunction)
            and name.endswith("_kernel")
            and value.fn.__module__ == module.__name__
        ):
            yield value


def collect() -> tuple[dict[str, Record], list[str]]:
    """Variants by key, and complaints about kernels and configurations that nothing reaches."""
    modules = kernel_modules()
    with recording() as records:
        for module in modules:
            for call in module.aot_calls():
                call()
    complaints = []
    kernels = {record.kernel.fn.__qualname__ for record in records}
    used = {id(record.configuration) for record in records}
    for module in modules:
        for kernel in shipped_kernels(module):
            if kernel.fn.__qualname__ not in kernels:
                complaints.append(f"{module.__name__}: no aot call reaches {kernel.fn.__qualname__}")
        configurations: dict[str, Configuration] = module.CONFIGURATIONS
        for name, configuration in configurations.items():
            if id(configuration) not in used:
                complaints.append(f"{module.__name__}: no aot call reaches configuration {name!r}")
    variants: dict[str, Record] = {}
    for record in records:
        variants.setdefault(key_of(record), record)
    return variants, complaints


def compile_variant(record: Record, architecture: int) -> Usage:
    """Registers, stack bytes and shared bytes of one variant."""
    source = ASTSource(record.kernel, record.signature, record.constants, record.attributes)
    options = {"num_warps": record.configuration.num_warps, "num_stages": record.configuration.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", listing)}
    return {"registers": found["REG"], "stack": found["STACK"], "shared": int(compiled.metadata.shared)}


_variants: dict[str, Record] = {}


def _collect_in_worker() -> None:
    _variants.update(collect()[0])


def _compile_key(key: str, architecture: int) -> Usage | str:
    try:
        return compile_variant(_variants[key], architecture)
    except Exception as error:  # the table shows it, and the run fails
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compile_all(keys: list[str], architectures: list[int], jobs: int) -> dict[str, dict[str, Usage | str]]:
    results: dict[str, dict[str, Usage | str]] = {key: {} for key in keys}
    with ProcessPoolExecutor(jobs, initializer=_collect_in_worker) as pool:
        futures = {
            (key, architecture): pool.submit(_compile_key, key, architecture)
            for key in keys
            for architecture in architectures
        }
        for (key, architecture), future in futures.items():
            results[key][str(architecture)] = future.result()
    return results


def judge(key: str, architecture: int, usage: Usage | str, granted: Usage | None) -> list[str]:
    """What is wrong with one result."""
    where = f"sm_{architecture} {key}"
    if isinstance(usage, str):
        return [f"{where}: does not compile: {usage}"]
    wrong = []
    if architecture == 90 and usage["stack"] > 0:
        wrong.append(f"{where}: {usage['stack']} bytes of stack (spills)")
    if usage["shared"] > SHARED_LIMIT[architecture]:
        wrong.append(f"{where}: {usage['shared']} bytes of shared memory, above {SHARED_LIMIT[architecture]}")
    for name in ("registers", "stack", "shared") if granted is not None else ():
        if granted is not None and usage[name] > granted[name]:
            wrong.append(f"{where}: {name} {usage[name]}, budget {granted[name]}")
    return wrong


def print_table(results: dict[str, dict[str, Usage | str]]) -> None:
    print("registers / stack bytes / shared bytes")
    for key, by_architecture in results.items():
        cells = []
        for architecture, usage in by_architecture.items():
            cell = "fails" if isinstance(usage, str) else f"{usage['registers']}/{usage['stack']}/{usage['shared']}"
            cells.append(f"sm_{architecture} {cell:>14}")
        print("  ".join(cells), " ", key)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite the budget")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    variants, complaints = collect()
    keys = [key for key in variants if options.only in key]
    whole = not options.only and set(options.arch) == set(ARCHITECTURES)
    if options.update and not whole:
        parser.error("--update needs every variant and architecture")
    results = compile_all(keys, options.arch, options.jobs)
    print_table(results)
    budget = (
        json.loads(BUDGET.read_text()) if BUDGET.exists() and not options.update else {"triton": "", "variants": {}}
    )
    same_triton = budget["triton"] == triton.__version__
    for key, by_architecture in results.items():
        granted = budget["variants"].get(key)
        if granted is None and not options.update:
            complaints.append(f"not in {BUDGET.name}: {key}")
        for architecture, usage in by_architecture.items():
            allowed = granted[architecture] if granted is not None and same_triton else None
            complaints += judge(key, int(architecture), usage, allowed)
    if whole:
        complaints += [
            f"{BUDGET.name} lists what is not shipped: {key}" for key in budget["variants"] if key not in variants
        ]
    if options.update and not any(isinstance(usage, str) for row in results.values() for usage in row.values()):
        BUDGET.write_text(json.dumps({"triton": triton.__version__, "variants": results}, indent=1) + "\n")
    for complaint in complaints:
        print("FAIL", complaint)
    spills = sum(
        not isinstance(usage, str) and usage["stack"] > 0 for row in results.values() for usage in row.values()
    )
    print(f"triton {triton.__version__}: {len(keys)} variants on {len(options.arch)} architectures, "
          f"{spills} use stack, {len(complaints)} failures")  # fmt: skip
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
