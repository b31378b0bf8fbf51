"""What code for a GPU must hold and must not: Triton's PTX for sm_90, where barriers and sums can be seen that the
interpreter has none of, and the cubins of csrc/*.cu. No GPU is needed.
"""

import inspect
import re
import subprocess
from pathlib import Path

import pytest
import triton
from process_helpers import ROOT, run_python

from spectral_kernels.ops.greedy import triton as greedy

LIBRARY = ROOT / "spectral_kernels" / "_C_cuda.so"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spectral_kernels.kernels.launch import recording
from spectral_kernels.ops.covariance import triton as covariance
from spectral_kernels.ops.greedy import triton as greedy

def rows(n, d, dtype=torch.float32):
    return torch.empty(1, n, d, dtype=dtype, device="meta")

start = torch.empty(1, 16, dtype=torch.int64, device="meta")
with recording() as records:
    eval(sys.argv[1])
record = [record for record in records if record.kernel.fn.__name__ == sys.argv[2]][0]
source = ASTSource(record.kernel, record.signature, record.constants, record.attributes)
options = {"num_warps": record.configuration.num_warps, "num_stages": record.configuration.num_stages}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def ptx_of(call: str, kernel: str) -> str:
    """Of a kernel that a call launches."""
    return run_python("-W", "ignore", "-c", COMPILE, call, kernel).stdout


def line_of(text: str) -> set[int]:
    """Where it stands in greedy_kernel."""
    source, first = inspect.getsourcelines(greedy.greedy_kernel.fn)
    return {first + place for place, line in enumerate(source) if text in line}


def instructions_of(ptx: list[str], lines: set[int], kind: str) -> list[int]:
    """Instructions of a kind that come from lines of the kernel's module."""
    files = (re.match(r'\.file\s+(\d+)\s+".*/ops/greedy/triton\.py"', line) for line in ptx)
    (module,) = {file[1] for file in files if file}
    found, at, inline = [], 0, False
    for place, line in enumerate(ptx):
        inline = line == "// begin inline asm" or (inline and line != "// end inline asm")
        if location := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            # within inline assembly the lines are counted on
            if not inline:
                at = int(location[2]) if location[1] == module else 0
        elif at in lines and re.match(rf"(@!?%p\d+\s+)?{kind}", line):
            found.append(place)
    return found


def reached_without_barrier(ptx: list[str], begin: int) -> set[int]:
    """Instructions that some path from `begin` reaches without a barrier of the block."""
    labels = {line.split(":")[0]: place for place, line in enumerate(ptx) if re.match(r"\$\w+:", line)}
    reached: set[int] = set()
    left = [begin + 1]
    while left:
        place = left.pop()
        if place in reached or place >= len(ptx) or ptx[place].startswith("bar.sync"):
            continue
        reached.add(place)
        if jump := re.match(r"(@!?%p\d+\s+)?bra(\.uni)?\s+(\$\w+);", ptx[place]):
            left.append(labels[jump[3]])
            if jump[1] is None:
                continue
        left.append(place + 1)
    return reached


@pytest.mark.parametrize("n", (4096, 50000))
def test_no_warp_adds_to_an_overlap_that_another_has_yet_to_read(n: int) -> None:
    """Of a Gram matrix's row and of the rows themselves."""
    call = f"greedy.greedy_select(rows({n}, 128), start, None, None, start[0], 64, 'effective_rank', True)"
    ptx = [line.strip() for line in ptx_of(call, "greedy_kernel").splitlines()]
    loads = instructions_of(ptx, line_of("overlap = tl.load(overlaps + pick"), "ld.global")
    stores = instructions_of(ptx, line_of("tl.store(overlaps + rows, total"), "st.global")
    assert len(loads) == 1 and stores
    assert reached_without_barrier(ptx, loads[0]).isdisjoint(stores)


@pytest.mark.parametrize(
    "rows, kernel",
    (("16384, 2048, torch.bfloat16", "products_kernel"), ("16384, 512", "products_kernel"), ("65536, 128", "row_tiles_kernel")),
)  # fmt: skip
def test_products_are_added_in_float32(rows: str, kernel: str) -> None:
    """Tensor cores cut off what they add to a large sum (2e-5 of the covariance of 4096 rows on an H100): each block of rows is
    multiplied from zero, and every element of a thread's tile, 64 of them, is added to its sum by an instruction.
    """
    ptx = ptx_of(f"covariance.covariance(rows({rows}), True, True, 0, 'ieee')", kernel)
    # between the last product and the branch back
    loops = re.findall(r"wgmma\.mma_async(?:(?!wgmma\.mma_async).)*?bra", ptx, re.DOTALL)
    assert max(len(re.findall(r"add(?:\.rn)?\.f32", loop)) for loop in loops) >= 64


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the CUDA library was not built: there was no nvcc")
def test_greedy_fences_once_a_pool() -> None:
    """A fence of the whole GPU costs a microsecond: one before the first step, one between pools, none in a step."""
    listing = subprocess.run(
        [CUOBJDUMP, "-sass", "-arch", "sm_90", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    kernels = [part for part in listing.split("Function : ")[1:] if "greedy_kernel" in part.split()[0]]
    assert len(kernels) == 4
    assert all(part.count("MEMBAR.ALL.GPU") == 2 for part in kernels)
