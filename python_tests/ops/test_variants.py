"""How often a new size makes Triton compile, told without a GPU: what Triton asks of the launches recorded on meta tensors."""

from collections import defaultdict

import pytest
from launch_helpers import CALLS

from spectral_kernels.kernels.launch import Record, recording

# of batches large and small, even and odd; a last batch is any of them
SIZES = [size + odd for size in (int(4 * 1.5**step) for step in range(25)) for odd in (0, 1)]
MOST_VARIANTS = 3


def variant(record: Record) -> str:
    """Everything that Triton compiles anew for."""
    return repr((record.signature, record.constants, record.attributes, record.configuration))


@pytest.mark.parametrize("b, d", [(1, 128), (1, 100), (3, 100), (1, 200), (64, 512), (2, 1024)])
@pytest.mark.parametrize("name", CALLS)
def test_sizes_share_what_is_compiled(name: str, b: int, d: int) -> None:
    variants: dict[str, set[str]] = defaultdict(set)
    with recording() as records:
        for n in SIZES:
            CALLS[name](b, n, d)
    for record in records:
        variants[record.kernel.fn.__name__].add(variant(record))
    assert len(SIZES) == 50
    assert {kernel: len(found) for kernel, found in variants.items() if len(found) > MOST_VARIANTS} == {}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_that_depends_on_sizes_is_looked_at(name: str) -> None:
    """Of whole numbers only the features, units and strides of rows, and blocks of features."""
    with recording() as records:
        for n in (2, 16, 48, 4096, 65536):
            CALLS[name](1, n, 128)
    looked_at = set()
    for record in records:
        for position, (argument, kind) in enumerate(record.signature.items()):
            known = (position,) in record.attributes if kind.startswith("i") else record.constants.get(argument) == 1
            if known and not argument.isupper():
                looked_at.add(argument)
    assert {argument for argument in looked_at if not argument.endswith(("_unit", "_row"))} <= {"d", "column_blocks"}
