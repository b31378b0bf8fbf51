"""Barriers that a kernel needs, looked for in the code that Triton makes of it for sm_90: the interpreter has no threads."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_kernels.ops.greedy import triton as greedy

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spectral_kernels.kernels.launch import recording
from spectral_kernels.ops.greedy import triton as greedy

pool = torch.empty(1, int(sys.argv[1]), 128, device="meta")
start = torch.empty(1, 16, dtype=torch.int64, device="meta")
with recording() as records:
    greedy.greedy_select(pool, start, None, None, start[0], 64, "effective_rank", True)
record = records[-1]
source = ASTSource(record.kernel, record.signature, record.constants, record.attributes)
options = {"num_warps": record.configuration.num_warps, "num_stages": record.configuration.num_stages}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def ptx_of_greedy(rows: int) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(rows)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


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


@pytest.mark.parametrize("rows", (4096, 50000))
def test_no_warp_adds_to_an_overlap_that_another_has_yet_to_read(rows: int) -> None:
    """Of a Gram matrix's row and of the rows themselves."""
    ptx = ptx_of_greedy(rows)
    loads = instructions_of(ptx, line_of("overlap = tl.load(overlaps + pick"), "ld.global")
    stores = instructions_of(ptx, line_of("tl.store(overlaps + rows, total"), "st.global")
    assert len(loads) == 1 and stores
    assert reached_without_barrier(ptx, loads[0]).isdisjoint(stores)
