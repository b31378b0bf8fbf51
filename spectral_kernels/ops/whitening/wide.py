"""Whitening of fewer rows than features in O(n²d), on the smaller side: y is made of n x n matrices, W never is.

With x the centred rows, K = xxᵀ/n and t = tr C/d:

- zca, newton_schulz: x ((1 − ε)C + εtI)^{-1/2} = ((1 − ε)K + εtI)^{-1/2} x;
- cholesky: column k of y is the part of feature k that the features before it do not predict (ridge regression), over its
  length. With X = x √((1 − ε)/n), a = εt and P_k = (I + Σ_{j<k} X_j X_jᵀ/a)⁻¹ it is P_k X_k/√(a + X_kᵀP_kX_k), and
  P_{k+1} = P_k − ŷ_k ŷ_kᵀ; here a block of features at a time.

Plain PyTorch in float64, on every backend: derivatives are torch's, of any kind and order.
"""

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._rows import accumulation_dtype, is_negligible, unit_scale
from spectral_kernels.ops.whitening.reference import inverse_root, refuse_singular

# features that are factored together
BLOCK = 128


def _by_cholesky(x: Tensor, shrinkage: float, level: Tensor) -> Tensor:
    n = x.shape[-2]
    share = (1 - shrinkage) / n
    left = torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], n, n)
    parts, failed = [], []
    for part in x.split(BLOCK, -1):
        unexplained = left @ part
        ridge = shrinkage * level * torch.eye(part.shape[-1], dtype=x.dtype, device=x.device)
        factor, information = torch.linalg.cholesky_ex(share * (part.mT @ unexplained) + ridge)
        y = torch.linalg.solve_triangular(factor, unexplained.mT, upper=False).mT
        left = left - share * (y @ y.mT)
        parts.append(y)
        failed.append(information.any())
    refuse_singular(torch.stack(failed).any(), shrinkage)
    return torch.cat(parts, -1)


def whiten(z: Tensor, method: str, shrinkage: float, center: bool) -> tuple[Tensor, Tensor]:
    """y (b, n, d), in the dtype of z, and the mean (b, d) of z (b, n, d), n < d."""
    checks.finite_rows(z, "z")
    n, d = z.shape[-2:]
    scale = unit_scale(z).double()
    x = z.double() * scale
    mean = x.mean(-2, keepdim=True) if center else x.new_zeros(*x.shape[:-2], 1, d)
    x = x - mean
    gram = x @ x.mT / n
    spread = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    some = ~is_negligible(spread, spread + mean.square().sum((-2, -1)))[..., None, None]
    # without spread y is 0, whatever the matrix
    level = torch.where(some, spread[..., None, None] / d, 1.0)
    # compiled, it is not known
    if not torch.compiler.is_compiling() and shrinkage == 0:
        refuse_singular(some.any(), shrinkage)
        # nothing is left to whiten
        shrinkage = 1.0
    if method == "cholesky":
        y = _by_cholesky(torch.where(some, x, 0.0), shrinkage, level)
    else:
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        # of trace about 1
        shrunk = (1 - shrinkage) * torch.where(some, gram, 0.0) / (level * d) + shrinkage / d * eye
        y = inverse_root(shrunk, method, d, shrinkage) @ x / (level * d).sqrt()
    return torch.where(some, y, 0.0).to(z.dtype), (mean / scale).squeeze(-2).to(accumulation_dtype(z.dtype))
