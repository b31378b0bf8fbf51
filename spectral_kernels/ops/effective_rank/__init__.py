"""Effective rank of every order, of one batch or of many candidate batches of a pool."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import choose, define, differentiate, op
from spectral_kernels.ops._rows import accumulation_dtype, flatten, unit_scale
from spectral_kernels.ops.effective_rank import reference
from spectral_kernels.ops.spectrum import cuda_fit
from spectral_kernels.ops.spectrum import spectrum as eigenvalue_spectrum

SPECTRA = ("covariance", "singular")

define(
    reference.effective_rank2,
    fake=lambda z, *_: z.new_empty(z.shape[0], dtype=accumulation_dtype(z.dtype)),
    check=lambda z, *_: checks.finite_rows(z, "z"),
)
define(
    reference.effective_rank2_backward,
    fake=lambda grad, z, *_: z.new_empty(z.shape),
)
define(
    reference.batch_effective_rank2,
    fake=lambda pool, indices, *_: pool.new_empty(indices.shape[0], dtype=accumulation_dtype(pool.dtype)),
    check=lambda pool, indices, *_: checks.finite_pool_rows(pool, indices),
)
define(
    reference.batch_effective_rank2_backward,
    fake=lambda grad, pool, *_: pool.new_empty(pool.shape),
)
define(
    reference.batch_spectrum,
    fake=lambda pool, indices, *_: pool.new_empty(
        indices.shape[0], pool.shape[1], dtype=accumulation_dtype(pool.dtype)
    ),
    check=lambda pool, indices, *_: checks.finite_pool_rows(pool, indices),
    cuda="own",
)
# eigenvectors are torch's on every backend
define(
    reference.batch_spectrum_backward,
    fake=lambda grad, pool, *_: pool.new_empty(pool.shape),
    cpp="reference",
    triton=False,
    cuda="reference",
)


def _backward_by(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Of the first tensor; indices have no gradient."""

    def backward(grad: Tensor, tensors: Any, _kept: Any, options: Any, _wanted: Any) -> tuple[Tensor | None, ...]:
        return op(name)(grad, *tensors, *options), *[None] * (len(tensors) - 1)

    return backward


differentiate("effective_rank2", backward=_backward_by("effective_rank2_backward"))
differentiate("batch_effective_rank2", tensors=2, backward=_backward_by("batch_effective_rank2_backward"))
differentiate("batch_spectrum", tensors=2, backward=_backward_by("batch_spectrum_backward"))


def check_order(order: float) -> float:
    """A Rényi order: any number from 0 to infinity."""
    return checks.number(order, "order", "a number from 0 to math.inf", lambda x: x >= 0)


def rank_of_spectrum(values: Tensor, order: float) -> Tensor:
    """R_α = exp(H_α(p)), p = λ/Σλ, of non-negative eigenvalues (..., d); 0 where all are 0.

    Order 0 counts the eigenvalues above d·ε·λ₁ with ε of the given dtype.
    """
    total = values.sum(-1, keepdim=True)
    p = values / torch.where(total > 0, total, 1.0)
    support = p > 0
    # the masked logarithm keeps the gradient of p ln p finite at p = 0
    log_p = torch.where(support, p, 1.0).log()
    if order == 0:
        floor = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
        rank = (values > floor).sum(-1).to(values.dtype)
    elif order == 1:
        rank = torch.exp(-(p * log_p).sum(-1))
    elif order == math.inf:
        rank = 1 / torch.where(support[..., 0], p.amax(-1), 1.0)
    else:
        scaled = torch.where(support, order * log_p, -torch.inf)
        rank = torch.exp(torch.logsumexp(torch.where(support.any(-1, keepdim=True), scaled, 0.0), -1) / (1 - order))
    # 0 where all are 0; NaN, as a GPU's kernels give of rows that hold it, stays NaN
    return torch.where(total[..., 0] > 0, rank, total[..., 0].detach())


def effective_rank(
    z: Tensor,
    *,
    order: float = 1.0,
    center: bool = False,
    normalize: bool = True,
    spectrum: str = "covariance",
    unbiased: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Effective rank R_α of each batch: the exponential of its spectrum's Rényi entropy of order α (docs/theory.md §1).

    | order | R_α | also known as |
    | --- | --- | --- |
    | 0 | number of eigenvalues above rounding | rank |
    | 1 | exp(−Σ p ln p) | Roy and Vetterli's effective rank of the matrix M (2007); Vendi score of unit rows |
    | 2 | (Σλ)²/Σλ² | participation ratio; needs no eigenvalues |
    | math.inf | Σλ/λ₁ | intrinsic dimension |

    R_∞ ≤ R₂ ≤ R₁ ≤ R₀ ≤ min(n, d). A batch without any spread (all rows zero, or identical rows with `center=True`)
    has rank 0.

    Args:
        z: (..., n, d), float64, float32, bfloat16 or float16.
        order: α, any number from 0 to `math.inf`.
        center: use the covariance C instead of the second moment M.
        normalize: L2-normalise the rows first.
        spectrum: `"covariance"` (p from the eigenvalues of M or C) or `"singular"` (p from the singular values of Z, as
            `rankme` has it of raw rows).
        unbiased: order 2 only: replace tr M² by its U-statistic, whose mean does not depend on n. R₂ itself is then
            nearly unbiased for n above some tens; inf where the U-statistic is not above 0. Needs n ≥ 2, centred n ≥ 4.
        backend: see `use_backend`.

    Returns:
        (...,), in units of dimensions; float64 for float64 rows, else float32. Differentiable in z for order > 0, twice by
        another order than 2 where no positive eigenvalues are equal (else a RuntimeError; NaN from torch.func).

    Raises:
        ValueError: wrong shape or dtype, order below 0 or NaN, unknown spectrum, `unbiased` with another order or
            spectrum or with too few rows, a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    z = checks.floating(z, "z")
    order = check_order(order)
    checks.one_of(spectrum, "spectrum", SPECTRA)
    if unbiased and (order != 2 or spectrum != "covariance"):
        raise ValueError(f"unbiased needs order=2 and spectrum='covariance', got order={order}, spectrum={spectrum!r}")
    least = 4 if center else 2
    if unbiased and z.shape[-2] < least:
        raise ValueError(f"unbiased needs at least {least} rows with center={center}, got n = {z.shape[-2]}")
    if order == 2 and spectrum == "covariance":
        name = choose("effective_rank2", z.device, backend)
        rank: Tensor = op("effective_rank2")(flatten(z), center, normalize, unbiased, name)
        return rank.reshape(z.shape[:-2])
    if not normalize:
        # eigenvalues are squares: they would leave the range of float32
        z = z * unit_scale(z)
    values = significant(eigenvalue_spectrum(z, center=center, normalize=normalize, backend=backend))
    return rank_of_spectrum(singular(values) if spectrum == "singular" else values, order)


def rankme(z: Tensor, *, backend: str | None = None) -> Tensor:
    """RankMe of embeddings: exp(−Σ p ln p) with p = σ/Σσ, σ the singular values of Z as it is: neither centred nor normalised
    (Garrido et al. 2023, "RankMe", equations 1 and 2; Roy & Vetterli 2007 of the matrix Z).

    The paper adds 1e-7 to each p so that the logarithm exists; here p ln p is 0 where p is.

    Args:
        z: (..., n, d), float64, float32, bfloat16 or float16; a tensor or an array.
        backend: see `use_backend`.

    Returns:
        (...,), from 1 to min(n, d), 0 of zero rows alone; float64 for float64 rows, else float32. Differentiable in z.

    Raises:
        ValueError: wrong shape or dtype, a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    return effective_rank(z, normalize=False, spectrum="singular", backend=backend)


def significant(values: Tensor) -> Tensor:
    """Eigenvalues (..., d), 0 where they are rounding of a float64 matrix."""
    # below the rounding of a float64 matrix an eigenvalue is noise; orders below 1 have steep gradients there
    floor = values.shape[-1] * torch.finfo(torch.float64).eps * values.detach().amax(-1, keepdim=True)
    return torch.where(values <= floor, 0.0, values)


def singular(values: Tensor) -> Tensor:
    """Singular values of the rows, up to a factor, from the eigenvalues of their second moment."""
    # the square root has no derivative at 0, where a singular value adds nothing to the rank
    zero = values <= 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, values).sqrt())


def batch_effective_rank(
    pool: Tensor,
    indices: Tensor,
    *,
    order: float = 2.0,
    center: bool = False,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Effective rank of c candidate batches, each given by the indices of its rows in one pool.

    Args:
        pool: (N, d), float64, float32, bfloat16 or float16. Only the rows named are read, normalised and checked.
        indices: (c, b) whole numbers, a tensor, array or list, each row a batch; a row of the pool may appear in many.
        order, center, normalize: as in `effective_rank`.
        backend: see `use_backend`.

    Returns:
        (c,), in units of dimensions; float64 for a float64 pool, else float32. Differentiable in pool.

    Raises:
        ValueError: wrong shapes or dtypes, an index outside [0, N) (on a GPU such a batch has rank NaN), a bad order, a named
            row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    pool = checks.floating(pool, "pool", ndim=2)
    indices = checks.row_indices(indices, "indices", pool.shape[0], ndim=2).to(pool.device)
    order = check_order(order)
    if order == 2:
        name = choose("batch_effective_rank2", pool.device, backend)
        rank: Tensor = op("batch_effective_rank2")(pool, indices, center, normalize, name)
        return rank
    if not normalize:
        pool = pool * unit_scale(pool)
    name = choose("batch_spectrum", pool.device, backend, cuda=lambda: cuda_fit(indices.shape[1], pool.shape[1]))
    return rank_of_spectrum(significant(op("batch_spectrum")(pool, indices, center, normalize, name)), order)
