"""Whitening: decorrelate the features of a batch."""

from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import Fit, choose, define, differentiate, op
from spectral_kernels.ops._rows import accumulation_dtype, flatten
from spectral_kernels.ops.whitening import reference, wide

METHODS = ("cholesky", "zca", "newton_schulz")

# csrc/whitening_cuda.h holds a matrix in shared memory
MOST_FEATURES_CUDA = 128


def _fake(z: Tensor, *_: Any) -> tuple[Tensor, ...]:
    b, _n, d = z.shape
    dtype = accumulation_dtype(z.dtype)
    square = z.new_empty(b, d, d, dtype=dtype)
    return z.new_empty(z.shape), z.new_empty(b, d, dtype=dtype), square, square.new_empty(b, d, d)


define(
    reference.whiten,
    fake=_fake,
    check=lambda z, *_: checks.finite_rows(z, "z"),
    cpp="composed",
    cuda="own",
)
define(
    reference.whiten_backward,
    fake=lambda grad, z, *_: z.new_empty(z.shape),
    cpp="composed",
    cuda="own",
)


def _keep(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    y, mean = outputs[:2]
    # by Cholesky, C++ makes half of the gradient from the result, where that is not rounded to less than the mean
    saved = inputs[-1] == "cpp" and inputs[1] == "cholesky" and y.dtype == mean.dtype
    return *outputs[1:], y if saved else None


def _backward(
    grad: Tensor, tensors: tuple[Tensor], kept: tuple[Tensor, ...], options: tuple[Any, ...], _wanted: Any
) -> tuple[Tensor]:
    *statistics, y = kept
    return (op("whiten_backward")(grad, *tensors, *statistics, *options[:-1], y, options[-1]),)


differentiate("whiten", keep=_keep, backward=_backward)


def check_options(method: str, shrinkage: float) -> float:
    """The shrinkage; raise for an unknown method or a shrinkage outside [0, 1]."""
    checks.one_of(method, "method", METHODS)
    return checks.share(shrinkage, "shrinkage")


def shared_bytes(d: int) -> int:
    """Shared memory that the matrix of d features takes: `whitening_shared_bytes` of csrc/whitening_cuda.h."""
    side = (d + 15) // 16 * 16
    return 8 * (side * (side + 2) + 1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shared_limit(device: torch.device) -> int:
    """Shared memory that a block may ask for: 227 KB on sm_90, 99 KB on sm_86, sm_89 and sm_120."""
    # torch's own description of the type leaves it out
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _cuda_fit(device: torch.device, method: str, d: int) -> Fit:
    if method != "cholesky":
        return Fit(f"it whitens by Cholesky only, got method = {method!r}")
    if d > MOST_FEATURES_CUDA:
        return Fit(f"it whitens up to {MOST_FEATURES_CUDA} features, got d = {d}")
    needed, limit = shared_bytes(d), _shared_limit(device)
    return Fit(f"d = {d} takes {needed} bytes of shared memory, {device} has {limit}" if needed > limit else None)


def whiten_with_mean(
    z: Tensor, method: str, shrinkage: float, center: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`whiten`, the mean (..., d) and, where it was made, the covariance (..., d, d)."""
    z = checks.floating(z, "z")
    shrinkage = check_options(method, shrinkage)
    name = choose("whiten", z.device, backend, cuda=lambda: _cuda_fit(z.device, method, z.shape[-1]))
    flat, leading, d = flatten(z), z.shape[:-2], z.shape[-1]
    if z.shape[-2] < d:
        with torch.autocast(z.device.type, enabled=False):
            y, mean = wide.whiten(flat, method, shrinkage, center)
        return y.reshape(z.shape), mean.reshape(*leading, d), None
    y, mean, covariance, _ = op("whiten")(flat, method, shrinkage, center, name)
    return y.reshape(z.shape), mean.reshape(*leading, d), covariance.reshape(*leading, d, d)


def whiten(
    z: Tensor,
    *,
    method: str = "cholesky",
    shrinkage: float = 1e-4,
    center: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Whiten each batch: y = (z − μ)Wᵀ with W C_ε Wᵀ = I and C_ε = (1 − ε)C + ε (tr C/d) I (docs/theory.md §4).

    With n ≤ d the covariance is singular: only its range is whitened, and how far depends on ε. Below n = d the cost is
    O(n²d). A batch of identical rows whitens to zeros.

    Args:
        z: (..., n, d), float64, float32, bfloat16 or float16.
        method: `"cholesky"` (W = L⁻¹, the cheapest), `"zca"` (W = C_ε^{-1/2} by eigenvectors: closest to z) or
            `"newton_schulz"` (the same by iteration, run until it has converged for any spectrum that ε admits).
        shrinkage: ε, relative to the mean variance.
        center: subtract the mean; False whitens the second moment.
        backend: see `use_backend`. The d x d factorisation is in float64 on all of them:
            torch's, but for Cholesky's on cuda, up to d = 128 or what the GPU's shared memory holds (d = 96 in 99 KB).
            Below n = d all work is torch's, in float64.

    Returns:
        (..., n, d) in the dtype of z; gradients flow, also where eigenvalues repeat.

    Raises:
        ValueError: wrong shape or dtype, unknown method, shrinkage outside [0, 1] or too small for a singular batch, a
            row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    return whiten_with_mean(z, method, shrinkage, center, backend)[0]
