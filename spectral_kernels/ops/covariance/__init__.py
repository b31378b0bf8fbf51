"""Covariance and second moment of a batch."""

from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import choose, define, differentiate, op
from spectral_kernels.ops._rows import accumulation_dtype, flatten
from spectral_kernels.ops.covariance import reference

PRECISIONS = ("ieee", "tf32", "bf16x3")

define(
    reference.covariance,
    fake=lambda z, *_: z.new_empty(z.shape[0], z.shape[2], z.shape[2], dtype=accumulation_dtype(z.dtype)),
    check=lambda z, *_: checks.finite_rows(z, "z"),
)
define(
    reference.covariance_backward,
    fake=lambda grad, z, *_: z.new_empty(z.shape),
)


differentiate(
    "covariance",
    backward=lambda grad, tensors, _kept, options, _wanted: (op("covariance_backward")(grad, *tensors, *options),),
)


def covariance(
    z: Tensor,
    *,
    center: bool = True,
    normalize: bool = False,
    correction: int = 0,
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """Covariance of the rows of each batch, or their second moment.

    C = Σ (zᵢ − μ)(zᵢ − μ)ᵀ / (n − correction), and M = Σ zᵢzᵢᵀ / (n − correction) with `center=False` (docs/theory.md,
    notation).

    Args:
        z: (..., n, d), float64, float32, bfloat16 or float16, contiguous or not; a tensor or an array.
        center: subtract the mean of the rows.
        normalize: L2-normalise the rows first; a zero row stays zero.
        correction: degrees of freedom taken from n, as in `torch.cov`; 0 divides by n.
        precision: of the products on a GPU for inputs below float64: `"ieee"` keeps all 24 bits of float32, and 16 of half
            precision once it is normalised or centred; `"bf16x3"` keeps 16 (an error of some 3e-6), `"tf32"` 11 (up to 4e-5).
        backend: see `use_backend`.

    Returns:
        (..., d, d), symmetric; float64 for float64 rows, else float32. Differentiable in z.

    Raises:
        ValueError: wrong shape or dtype, `correction` not in [0, n), unknown precision, a row that holds NaN or Inf; on the
            CPU variances that the dtype of the result cannot hold.
        BackendError: a forced backend that cannot run here.
    """
    z = checks.floating(z, "z")
    correction = checks.integer(correction, "correction", 0)
    if correction >= z.shape[-2]:
        raise ValueError(f"correction must be below n = {z.shape[-2]}, got {correction}")
    checks.one_of(precision, "precision", PRECISIONS)
    name = choose("covariance", z.device, backend)
    matrix: Tensor = op("covariance")(flatten(z), center, normalize, correction, precision, name)
    return matrix.reshape(*z.shape[:-2], z.shape[-1], z.shape[-1])
