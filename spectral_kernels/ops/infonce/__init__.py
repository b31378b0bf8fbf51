"""Contrastive losses: InfoNCE (with in-batch negatives, a queue or each query's own), NT-Xent and SigLIP's."""

from typing import Any

from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import choose, define, differentiate, op
from spectral_kernels.ops.covariance import PRECISIONS
from spectral_kernels.ops.infonce import reference
from spectral_kernels.ops.infonce.arguments import (
    REDUCTIONS,
    check_anchors,
    check_rows,
    labels,
    left_out,
    reduce,
    scalar,
)
from spectral_kernels.ops.infonce.sigmoid import sigmoid_loss as sigmoid_loss


def _check_info_nce(query: Tensor, key: Tensor, queue: Tensor | None, *_: Any) -> None:
    checks.finite_rows(query, "query")
    checks.finite_rows(key, "key")
    if queue is not None:
        checks.finite_rows(queue, "queue")


def _check_nt_xent(z0: Tensor, z1: Tensor, *_: Any) -> None:
    checks.finite_rows(z0, "z0")
    checks.finite_rows(z1, "z1")


define(reference.info_nce, check=_check_info_nce)
define(reference.info_nce_backward)
define(reference.info_nce_own, cpp="reference", triton=False)
define(reference.nt_xent, check=_check_nt_xent)
define(reference.nt_xent_backward)
define(reference.info_nce_grad_norms, check=_check_info_nce)


def _temperature_gradient(along: Tensor, temperature: Tensor, roles: int) -> Tensor:
    """From u·∂L/∂u of each anchor, summed over its `roles`."""
    return (along.sum() / (-roles * temperature.to(along))).to(temperature)


def _info_nce_backward(
    grad: Tensor, tensors: tuple[Tensor, ...], kept: tuple[Any, ...], options: tuple[Any, ...], wanted: Any
) -> tuple[Tensor | None, ...]:
    query, key, queue, temperature = tensors
    *left_out, loss, lse = kept
    *_, precision, backend = options
    # MoCo's queue is a buffer: its gradient, most of the work, is left out
    dquery, dkey, dqueue, along = op("info_nce_backward")(
        grad, query, key, queue, loss, lse, temperature, *left_out, precision, wanted[2], wanted[3], backend
    )
    dtemperature = _temperature_gradient(along, temperature, 1) if wanted[3] else None
    return dquery, dkey, dqueue if wanted[2] else None, dtemperature


def _nt_xent_backward(
    grad: Tensor, tensors: tuple[Tensor, ...], kept: tuple[Any, ...], options: tuple[Any, ...], wanted: Any
) -> tuple[Tensor | None, ...]:
    z0, z1, temperature = tensors
    groups, loss, lse = kept
    *_, precision, backend = options
    d0, d1, along = op("nt_xent_backward")(grad, z0, z1, loss, lse, temperature, groups, precision, wanted[2], backend)
    return d0, d1, _temperature_gradient(along, temperature, 2) if wanted[2] else None


# masks and labels are kept as saved tensors: torch then refuses a backward pass after one was changed
differentiate("info_nce", tensors=4, keep=lambda inputs, outputs: (*inputs[4:7], *outputs), backward=_info_nce_backward)
differentiate("info_nce_own", tensors=4)
differentiate("nt_xent", tensors=3, keep=lambda inputs, outputs: (inputs[3], *outputs), backward=_nt_xent_backward)
differentiate("info_nce_grad_norms", tensors=3, backward=None)


def _check_together(
    queue: Tensor | None, negatives: Tensor | None, groups: Tensor | None, queue_groups: Tensor | None, symmetric: bool
) -> None:
    given = {"queue": queue is not None, "negatives": negatives is not None, "symmetric": symmetric}
    given["groups"] = groups is not None
    for one, other in (
        ("negatives", "queue"),
        ("symmetric", "queue"),
        ("symmetric", "negatives"),
        ("groups", "negatives"),
    ):
        if given[one] and given[other]:
            raise ValueError(f"{one} does not go with {other}")
    if queue is None and queue_groups is not None:
        raise ValueError("queue_groups needs a queue")
    if queue is not None and (groups is None) != (queue_groups is None):
        raise ValueError("with a queue, groups and queue_groups go together")


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    queue: Tensor | None = None,
    negatives: Tensor | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    queue_groups: Tensor | None = None,
    symmetric: bool = False,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """One-way InfoNCE: −ln(e^{aᵢ/τ} / (e^{aᵢ/τ} + Σ_k e^{s_k/τ})), aᵢ = uᵢ·vᵢ, s_k = uᵢ·v_k (docs/theory.md §2).

    The negatives of an anchor are the other keys or, instead, the rows of a queue (MoCo, He et al. 2020) or negatives of its
    own. Rows are L2-normalised inside; gradients go through the normalisation. Memory is O((B + M)d) with C++ and Triton.

    Args:
        query: (B, d), float64, float32, bfloat16 or float16.
        key: (B, d), or (M, d) with M ≥ B where neither queue nor negatives are given nor symmetric: row i is the positive of
            row i of query, rows from B on are further negatives of every anchor (hard negatives, Henderson et al. 2017; keys
            of other ranks). Of query's dtype, or under autocast both promoted to the widest.
        queue: (K, d) negatives of every anchor; its rows get gradients too if they want them.
        negatives: (B, k, d), k negatives for each query, as plain PyTorch composes them: O(Bkd) memory.
        mask: bool (B, M), (B, K) with a queue, (B, k) with negatives; True leaves a pair out of the negatives: no part in the
            loss, no gradient. Whether its own positive is masked makes no difference to an anchor.
        groups: (B,) whole numbers of any dtype: keys of an anchor's own group are none of its negatives (samples of one class
            or document; duplicates). (M,) labels keys beyond B too, which without a label are negatives of all.
        queue_groups: (K,), the same of the queue's rows; with a queue, groups needs it.
        symmetric: the mean of this loss and of that with query and key, and the sides of mask, exchanged (CLIP, Radford et
            al. 2021).
        temperature: τ > 0, a number, or a tensor of one element, which gets a gradient if it wants one. One on a GPU is waited
            for, and its value is not checked.
        reduction: `"mean"`, `"sum"` or `"none"`.
        precision: of the products on a GPU for inputs below float64, as in `covariance`.
        backend: see `use_backend`.

    Returns:
        Scalar, or (B,) unreduced; float64 for float64 rows, else float32. Never NaN: losses are exact down to where the
        positive has all but won, and 0, as their gradients, where every negative is left out.

    Raises:
        ValueError: wrong shapes or dtypes, one key and no queue, options that exclude each other, temperature not above 0,
            unknown reduction or precision, a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    if symmetric or negatives is not None or groups is not None or queue_groups is not None:
        _check_together(queue, negatives, groups, queue_groups, symmetric)
    checks.one_of(reduction, "reduction", REDUCTIONS)
    checks.one_of(precision, "precision", PRECISIONS)
    if negatives is not None:
        query, key, negatives = check_rows(query, "query", key, "key", negatives, "negatives")
        assert negatives is not None
        if negatives.shape[0] != query.shape[0]:
            raise ValueError(f"negatives are of {negatives.shape[0]} queries, but query has {query.shape[0]} rows")
        temperature = scalar(temperature, "temperature", query)
        if mask is not None:
            mask = left_out(mask, "mask", (query.shape[0], negatives.shape[1]), query)
        # not the op's: its derivatives are the reference's, which would look again
        _check_info_nce(query, key, None)
        checks.finite_rows(negatives, "negatives")
        name = choose("info_nce_own", query.device, backend)
        return reduce(op("info_nce_own")(query, key, negatives, temperature, mask, name), reduction)
    query, key, queue = check_rows(query, "query", key, "key", queue, more=queue is None and not symmetric)
    temperature = scalar(temperature, "temperature", query)
    if mask is not None:
        mask = left_out(mask, "mask", (query.shape[0], len(key if queue is None else queue)), query)
    if groups is not None:
        groups = labels(groups, "groups", (query.shape[0], key.shape[0]), query)
    if queue is not None and queue_groups is not None:
        queue_groups = labels(queue_groups, "queue_groups", (queue.shape[0],), query)
    name = choose("info_nce", query.device, backend)
    call = op("info_nce")
    loss: Tensor = call(query, key, queue, temperature, mask, groups, queue_groups, precision, name)[0]
    if symmetric:
        back = None if mask is None else mask.mT
        loss = (loss + call(key, query, None, temperature, back, groups, None, precision, name)[0]) / 2
    return reduce(loss, reduction)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    groups: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """NT-Xent, SimCLR's loss over the 2B views of a batch: each view is an anchor, the other view of its sample is the
    positive, the remaining 2B − 2 views are the negatives (Chen et al. 2020, equation 1).

    Args:
        z0, z1: (B, d), two views of the same B samples; float64, float32, bfloat16 or float16. Normalised inside.
        groups: (B,) whole numbers of any dtype: views of samples of the anchor's own group are none of its negatives.
        temperature: τ > 0, a number, or a tensor of one element, which gets a gradient if it wants one, as in `info_nce`.
        reduction: `"mean"`, `"sum"` or `"none"`: (2B,), the anchors of z0 first.
        precision: of the products on a GPU for inputs below float64, as in `covariance`.
        backend: see `use_backend`.

    Returns:
        Scalar, or (2B,) unreduced; float64 for float64 rows, else float32. 0 for an anchor without negatives.

    Raises:
        ValueError: wrong shapes or dtypes, one sample only, temperature not above 0, unknown reduction or precision,
            a row that holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    z0, z1, _ = check_rows(z0, "z0", z1, "z1")
    temperature = scalar(temperature, "temperature", z0)
    checks.one_of(reduction, "reduction", REDUCTIONS)
    checks.one_of(precision, "precision", PRECISIONS)
    if groups is not None:
        groups = labels(groups, "groups", (z0.shape[0],), z0)
    name = choose("nt_xent", z0.device, backend)
    return reduce(op("nt_xent")(z0, z1, temperature, groups, precision, name)[0], reduction)


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
