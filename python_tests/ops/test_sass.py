"""What the machine code of csrc/*.cu must not hold, and what Triton's products must: read from cubins, no GPU needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "spectral_kernels" / "_C_cuda.so"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spectral_kernels.kernels.launch import recording
from spectral_kernels.ops.covariance import triton as covariance

n, d, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
with recording() as records:
    covariance.covariance(torch.empty(1, n, d, dtype=dtype, device="meta"), True, True, 0, "ieee")
record = next(record for record in records if record.kernel.fn.__name__ == sys.argv[4])
source = ASTSource(record.kernel, record.signature, record.constants, record.attributes)
options = {"num_warps": record.configuration.num_warps, "num_stages": record.configuration.num_stages}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the CUDA library was not built: there was no nvcc")
def test_greedy_fences_once_a_pool() -> None:
    """A fence of the whole GPU costs a microsecond: one before the first step, one between pools, none in a step."""
    listing = subprocess.run(
        [CUOBJDUMP, "-sass", "-arch", "sm_90", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    kernels = [part for part in listing.split("Function : ")[1:] if "greedy_kernel" in part.split()[0]]
    assert len(kernels) == 4
    assert all(part.count("MEMBAR.ALL.GPU") == 2 for part in kernels)


@pytest.mark.parametrize(
    "n, d, dtype, kernel",
    ((16384, 2048, "bfloat16", "products_kernel"), (16384, 512, "float32", "products_kernel"),
     (65536, 128, "float32", "row_tiles_kernel")),
)  # fmt: skip
def test_products_are_added_in_float32(n: int, d: int, dtype: str, kernel: str) -> None:
    """Tensor cores cut off what they add to a large sum (2e-5 of the covariance of 4096 rows on an H100): each block of rows is
    multiplied from zero, and every element of a thread's tile, 64 of them, is added to its sum by an instruction.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(n), str(d), dtype, kernel]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # between the last product and the branch back
    loops = re.findall(r"wgmma\.mma_async(?:(?!wgmma\.mma_async).)*?bra", done.stdout, re.DOTALL)
    assert max(len(re.findall(r"add(?:\.rn)?\.f32", loop)) for loop in loops) >= 64
