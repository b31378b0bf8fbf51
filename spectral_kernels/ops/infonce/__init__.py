"""Contrastive losses: InfoNCE (with in-batch negatives or a queue) and NT-Xent."""

from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import choose, define, differentiate, op
from spectral_kernels.ops.covariance import PRECISIONS
from spectral_kernels.ops.infonce import reference

REDUCTIONS = ("mean", "sum", "none")
LOSSES = ("info_nce", "nt_xent")


def _check_info_nce(query: Tensor, key: Tensor, queue: Tensor | None, *_: Any) -> None:
    checks.finite_rows(query, "query")
    checks.finite_rows(key, "key")
    if queue is not None:
        checks.finite_rows(queue, "queue")


def _check_nt_xent(z0: Tensor, z1: Tensor, *_: Any) -> None:
    checks.finite_rows(z0, "z0")
    checks.finite_rows(z1, "z1")


define(
    reference.info_nce,
    check=_check_info_nce,
)
define(
    reference.info_nce_backward,
)
define(
    reference.nt_xent,
    check=_check_nt_xent,
)
define(
    reference.nt_xent_backward,
)
define(
    reference.info_nce_grad_norms,
    check=_check_info_nce,
)


def _info_nce_backward(
    grad: Tensor, tensors: tuple[Tensor, ...], kept: tuple[Tensor, ...], options: tuple[Any, ...], wanted: Any
) -> tuple[Tensor | None, ...]:
    # MoCo's queue is a buffer: its gradient, most of the work, is left out
    queue_gradient = wanted[2]
    gradients = op("info_nce_backward")(grad, *tensors, *kept, *options[:-1], queue_gradient, options[-1])
    return gradients[0], gradients[1], gradients[2] if queue_gradient else None


def _nt_xent_backward(
    grad: Tensor, tensors: tuple[Tensor, ...], kept: tuple[Tensor, ...], options: tuple[Any, ...], _wanted: Any
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = op("nt_xent_backward")(grad, *tensors, *kept, *options)
    return gradients


differentiate("info_nce", tensors=3, keep=lambda inputs, outputs: outputs, backward=_info_nce_backward)
differentiate("nt_xent", tensors=2, keep=lambda inputs, outputs: outputs, backward=_nt_xent_backward)
differentiate("info_nce_grad_norms", tensors=3, backward=None)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def check_rows(
    a: Tensor, a_name: str, b: Tensor, b_name: str, queue: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two (B, d) tensors, and perhaps a queue (K, d), of one device and dtype; under autocast of the widest dtype."""
    a, b = checks.floating(a, a_name, ndim=2), checks.floating(b, b_name, ndim=2)
    if queue is not None:
        queue = checks.floating(queue, "queue", ndim=2)
    if torch.is_autocast_enabled(a.device.type):
        dtype = torch.promote_types(a.dtype, b.dtype)
        if queue is not None:
            dtype = torch.promote_types(dtype, queue.dtype)
            queue = queue.to(dtype)
        a, b = a.to(dtype), b.to(dtype)
    checks.same_features(a, a_name, b, b_name)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{b_name} has {b.shape[0]} rows, but {a_name} has {a.shape[0]}")
    if queue is not None:
        checks.same_features(a, a_name, queue, "queue")
    elif a.shape[0] < 2:
        raise ValueError(f"{a_name} has 1 row{' and no queue' if a_name == 'query' else ''}: there is no negative")
    return a, b, queue


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    queue: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """One-way InfoNCE: −ln(e^{aᵢ/τ} / (e^{aᵢ/τ} + Σ_k e^{s_k/τ})), aᵢ = uᵢ·vᵢ, s_k = uᵢ·v_k (docs/theory.md §2).

    The negatives of an anchor are the other keys or, with a queue (MoCo), the rows of the queue. Rows are L2-normalised
    inside; gradients go through the normalisation.

    Args:
        query, key: (B, d), row i of key is the positive of row i of query; float64, float32, bfloat16 or
            float16; of one dtype, or under autocast promoted to the widest.
        queue: (K, d) negatives of every anchor; its rows get gradients too if it wants them.
        temperature: τ > 0.
        reduction: `"mean"`, `"sum"` or `"none"`.
        precision: of the products on a GPU for inputs below float64, as in `covariance`.
        backend: see `use_backend`.

    Returns:
        Scalar, or (B,) unreduced; float64 for float64 rows, else float32. Never NaN: losses are exact down to where the
        positive has all but won.

    Raises:
        ValueError: wrong shapes or dtypes, one row and no queue, temperature not above 0, unknown reduction or
            precision, a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    query, key, queue = check_rows(query, "query", key, "key", queue)
    temperature = checks.positive(temperature, "temperature")
    checks.one_of(reduction, "reduction", REDUCTIONS)
    checks.one_of(precision, "precision", PRECISIONS)
    name = choose("info_nce", query.device, backend)
    return _reduce(op("info_nce")(query, key, queue, temperature, precision, name)[0], reduction)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float = 0.5,
    reduction: str = "mean",
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """NT-Xent, SimCLR's loss over the 2B views of a batch: each view is an anchor, the other view of its sample is the
    positive, the remaining 2B − 2 views are the negatives (Chen et al. 2020, equation 1).

    Args:
        z0, z1: (B, d), two views of the same B samples; float64, float32, bfloat16 or float16. Normalised inside.
        temperature: τ > 0.
        reduction: `"mean"`, `"sum"` or `"none"`: (2B,), the anchors of z0 first.
        precision: of the products on a GPU for inputs below float64, as in `covariance`.
        backend: see `use_backend`.

    Returns:
        Scalar, or (2B,) unreduced; float64 for float64 rows, else float32.

    Raises:
        ValueError: wrong shapes or dtypes, one sample only, temperature not above 0, unknown reduction or precision,
            a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    z0, z1, _ = check_rows(z0, "z0", z1, "z1")
    temperature = checks.positive(temperature, "temperature")
    checks.one_of(reduction, "reduction", REDUCTIONS)
    checks.one_of(precision, "precision", PRECISIONS)
    name = choose("nt_xent", z0.device, backend)
    return _reduce(op("nt_xent")(z0, z1, temperature, precision, name)[0], reduction)


def info_nce_grad_norms(
    query: Tensor,
    key: Tensor,
    *,
    queue: Tensor | None = None,
    temperature: float = 0.1,
    loss: str = "info_nce",
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """Squared norm of each anchor's gradient, ‖∂Lᵢ/∂uᵢ‖² = (w/τ)²·‖m_q − v₊‖² (docs/theory.md §2), in one pass.

    u is the *normalised* query, w the softmax mass on the negatives, m_q their mean under the softmax among themselves.
    Terms through other roles of an embedding (an anchor is also the key of others) are not part of it. Exact also where
    the positive has all but won, because nothing close to 1 is subtracted from 1. Not differentiable.

    Args:
        query, key: (B, d), row i of key is the positive of row i of query; the two views for `loss="nt_xent"`.
            float64, float32, bfloat16 or float16; normalised inside.
        queue: (K, d), the negatives of every anchor (MoCo); None: the other keys. Not with `"nt_xent"`.
        temperature: τ > 0.
        loss: `"info_nce"`, or `"nt_xent"` with its 2B anchors, those of query first.
        precision: of the products on a GPU for inputs below float64, as in `covariance`.
        backend: see `use_backend`.

    Returns:
        (B,), or (2B,) for NT-Xent; float64 for float64 rows, else float32.

    Raises:
        ValueError: wrong shapes or dtypes, one row and no queue, a queue with NT-Xent, temperature not above 0, unknown
            loss or precision, a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    query, key, queue, temperature = check_anchors(query, key, queue, temperature, loss)
    checks.one_of(precision, "precision", PRECISIONS)
    name = choose("info_nce_grad_norms", query.device, backend)
    norms: Tensor = op("info_nce_grad_norms")(query, key, queue, temperature, loss, precision, name)
    return norms


def check_anchors(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, loss: str
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """The arguments that `info_nce_grad_norms` and `gradient_band` have in common."""
    checks.one_of(loss, "loss", LOSSES)
    if queue is not None and loss == "nt_xent":
        raise ValueError("queue does not go with loss='nt_xent', whose negatives are the views of the batch")
    return *check_rows(query, "query", key, "key", queue), checks.positive(temperature, "temperature")
