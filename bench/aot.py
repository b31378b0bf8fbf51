"""Compile every shipped GPU kernel to a cubin for sm_80, sm_90 and, a variant each, sm_100, with no GPU; hold it to rules.

    python bench/aot.py
    python bench/aot.py --only tiles --arch 90

Modules list in `aot_calls()` what to launch on meta tensors; the launches are recorded as Triton types and specialises
them on a GPU (`kernels/launch.py`) and compiled one by one; csrc/*.cu are compiled where there is an nvcc, for
sm_90a too. What a cubin takes and does is read back: registers, stack, shared memory, matrix instructions, and the bytes
that its loops load from global memory by instructions of 4 bytes and less, and by all. It fails

- on a kernel or a configuration that no call reaches;
- in sm_90 on more stack (spills) than configurations have that were the fastest of their kind on an H100, and on shared
  memory above the architecture's;
- on tensor-core arithmetic without a matrix instruction;
- where the loops of a product load more than 35 % of their bytes by instructions of 4 bytes and less: scales, masks and
  lookups may be such, the data may not.

`make aot` runs it under the newest Triton, `make check-torch` under the one that the oldest torch brings.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import warnings
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

import setup  # noqa: E402
from spectral_kernels.kernels.launch import Configuration, Record, recording  # noqa: E402

ARCHITECTURES = (80, 90, 100)
# one variant a kernel: nothing is promised of these yet
BRIEFLY = (100,)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Usage = dict[str, int]

# HMMA of Ampere, HGMMA of Hopper, DMMA of float64, UTCHMMA and the like of Blackwell
MATRIX = re.compile(r"\w*MMA\b")
NARROW_SHARE = 0.35
# bytes a thread
STACK_LIMIT = 512


def kernel_modules() -> list[ModuleType]:
    """Every module of the package that holds Triton kernels, or calls that launch them."""
    holds = re.compile(r"^@triton\.jit|^def aot_calls\(", re.MULTILINE)
    paths = sorted(p for p in (ROOT / "spectral_kernels").rglob("*.py") if holds.search(p.read_text("utf-8")))
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


def shipped_kernels(module: ModuleType) -> list[Any]:
    own = [value for name, value in vars(module).items() if name.endswith("_kernel")]
    return [it for it in own if isinstance(it, triton.JITFunction) and it.fn.__module__ == module.__name__]


def collect() -> tuple[dict[str, Record], list[str]]:
    """Variants by key, and complaints about kernels and configurations that nothing reaches."""
    modules = kernel_modules()
    with recording() as records:
        for module in modules:
            for call in getattr(module, "aot_calls", list)():
                call()
    complaints = []
    kernels = {record.kernel.fn.__qualname__ for record in records}
    used = {id(record.configuration) for record in records}
    for module in modules:
        for kernel in shipped_kernels(module):
            if kernel.fn.__qualname__ not in kernels:
                complaints.append(f"{module.__name__}: no aot call reaches {kernel.fn.__qualname__}")
        configurations: dict[str, Configuration] = getattr(module, "CONFIGURATIONS", {})
        for name, configuration in configurations.items():
            if id(configuration) not in used:
                complaints.append(f"{module.__name__}: no aot call reaches configuration {name!r}")
    variants: dict[str, Record] = {}
    for record in records:
        variants.setdefault(key_of(record), record)
    return variants, complaints


def said(tool: str, *arguments: str) -> str:
    """What one of the tools that come with Triton prints."""
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: str) -> list[tuple[str, bool]]:
    """Opcodes of a cubin in order, each with whether it stands in a loop."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in said("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"(\.L\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(re.sub(r"^@!?U?P\d+\s+", "", instruction[1]))
    looped = [False] * len(instructions)
    for place, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?\(?(\.L\w+)", instruction)
        if target and labels.get(target[1], place) < place:
            looped[labels[target[1]] : place + 1] = [True] * (place + 1 - labels[target[1]])
    return [(instruction.split()[0], inside) for instruction, inside in zip(instructions, looped, strict=True)]


def loads_and_matrices(cubin: str) -> Usage:
    """Bytes a thread loads from global memory by the instructions of loops, and the number of matrix instructions."""
    found = {"matrix": 0, "narrow_bytes": 0, "loop_bytes": 0}
    for opcode, inside in disassemble(cubin):
        found["matrix"] += MATRIX.match(opcode) is not None
        if inside and opcode.startswith(("LDG", "LDGSTS")):
            width = re.search(r"\.(128|64|[US]16|[US]8)\b", opcode)
            size = int(re.sub(r"\D", "", width[1])) // 8 if width else 4
            found["loop_bytes"] += size
            found["narrow_bytes"] += size if size <= 4 else 0
    return found


def compile_variant(record: Record, architecture: int) -> Usage:
    """What one variant takes and does."""
    source = ASTSource(record.kernel, record.signature, record.constants, record.attributes)
    options = {"num_warps": record.configuration.num_warps, "num_stages": record.configuration.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = said("cuobjdump", "-res-usage", file.name)
        more = loads_and_matrices(file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", listing)}
    return {"registers": found["REG"], "stack": found["STACK"], "shared": int(compiled.metadata.shared), **more}


# --- csrc/*.cu ------------------------------------------------------------------------------------------------------


def compile_cuda() -> tuple[str, dict[str, dict[str, Usage | str]]]:
    """nvcc's version and usage by kernel and architecture; "" and nothing where there is no nvcc."""
    try:
        cuda = setup.find_cuda()
        tools = setup.find_toolchain()
    except setup.NotBuilt as error:
        print(f"csrc/*.cu are not compiled: {error}")
        return "", {}
    results: dict[str, dict[str, Usage | str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            target = f"{folder}/{source.stem}.o"
            command = setup.cuda_command(source, tools, cuda, (*cuda.architectures, "90a"))
            setup.run([*command, "-o", target], f"csrc/{source.name}")
            listing = said("cuobjdump", "-res-usage", target)
            names = subprocess.run(["c++filt"], input=listing, capture_output=True, text=True, check=True).stdout
            architecture = ""
            for line in names.splitlines():
                if found := re.match(r"arch = sm_(\w+)", line):
                    architecture = found[1]
                elif found := re.search(r"Function (.*):$", line):
                    key = kernel_name(found[1])
                elif values := dict(re.findall(r"(REG|STACK|SHARED):(\d+)", line)):
                    results.setdefault(key, {})[architecture] = {
                        "registers": int(values["REG"]), "stack": int(values["STACK"]), "shared": int(values["SHARED"]),
                    }  # fmt: skip
    return cuda.version, results


def kernel_name(demangled: str) -> str:
    """`small_spectrum_kernel<SmallSpectrum<float, 32, 8>, float>`, without namespaces and arguments."""
    name = re.sub(r"\b[\w ()]+::", "", demangled.replace("(anonymous namespace)", "anonymous"))
    return re.sub(r"^void ", "", name[: name.rindex("(")])


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
        first = {key.split("(")[0]: key for key in reversed(keys)}
        futures = {
            (key, architecture): pool.submit(_compile_key, key, architecture)
            for key in keys
            for architecture in architectures
            if architecture not in BRIEFLY or key in first.values()
        }
        for (key, architecture), future in futures.items():
            results[key][str(architecture)] = future.result()
    return results


def judge(key: str, architecture: str, usage: Usage | str) -> list[str]:
    """What is wrong with one result."""
    where = f"sm_{architecture} {key}"
    if isinstance(usage, str):
        return [f"{where}: does not compile: {usage}"]
    wrong = []
    if architecture.startswith("90") and usage["stack"] > STACK_LIMIT:
        wrong.append(f"{where}: {usage['stack']} bytes of stack (spills), more than {STACK_LIMIT}")
    limit = SHARED_LIMIT[int(architecture.rstrip("a"))]
    if usage["shared"] > limit:
        wrong.append(f"{where}: {usage['shared']} bytes of shared memory, above {limit}")
    if uses_tensor_cores(key) and usage["matrix"] == 0:
        wrong.append(f"{where}: no matrix instruction")
    if "PRECISION=" in key and usage["narrow_bytes"] > NARROW_SHARE * usage["loop_bytes"]:
        wrong.append(
            f"{where}: loops load {usage['narrow_bytes']} of {usage['loop_bytes']} bytes by 4 and less at a time"
        )
    return wrong


def uses_tensor_cores(key: str) -> bool:
    """Products of half precision, of float32 in another precision than ieee, and of float64."""
    return "PRECISION=" in key and (" NATIVE" in key or "ACC=fp64" in key or " PRECISION=ieee" not in key)


def print_table(results: dict[str, dict[str, Usage | str]]) -> None:
    print("registers / stack bytes / shared bytes, matrix instructions")
    for key, by_architecture in results.items():
        cells = []
        for architecture, usage in by_architecture.items():
            cell = "fails"
            if not isinstance(usage, str):
                cell = f"{usage['registers']}/{usage['stack']}/{usage['shared']} {usage.get('matrix', '')}"
            cells.append(f"sm_{architecture} {cell:>17}")
        print("  ".join(cells), " ", key)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only Triton variants whose name contains this")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    whole = not options.only and set(options.arch) == set(ARCHITECTURES)
    variants, complaints = collect()
    results = compile_all([key for key in variants if options.only in key], options.arch, options.jobs)
    print_table(results)
    if whole:
        nvcc, from_csrc = compile_cuda()
        if nvcc:
            print_table(from_csrc)
            results |= from_csrc
    for key, by_architecture in results.items():
        for architecture, usage in by_architecture.items():
            complaints += judge(key, architecture, usage)
    for complaint in complaints:
        print("FAIL", complaint)
    spills = sum(
        not isinstance(usage, str) and usage["stack"] > 0 for row in results.values() for usage in row.values()
    )
    print(f"triton {triton.__version__}: {len(results)} variants, {spills} use stack, {len(complaints)} failures")
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
