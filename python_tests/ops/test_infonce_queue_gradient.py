"""MoCo's queue is a buffer: without a gradient of its own the other two stay what they are."""

import pytest
import torch

import spectral_kernels as sk


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("b, n, d", ((5, 123, 7), (70, 129, 130)))
def test_queue_without_a_gradient(b: int, n: int, d: int, dtype: torch.dtype, backend: str) -> None:
    query, key, queue = (torch.randn(rows, d, dtype=torch.float64).to(dtype) for rows in (b, b, n))
    leaves = [query.requires_grad_(), key.requires_grad_()]
    alone = torch.autograd.grad(sk.info_nce(query, key, queue=queue, temperature=0.2, backend=backend), leaves)
    leaves.append(queue.requires_grad_())
    *beside, _ = torch.autograd.grad(sk.info_nce(query, key, queue=queue, temperature=0.2, backend=backend), leaves)
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one, other)
