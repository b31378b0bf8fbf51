"""Whitening as its definition (docs/theory.md §4), with the d x d work that every backend shares.

C_ε = (1 − ε)C + ε (tr C/d) I; W = L⁻¹ of its Cholesky factor, or W = C_ε^{-1/2}; y = (z − μ)Wᵀ.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._rows import accumulation_dtype, is_negligible, unit_scale


def too_narrow(covariance: Tensor, mean: Tensor) -> bool:
    """Whether float32 does not do on the CPU: squares of rows leave it, or their spread is lost beside their mean."""
    if covariance.dtype != torch.float32 or not checks.readable(covariance):
        return False
    spread = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    total = spread + mean.square().sum(-1)
    # next to a matrix of rank 1 the rest is lost as well
    others = covariance.square().sum((-2, -1)) < 0.99 * spread.square()
    others |= covariance.shape[-1] == 1
    return not bool(((total > 1e-24) & (total < 1e24) & (spread > 1e-4 * total) & others).all())


def whiten_in_float64(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], z: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` of rows brought near 1; its results as they would be of z, in z's dtypes."""
    scale = unit_scale(z).double()
    y, mean, covariance, matrix = forward(z.double() * scale, *options)
    dtype = accumulation_dtype(z.dtype)
    mean, covariance, matrix = mean / scale.squeeze(-1), covariance / scale.square(), matrix * scale
    return y.to(z.dtype), mean.to(dtype), covariance.to(dtype), matrix.to(dtype)


def whiten_backward_in_float64(
    forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., Tensor], grad: Tensor, z: Tensor, *options: Any
) -> Tensor:
    """`backward` of what `forward` makes of rows brought near 1."""
    scale = unit_scale(z).double()
    x = z.double() * scale
    y, *statistics = forward(x, *options)
    return (backward(grad.double(), x, *statistics, *options, y) * scale).to(z.dtype)


def drop_noise(covariance: Tensor, mean: Tensor) -> Tensor:
    """C, or exactly 0 where it is rounding noise: whitening would blow up the noise of identical rows."""
    spread = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    noise = is_negligible(spread, spread + mean.square().sum(-1))
    return torch.where(noise[..., None, None], 0.0, covariance)


def shrink(covariance: Tensor, shrinkage: float) -> Tensor:
    """C_ε in float64; the identity for a batch without any spread, which then whitens to zeros."""
    c = (1 - shrinkage) * covariance.double()
    level = covariance.diagonal(dim1=-2, dim2=-1).double().mean(-1, keepdim=True)
    # without spread c is 0
    c.diagonal(dim1=-2, dim2=-1).add_(torch.where(level > 0, shrinkage * level, 1.0))
    return c


class _Lyapunov(torch.autograd.Function):
    """The symmetric X with RX + XR = G, R positive definite and G symmetric. X depends on G as its derivative does on X's."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, g: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(r)
        x: Tensor = vectors @ (vectors.mT @ g @ vectors / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ vectors.mT
        ctx.save_for_backward(r, x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        r, x = ctx.saved_tensors
        s = _Lyapunov.apply(r, 0.5 * (grad + grad.mT))  # type: ignore[no-untyped-call]
        return -(s @ x + x @ s), s


class _InverseRoot(torch.autograd.Function):
    """A^{-1/2} of a positive definite A, without the 1/(λᵢ − λⱼ) of torch's eigenvectors: eigenvalues may repeat.

    From R = A^{1/2} = AF and RR = A follow dF = −F dR F and R dR + dR R = dA.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, steps: int) -> Tensor:
        if steps:
            root = _newton_schulz(a, steps)
        else:
            values, vectors = torch.linalg.eigh(a)
            root = vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT
        ctx.save_for_backward(a, root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        a, f = ctx.saved_tensors
        r = a @ f
        return -_Lyapunov.apply(0.5 * (r + r.mT), f @ (0.5 * (grad + grad.mT)) @ f), None  # type: ignore[no-untyped-call]


def _newton_schulz(c: Tensor, steps: int) -> Tensor:
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    scale = c.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    y, w = c / scale, eye.expand_as(c)
    for _ in range(steps):
        t = 1.5 * eye - 0.5 * w @ y
        y, w = y @ t, t @ w
    return w / scale.sqrt()


def inverse_root(a: Tensor, method: str, d: int, shrinkage: float) -> Tensor:
    """A^{-1/2} (..., m, m) of positive definite matrices, differentiable in every way.

    By `"newton_schulz"`, traced and transformed the smallest eigenvalue must be at least shrinkage/d of the trace.
    """
    tracing = torch.compiler.is_compiling()
    # it grows 2.25-fold a step until convergence turns quadratic
    steps = math.ceil(math.log(d / (1e-12 if tracing else max(shrinkage, 1e-12))) / math.log(2.25)) + 6
    if tracing or checks.transformed():
        # neither knows functions with derivatives of their own
        return _newton_schulz(a, steps)
    root: Tensor = _InverseRoot.apply(a, steps if method == "newton_schulz" else 0)  # type: ignore[no-untyped-call]
    return root


def whitening_matrix(covariance: Tensor, method: str, shrinkage: float) -> Tensor:
    """W (..., d, d) with W C_ε Wᵀ = I, in the covariance's dtype; worked out in float64."""
    c = shrink(covariance, shrinkage)
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    if method == "cholesky":
        factor, failed = torch.linalg.cholesky_ex(c)
        if awaited(covariance, shrinkage):
            pivots = factor.diagonal(dim1=-2, dim2=-1).square()
            refuse_singular(failed.any() | _is_singular(pivots, covariance.dtype, shrinkage), shrinkage)
        matrix: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(c), upper=False)
    else:
        matrix = inverse_root(c, method, c.shape[-1], shrinkage)
        # a NaN residual is a failure too
        failed = ~((matrix @ c @ matrix - eye).abs().amax() < 1e-2)
        singular = _is_singular(torch.linalg.eigvalsh(c), covariance.dtype, 0.0) if shrinkage == 0 else failed
        refuse_singular(failed | singular, shrinkage)
    return matrix.to(covariance.dtype)


def _is_singular(values: Tensor, dtype: torch.dtype, shrinkage: float) -> Tensor:
    """Whether pivots or eigenvalues are rounding noise of a covariance of `dtype`; with shrinkage none can be."""
    if shrinkage > 0:
        return torch.zeros((), dtype=torch.bool, device=values.device)
    return (values.amin(-1) <= values.shape[-1] * torch.finfo(dtype).eps * values.amax(-1)).any()


def awaited(covariance: Tensor, shrinkage: float) -> bool:
    """Whether the host is to wait for the answer whether a covariance (b, d, d) is singular by Cholesky.

    On a GPU that stalls the stream. A larger shrinkage is more than the covariance's rounding can take away: there is no
    need to ask.
    """
    noise = covariance.shape[-1] * torch.finfo(covariance.dtype).eps
    return covariance.device.type == "cpu" or shrinkage < 4 * noise


def refuse_singular(singular: Tensor, shrinkage: float) -> None:
    """Raise if a covariance was; where nothing can be read (tracing, vmap, capture of a CUDA graph) the result is NaN."""
    if checks.traced(singular) or (singular.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if bool(singular):
        raise ValueError(
            f"shrinkage = {shrinkage} leaves the covariance singular (n <= d?): give a larger one, e.g. 1e-4"
        )


def whitening_matrix_backward(
    dmatrix: Tensor, covariance: Tensor, matrix: Tensor, method: str, shrinkage: float
) -> Tensor:
    """Symmetric gradient on the covariance (float64) from the gradient on W."""
    dw, w = dmatrix.double(), matrix.double()
    if method == "cholesky":
        # dL = -Wᵀ dW Wᵀ, then the reverse of the Cholesky factorisation: W'ᵀ Φ(Lᵀ dL) W', symmetrised
        inner = -(dw @ w.mT)
        phi = inner.tril()
        phi.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        dc = w.mT @ phi @ w
    else:
        # Daleckii and Krein: no difference of eigenvalues is divided by, so repeated ones do no harm
        values, vectors = torch.linalg.eigh(shrink(covariance, shrinkage))
        root = values.sqrt()
        kernel = -1 / (root.unsqueeze(-1) * root.unsqueeze(-2) * (root.unsqueeze(-1) + root.unsqueeze(-2)))
        dc = vectors @ (kernel * (vectors.mT @ dw @ vectors)) @ vectors.mT
    trace = dc.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    dc = (0.5 * (1 - shrinkage)) * (dc + dc.mT)
    dc.diagonal(dim1=-2, dim2=-1).add_(shrinkage * trace)
    spread = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] > 0
    return torch.where(spread, dc, 0.0)


def whiten(z: Tensor, method: str, shrinkage: float, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = z.to(accumulation_dtype(z.dtype))
    mean = x.mean(-2) if center else x.new_zeros(x.shape[0], x.shape[2])
    x = x - mean.unsqueeze(-2)
    covariance = x.mT @ x / z.shape[-2]
    if too_narrow(covariance, mean):
        return whiten_in_float64(whiten, z, method, shrinkage, center)
    covariance = drop_noise(covariance, mean)
    matrix = whitening_matrix(covariance, method, shrinkage)
    return (x @ matrix.mT).to(z.dtype), mean, covariance, matrix


def whiten_backward(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    covariance: Tensor,
    matrix: Tensor,
    method: str,
    shrinkage: float,
    center: bool,
    y: Tensor | None = None,
) -> Tensor:
    if too_narrow(covariance, mean):
        return whiten_backward_in_float64(whiten, whiten_backward, grad, z, method, shrinkage, center)
    x = z.to(mean.dtype) - mean.unsqueeze(-2)
    g = grad.to(mean.dtype)
    dcovariance = whitening_matrix_backward(g.mT @ x, covariance, matrix, method, shrinkage).to(mean.dtype)
    dx = g @ matrix + 2 / z.shape[-2] * (x @ dcovariance)
    return (dx - dx.mean(-2, keepdim=True) if center else dx).to(z.dtype)
