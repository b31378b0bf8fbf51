"""Every op on every backend, over the table of `registry.py`."""

import math
from typing import Any

import pytest
import torch
from registry import BACKENDS, CASES, DEVICE, Case
from torch import Tensor

from spectral_kernels.dispatch import backends, op, overload

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (2, 5, 3), (1, 1, 5), (2, 5, 129), (1, 123, 37), (1, 129, 65))
KINDS = ("plain", "strided", "duplicates", "zero rows", "large", "small")


def rows(shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> Tensor:
    """Anisotropic rows (b, n, d) off the origin, in one of the shapes that break kernels; on the CPU."""
    with torch.device("cpu"):
        b, n, d = shape
        scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
        z = torch.randn(b, n, d, dtype=torch.float64) * scale + 0.3
        if kind == "duplicates":
            z = z[:, torch.arange(n) % max(1, n // 3)]
        elif kind == "zero rows":
            z[:, 1::3] = 0
        elif kind == "large":
            z = z * (1e4 if dtype != torch.float16 else 1e2)
        elif kind == "small":
            z = z * (1e-4 if dtype != torch.float16 else 1e-2)
        z = z.to(dtype)
        return z.mT.contiguous().mT if kind == "strided" else z


def _is_rows(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype.is_floating_point and argument.numel() > 0


def to_float64(argument: Any) -> Any:
    return argument.double() if _is_rows(argument) else argument


def to_device(argument: Any) -> Any:
    """As it is laid out, where the op tests run."""
    if not isinstance(argument, Tensor) or DEVICE.type == "cpu":
        return argument
    moved = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=DEVICE)
    return moved.copy_(argument)


def granted(op: str, dtype: torch.dtype) -> float:
    """What tensor cores may lose beyond torch's own op: docs/gpu.md."""
    if op == "info_nce_grad_norms" and dtype in HALVES:
        return 2e-3
    return 1e-5 if op.startswith(("effective_rank2", "batch_effective_rank2")) and dtype != torch.float64 else 0.0


def as_leaf(argument: Any) -> Tensor:
    """A tensor, or a number as one, that wants a gradient."""
    leaf = argument.clone() if isinstance(argument, Tensor) else torch.tensor(argument, dtype=torch.float64)
    return leaf.requires_grad_()


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def error(got: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Largest difference, relative to the largest expected value, at least `floor`; infinities must agree."""
    got = got.double()
    same = torch.isinf(expected) & (got == expected)
    finite = torch.where(same, 0.0, expected)
    difference = torch.where(same, 0.0, got - expected).abs()
    if difference.numel() == 0:
        return 0.0
    worst = float(difference.max()) / max(float(finite.abs().max()), floor)
    return math.inf if math.isnan(worst) else worst


def compare(case: Case, backend: str, z: Tensor) -> None:
    with torch.device("cpu"):
        if not case.runs_on(backend, z.shape[2]):
            return
        arguments = case.arguments(z)
        got = tuple(part.cpu() for part in outputs(op(case.op)(*map(to_device, arguments), backend)))
        if case.exact:
            expected = outputs(op(case.op)(*arguments, "reference"))
            if "logdet" in str(case):
                torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(got[0], expected[0])
                torch.testing.assert_close(got[1], expected[1], rtol=2e-5, atol=1e-6)
            return
        expected = outputs(op(case.op)(*map(to_float64, arguments), "reference"))
        by_torch = tuple(part.cpu() for part in outputs(op(case.op)(*map(to_device, arguments), "reference")))
        # one centred row has the covariance 0, up to the rounding of its mean
        floor = 1e-9 * max(float(part.abs().max()) for part in arguments if _is_rows(part))
        if case.op.endswith("effective_rank2_backward"):
            # that of a collapsed batch is 0, up to the rounding of the gradients of others
            floor = 0.1 * float(arguments[0].abs().max()) / max(float(arguments[1].abs().max()), 1e-30)
        for i, (value, exact, torchs) in enumerate(zip(got, expected, by_torch, strict=True)):
            assert value.shape == exact.shape and value.dtype == torchs.dtype
            # four times what torch's own ops lose in this dtype, and some units of its rounding
            allowed = 4 * error(torchs, exact, floor) + 40 * torch.finfo(value.dtype).eps
            if case.label.endswith("unbiased"):
                allowed += 2e-5  # the U-statistic of few rows is a small difference
            if DEVICE.type == "cuda":
                allowed += granted(case.op, arguments[0].dtype)
            worst = error(value, exact, floor)
            assert worst <= allowed, f"output {i}: {worst:.2e} > {allowed:.2e}"


def test_every_op_is_in_the_registry() -> None:
    assert {case.op for case in CASES} == set(backends.OPS)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(case: Case, backend: str) -> None:
    # the interpreter is slow
    shapes = SHAPES if backend != "triton" or DEVICE.type == "cuda" else SHAPES[1:4]
    for shape in shapes:
        if shape[1] >= case.least:
            compare(case, backend, rows(shape, torch.float32, "plain"))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(case: Case, backend: str) -> None:
    for dtype in DTYPES:
        compare(case, backend, rows((2, 33, 17), dtype, "plain"))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds(case: Case, backend: str) -> None:
    for kind in KINDS:
        compare(case, backend, rows((2, 20, 9), torch.float32, kind))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_across_tiles(case: Case) -> None:
    for shape in SHAPES[4:]:
        compare(case, "triton", rows(shape, torch.float32, "plain"))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_opcheck(case: Case, backend: str) -> None:
    arguments = list(case.arguments(rows((2, 6, 4), torch.float32, "strided")))
    for position in case.gradients:
        arguments[position] = as_leaf(arguments[position])
    # as numbers are in a schema
    arguments = [torch.tensor(a, dtype=torch.float64) if isinstance(a, float | list) else a for a in arguments]
    torch.library.opcheck(overload(case.op), (*arguments, backend))


@pytest.mark.parametrize("case", [case for case in CASES if case.gradients], ids=str)
def test_gradcheck(case: Case) -> None:
    for shape in ((2, 7, 4), (1, 4, 6)):
        arguments = list(case.arguments(rows(shape, torch.float64, "plain")))
        tensors = [as_leaf(arguments[position]) for position in case.gradients]

        def call(*inputs: Tensor, arguments: list[Any] = arguments) -> Tensor:
            for position, tensor in zip(case.gradients, inputs, strict=True):
                arguments[position] = tensor
            return outputs(op(case.op)(*arguments, "reference"))[0]

        assert torch.autograd.gradcheck(call, tensors)


# one batch in short runs of rows, in long ones, in tiles; and batches, with the ops whose work grows with n² and torch's
@pytest.mark.parametrize("shape", ((1, 4096, 128), (1, 9000, 64), (1, 2500, 300), (2, 300, 40)), ids=str)
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_cpp_does_not_depend_on_threads(threads: int, shape: tuple[int, int, int]) -> None:
    before = torch.get_num_threads()
    z = rows(shape, torch.float32, "plain")
    try:
        for case in CASES:
            if shape[1] > 300 and any(
                part in case.op for part in ("info_nce", "nt_xent", "sigmoid", "spectrum_backward")
            ):
                continue
            arguments = case.arguments(z)
            torch.set_num_threads(1)
            alone = outputs(op(case.op)(*arguments, "cpp"))
            torch.set_num_threads(threads)
            for one, many in zip(alone, outputs(op(case.op)(*arguments, "cpp")), strict=True):
                # torch's own LAPACK and GEMM calls inside composed ops may differ in the last bits
                parts = ("whiten", "spectrum_backward", "info_nce", "nt_xent", "sigmoid")
                composed = any(part in case.op for part in parts) and case.op != "info_nce_grad_norms"
                assert torch.equal(one, many) or (composed and error(many, one.double()) < 1e-5), case
    finally:
        torch.set_num_threads(before)
