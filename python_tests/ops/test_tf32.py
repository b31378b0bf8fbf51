"""Rounding to tf32, which the tensor cores are then exact on; products themselves only a GPU can show."""

import pytest
import torch
import triton
import triton.language as tl

from spectral_kernels.kernels.rows import round_to_tf32


@triton.jit
def round_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, round_to_tf32(tl.load(x + at, mask=at < n, other=0.0)), mask=at < n)


def rounded(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    round_kernel[(1,)](x, out, x.numel(), BLOCK=1024)
    return out


@pytest.mark.parametrize("scale", (1e-4, 1.0, 1e4))
def test_to_the_nearest_of_eleven_bits(scale: float) -> None:
    x = scale * torch.randn(1000)
    found = rounded(x)
    # the last 13 bits of 23 are gone, and no nearer number has them so
    assert (found.view(torch.int32) & 0x1FFF == 0).all()
    spacing = torch.exp2(torch.frexp(x.abs()).exponent.double() - 11)
    error = found.double() - x.double()
    assert (error.abs() <= spacing / 2).all()
    assert error.mean().abs() < 0.1 * spacing.mean()
    assert torch.equal(rounded(found), found)


def test_keeps_what_is_no_number() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
    x = torch.cat([x, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    found = rounded(x)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found[1:5], x[1:5])
