"""Checks of the losses' arguments, and their reduction."""

from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks

REDUCTIONS = ("mean", "sum", "none")
LOSSES = ("info_nce", "nt_xent")


def reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def check_rows(
    a: Tensor,
    a_name: str,
    b: Tensor,
    b_name: str,
    others: Tensor | None = None,
    others_name: str = "queue",
    *,
    more: bool = False,
    alone: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, d) and (B, d), where `more` (M, d) with M >= B, and perhaps a queue (K, d) or negatives (B, k, d), of one device and
    dtype; under autocast of the widest dtype. `alone`: one row will do.
    """
    a, b = checks.floating(a, a_name, ndim=2), checks.floating(b, b_name, ndim=2)
    if others is not None:
        others = checks.floating(others, others_name, ndim=2 if others_name == "queue" else 3)
    if torch.is_autocast_enabled(a.device.type):
        dtype = torch.promote_types(a.dtype, b.dtype)
        if others is not None:
            dtype = torch.promote_types(dtype, others.dtype)
            others = others.to(dtype)
        a, b = a.to(dtype), b.to(dtype)
    checks.same_features(a, a_name, b, b_name)
    if a.shape[0] > b.shape[0] or (a.shape[0] != b.shape[0] and not more):
        raise ValueError(f"{b_name} has {b.shape[0]} rows, but {a_name} has {a.shape[0]}")
    if others is not None:
        checks.same_features(a, a_name, others, others_name)
    elif b.shape[0] < 2 and not alone:
        raise ValueError(f"{a_name} has 1 row{' and no queue' if a_name == 'query' else ''}: there is no negative")
    return a, b, others


def check_anchors(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float, loss: str
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """The arguments that `info_nce_grad_norms` and `gradient_band` have in common."""
    checks.one_of(loss, "loss", LOSSES)
    if queue is not None and loss == "nt_xent":
        raise ValueError("queue does not go with loss='nt_xent', whose negatives are the views of the batch")
    return *check_rows(query, "query", key, "key", queue), checks.positive(temperature, "temperature")


def scalar(value: float | Tensor, name: str, rows: Tensor, *, positive: bool = True) -> float | Tensor:
    """A finite number, above 0 where `positive`; a 0-d tensor where it is a tensor that may get a gradient or lies on a GPU."""
    if not isinstance(value, Tensor):
        return checks.positive(value, name) if positive else checks.finite(value, name)
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{name} must be one number, got {value.dtype} of shape {tuple(value.shape)}")
    if value.device.type != "cpu" and value.device != rows.device:
        raise ValueError(f"{name} is on {value.device}, but the rows are on {rows.device}")
    if checks.readable(value):
        number = scalar(value.item(), name, rows, positive=positive)
        if not (value.requires_grad and torch.is_grad_enabled()) and not checks.transformed():
            return number
    return value.reshape(())


def left_out(value: Any, name: str, shape: tuple[int, int], rows: Tensor) -> Tensor:
    """A bool mask of a shape, beside `rows`."""
    mask = checks.tensor(value, name)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{name} must be bool of shape {tuple(shape)}, got {mask.dtype} of shape {tuple(mask.shape)}")
    return _beside(mask, name, rows)


def labels(value: Any, name: str, counts: tuple[int, ...], rows: Tensor) -> Tensor:
    """int64 labels, as many as one of `counts`, from whole numbers in a tensor or an array, beside `rows`."""
    found = checks.tensor(value, name)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise ValueError(f"{name} must be whole numbers, got {found.dtype}")
    if found.ndim != 1 or found.shape[0] not in counts:
        wanted = " or ".join(f"({count},)" for count in dict.fromkeys(counts))
        raise ValueError(f"{name} must have shape {wanted}, got shape {tuple(found.shape)}")
    return _beside(found.long(), name, rows)


def _beside(value: Tensor, name: str, rows: Tensor) -> Tensor:
    if value.device != rows.device:
        raise ValueError(f"{name} is on {value.device}, but the rows are on {rows.device}")
    return value
