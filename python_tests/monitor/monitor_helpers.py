"""Views of a batch, and a stand-in for Lightning."""

import sys
import types

import pytest
import torch
from torch import Tensor


def rows(seed: int = 0, n: int = 32, d: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(n, d, generator=generator)
    return query, query + 0.3 * torch.randn(n, d, generator=generator)


def stand_in_for_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the callback needs of it; examples/ has the real one."""
    stand_in = types.ModuleType("pytorch_lightning")
    stand_in.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", stand_in)
