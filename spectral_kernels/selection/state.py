"""Entries of a saved state, looked at before anything is loaded: one ValueError that names the entry."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_kernels.checks import shortened


def complete(state: Any, owner: str, names: Collection[str]) -> None:
    """Raise for what is no dict, or lacks entries."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of the {owner} must be a dict, got {described(state)}")
    missing = set(names) - set(state)
    if missing:
        raise ValueError(f"the state of the {owner} lacks {', '.join(sorted(missing))}")


def is_plain(value: Any, dtype: torch.dtype, ndim: int) -> bool:
    """Whether it is a tensor as `state_dict` returns them: dense, with values to read, without gradients."""
    if not isinstance(value, Tensor) or value.is_nested:
        return False
    readable = value.layout == torch.strided and value.device.type != "meta" and not value.requires_grad
    return readable and value.dtype == dtype and value.ndim == ndim


def described(value: Any) -> str:
    """What an error says was got: a few words, however large it is."""
    if not isinstance(value, Tensor):
        return shortened(value)
    if value.is_nested:
        return "a nested tensor"
    layout = "" if value.layout == torch.strided else f" {value.layout}"
    device = " on meta" if value.device.type == "meta" else ""
    return f"{value.dtype} {tuple(value.shape)}{layout}{device}{' with requires_grad' if value.requires_grad else ''}"


def row_mask(value: Any, name: str, n: int) -> Tensor:
    """A copy on the CPU of a bool mask (n,)."""
    if not is_plain(value, torch.bool, 1) or len(value) != n:
        raise ValueError(f"{name} of the state must be a bool for each of {n} rows, got {described(value)}")
    mask: Tensor = value.to("cpu", copy=True)
    return mask


def rows_among(value: Any, name: str, allowed: Tensor, least: int, most: int) -> Tensor:
    """A copy on the CPU of int64 rows (r,), least <= r <= most, each once and True in the mask `allowed` (n,)."""
    if not is_plain(value, torch.int64, 1) or not least <= len(value) <= most:
        counted = f"{most}" if least == most else f"at most {most}"
        raise ValueError(f"{name} of the state must be {counted} rows, got {described(value)}")
    rows: Tensor = value.to("cpu", copy=True)
    outside = (rows < 0) | (rows >= len(allowed))
    if bool(outside.any()):
        raise ValueError(f"{name} of the state must lie in [0, {len(allowed)}), got {int(rows[outside][0])}")
    left = allowed.clone()
    left[rows] = False
    if int(allowed.sum()) - int(left.sum()) != len(rows):
        raise ValueError(f"{name} of the state must name rows of the shard that were left, each once")
    return rows
