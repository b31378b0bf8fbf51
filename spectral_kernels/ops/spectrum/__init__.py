"""Spectrum of a batch: eigenvalues of its second moment or covariance."""

from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import Fit, choose, define, differentiate, op
from spectral_kernels.ops._rows import accumulation_dtype, flatten
from spectral_kernels.ops.spectrum import reference

# kLargestSpectrum of csrc/spectrum_cuda.h
LARGEST_ON_CUDA = 1024

define(
    reference.spectrum,
    fake=lambda z, *_: z.new_empty(z.shape[0], z.shape[2], dtype=accumulation_dtype(z.dtype)),
    check=lambda z, *_: checks.finite_rows(z, "z"),
    cuda="own",
)
# eigenvectors are torch's on every backend
define(
    reference.spectrum_backward,
    fake=lambda grad, z, *_: z.new_empty(z.shape),
    cpp="reference",
    triton=False,
    cuda="reference",
)


differentiate(
    "spectrum",
    backward=lambda grad, tensors, _kept, options, _wanted: (op("spectrum_backward")(grad, *tensors, *options),),
)


def cuda_fit(n: int, d: int) -> Fit:
    """How batches (n, d) suit the cuda backend, which solves their smaller side."""
    side = min(n, d)
    return Fit(f"min(n, d) is {side}, its kernel solves up to {LARGEST_ON_CUDA}" if side > LARGEST_ON_CUDA else None)


def spectrum(z: Tensor, *, center: bool = False, normalize: bool = True, backend: str | None = None) -> Tensor:
    """Eigenvalues of the second moment M = ZᵀZ/n of each batch, or of its covariance C.

    Both the matrix and its eigenvalues are computed in float64 on the CPU. The covariance of identical rows is 0, not
    rounding noise.

    Args:
        z: (..., n, d), float64, float32, bfloat16 or float16.
        center: eigenvalues of C instead of M.
        normalize: L2-normalise the rows first.
        backend: see `use_backend`.

    Returns:
        (..., d), descending, none below 0; float64 for float64 rows, else float32. Differentiable in z for functions
        that are symmetric in the eigenvalues (all effective ranks are).

    Raises:
        ValueError: wrong shape or dtype, a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    z = checks.floating(z, "z")
    name = choose("spectrum", z.device, backend, cuda=lambda: cuda_fit(*z.shape[-2:]))
    values: Tensor = op("spectrum")(flatten(z), center, normalize, name)
    return values.reshape(*z.shape[:-2], z.shape[-1])
