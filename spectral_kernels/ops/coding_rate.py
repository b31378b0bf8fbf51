"""Coding rate of a batch: a log-determinant of its second moment."""

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import as_tensor, choose, composed, op
from spectral_kernels.ops._rows import accumulation_dtype, flatten, read_rows


@composed
def _coding_rate(z: Tensor, eps: Tensor, normalize: bool, backend: str) -> Tensor:
    n, d = z.shape[1:]
    if n < d:  # the same determinant, of the smaller side
        checks.finite_rows(z, "z")
        rows = read_rows(z, normalize, torch.float64)
        moment = rows @ rows.mT / n
    else:
        moment = op("covariance")(z, False, normalize, 0, "ieee", backend).double()
    identity = torch.eye(min(n, d), dtype=torch.float64, device=z.device)
    factor = torch.linalg.cholesky(identity + d / eps.to(z.device).square() * moment)
    rate: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return rate.to(accumulation_dtype(z.dtype))


def coding_rate(z: Tensor, *, eps: float = 0.5, normalize: bool = True, backend: str | None = None) -> Tensor:
    """Coding rate of each batch: ½ ln det(I + d/(nε²) ZᵀZ) (Ma, Derksen, Hong & Wright 2007, equation 8; the expansion term of
    MCR², Yu et al. 2020, and of SimDINO, Wu et al. 2025).

    Args:
        z: (..., n, d), float64, float32, bfloat16 or float16; a tensor or an array.
        eps: ε, the distortion that a code of the rows may have, above 0.
        normalize: L2-normalise the rows first; a zero row stays zero.
        backend: see `use_backend`; of the second moment, the determinant is torch's in float64.

    Returns:
        (...,), nats, from 0 of zero rows to (d/2) ln(1 + 1/ε²) of unit rows whose second moment is I/d; float64 for float64
        rows, else float32. Differentiable in z.

    Raises:
        ValueError: wrong shape or dtype, eps not a finite number above 0, a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    z = checks.floating(z, "z")
    checks.positive(eps, "eps")
    name = choose("coding_rate", z.device, backend)
    rate: Tensor = _coding_rate(flatten(z), as_tensor(eps), normalize, name)
    return rate.reshape(z.shape[:-2])
