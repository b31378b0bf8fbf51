"""Every registered op with the inputs it is tested on.

The op tests run over this table, and one of them fails when an op of the package is not in it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops.infonce import reference as infonce
from spectral_kernels.ops.whitening import reference as whitening

# `pytest --device`; conftest.py hands it on
DEVICE = torch.device(os.environ.get("SPECTRAL_KERNELS_TEST_DEVICE", "cpu"))
# those that run there
BACKENDS = ("reference", "cpp", "triton") if DEVICE.type == "cpu" else ("reference", "triton", "cuda")

TEMPERATURE = 0.3


@dataclass(frozen=True)
class Case:
    """An op with fixed options.

    Attributes:
        op: registered name.
        label: names the case in test ids.
        arguments: makes the op's arguments (without `backend`) from rows (b, n, d).
        gradients: positions of the arguments that have a gradient, none for backward ops and selectors.
        least: rows that a batch needs.
        exact: compared with the reference on the same input to the last index, not with float64.
    """

    op: str
    label: str
    arguments: Callable[[Tensor], tuple[Any, ...]]
    gradients: tuple[int, ...] = ()
    least: int = 1
    exact: bool = False

    def runs_on(self, backend: str, d: int) -> bool:
        """Whether a backend has the op for rows of d features; cuda has some, and not for all sizes."""
        if backend != "cuda":
            return True
        limit = {"whiten": 128, "spectrum": 256, "batch_spectrum": 256, "greedy_select": 512}.get(self.op, 0)
        if self.op == "whiten":
            return d <= limit and "cholesky" in self.label
        return d <= limit

    def __str__(self) -> str:
        return f"{self.op}-{self.label}" if self.label else self.op


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A gradient, in the accumulation dtype of `like`; the same numbers for every dtype."""
    wide = torch.randn(shape, generator=generator(7), dtype=torch.float64).float()
    return wide.to(accumulation_dtype(like.dtype))


def _batches(z: Tensor) -> tuple[Tensor, Tensor]:
    """A pool, and the indices of three batches of it."""
    n = z.shape[1]
    return z[0], torch.randint(n, (3, max(1, min(n, 64) - 1)), generator=generator(7))


def _pairs(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, their positives nearby, and a queue, in the dtype of z."""
    b, n, d = z.shape
    rows = z.reshape(b * n, d)
    half = max(2, rows.shape[0] // 2)
    query = rows[:half]
    key = (query.double() + 0.5 * query.double().roll(1, -1)).to(z.dtype)
    return query, key, rows[: max(1, half - 1)].flip(-1)


def _left_out(query: Tensor, others: Tensor, how: str) -> tuple[Tensor | None, Tensor | None]:
    """A mask, transposed in memory, that leaves the first anchor nothing; labels of which the rest of the others has none."""
    mask = torch.rand((len(others), len(query)), generator=generator(7)).mT < 0.3
    mask[0] = True
    labels = torch.randint(3, (len(query),), generator=generator(7))
    return mask if "mask" in how else None, labels if "groups" in how else None


def _info_nce(z: Tensor, how: str) -> tuple[Any, ...]:
    query, key, queue = _pairs(z)
    if "more" in how:
        key = torch.cat([key, queue])
    others = queue if "queue" in how else key
    mask, groups = _left_out(query, others, how)
    queue_groups = groups[: len(queue)].flip(0) if groups is not None and "queue" in how else None
    return query, key, queue if "queue" in how else None, TEMPERATURE, mask, groups, queue_groups, "ieee"


def _info_nce_backward(z: Tensor, how: str) -> tuple[Any, ...]:
    query, key, queue, *options = _info_nce(z, how)
    wide = [None if part is None else part.double() for part in (query, key, queue)]
    loss, lse = (part.to(accumulation_dtype(z.dtype)) for part in infonce.info_nce(*wide, *options))
    return _noise((len(query),), z), query, key, queue, loss, lse, *options, True, True


def _own(z: Tensor, how: str) -> tuple[Any, ...]:
    query, key, _ = _pairs(z)
    negatives = torch.stack([key.roll(1, 0), query.roll(1, 1), key.flip(-1)], 1)
    return query, key, negatives, TEMPERATURE, _left_out(query, negatives[0], how)[0]


def _sigmoid(z: Tensor) -> tuple[Any, ...]:
    return *_pairs(z)[:2], TEMPERATURE, -1.5


def _sigmoid_backward(z: Tensor) -> tuple[Any, ...]:
    query, *rest = _sigmoid(z)
    return _noise((len(query),), z), query, *rest


def _nt_xent(z: Tensor, how: str) -> tuple[Any, ...]:
    z0, z1, _ = _pairs(z)
    return z0, z1, TEMPERATURE, _left_out(z0, z1, how)[1], "ieee"


def _grad_norms(z: Tensor, how: str, loss: str) -> tuple[Any, ...]:
    return *_info_nce(z, how)[:4], loss, "ieee"


def _nt_xent_backward(z: Tensor, how: str) -> tuple[Any, ...]:
    z0, z1, *options = _nt_xent(z, how)
    loss, lse = (part.to(accumulation_dtype(z.dtype)) for part in infonce.nt_xent(z0.double(), z1.double(), *options))
    return _noise((2 * len(z0),), z), z0, z1, loss, lse, *options, True


def _whiten_backward(z: Tensor, method: str, center: bool) -> tuple[Any, ...]:
    options = (method, 0.05, center)
    y, *statistics = whitening.whiten(z.double(), *options)
    wide = accumulation_dtype(z.dtype)
    # C++ makes the result again where it is not given
    given = y.to(z.dtype) if method == "cholesky" else None
    return _noise(tuple(z.shape), z).to(z.dtype), z, *(part.to(wide) for part in statistics), *options, given


def _greedy(z: Tensor, all_rows: bool, objective: str, normalize: bool) -> tuple[Any, ...]:
    b, n, _ = z.shape
    start = torch.randint(n, (b, 3), generator=generator(7))
    draws = None if all_rows else torch.randint(n, (b, min(n, 12), 4), generator=generator(7))
    valid = torch.rand((b, n), generator=generator(7)) < 0.8
    valid[:, : min(n, 12)] = True
    seed = torch.randint(1 << 62, (b,), generator=generator(7))
    return z, start, draws, valid, seed, min(n, 12), objective, normalize


def _cases() -> list[Case]:
    cases: list[Case] = []

    def add(op: str, label: str, arguments: Callable[[Tensor], tuple[Any, ...]], **more: Any) -> None:
        cases.append(Case(op, label, arguments, **more))

    def pair(op: str, label: str, shape: Callable[[Tensor], tuple[int, ...]], *options: Any,
             rows: Callable[[Tensor], tuple[Tensor, ...]] = lambda z: (z,), least: int = 1) -> None:  # fmt: skip
        """An op of rows and options, and its backward, whose gradient has this shape."""
        add(op, label, lambda z: (*rows(z), *options), gradients=(0,), least=least)
        add(f"{op}_backward", label, lambda z: (_noise(shape(z), z), *rows(z), *options), least=least)

    for center in (False, True):
        middle = "centred" if center else "raw"
        for normalize in (False, True):
            label = f"{middle}-{'unit' if normalize else 'asis'}"
            pair("covariance", label, lambda z: (len(z), z.shape[2], z.shape[2]), center, normalize, 0, "ieee")
            add("spectrum", label, lambda z, c=center, u=normalize: (z, c, u))
            pair("effective_rank2", label, lambda z: (len(z),), center, normalize, False)
        least = 4 if center else 2
        pair("effective_rank2", f"{middle}-unbiased", lambda z: (len(z),), center, True, True, least=least)
        pair("batch_effective_rank2", middle, lambda _: (3,), center, True, rows=_batches)
        add("spectrum_backward", middle, lambda z, c=center: (_spectrum_grad(z), z, c, True))
        add("batch_spectrum", middle, lambda z, c=center: (*_batches(z), c, True))
        add(
            "batch_spectrum_backward", middle,
            lambda z, c=center: (_spectrum_grad(z[:1].expand(3, -1, -1)), *_batches(z), c, True),
        )  # fmt: skip
        for method in ("cholesky", "zca", "newton_schulz"):
            label = f"{middle}-{method}"
            add("whiten", label, lambda z, m=method, c=center: (z, m, 0.05, c), gradients=(0,))
            add("whiten_backward", label, lambda z, m=method, c=center: _whiten_backward(z, m, c))
    for normalize in (False, True):
        label = "unit" if normalize else "asis"
        add("coding_rate", label, lambda z, u=normalize: (z, torch.tensor(0.5).double(), u), gradients=(0,))
    for how in ("batch", "queue", "mask", "more groups", "queue mask groups"):
        places = (0, 1, 2, 3) if "queue" in how else (0, 1, 3)
        add("info_nce", how, lambda z, how=how: _info_nce(z, how), gradients=places, least=2)
        add("info_nce_backward", how, lambda z, how=how: _info_nce_backward(z, how), least=2)
    for how in ("", "mask"):
        add("info_nce_own", how, lambda z, how=how: _own(z, how), gradients=(0, 1, 2, 3), least=2)
    for how in ("", "groups"):
        add("nt_xent", how, lambda z, how=how: _nt_xent(z, how), gradients=(0, 1, 2), least=2)
        add("nt_xent_backward", how, lambda z, how=how: _nt_xent_backward(z, how), least=2)
    add("sigmoid_loss_rows", "", _sigmoid, gradients=(0, 1, 2, 3), least=2)
    add("sigmoid_loss_rows_backward", "", _sigmoid_backward, least=2)
    for how, loss in (("batch", "info_nce"), ("queue", "info_nce"), ("views", "nt_xent")):
        add("info_nce_grad_norms", how, lambda z, how=how, k=loss: _grad_norms(z, how, k), least=2)
    for objective in ("effective_rank", "logdet"):
        for all_rows in (True, False):
            rows = "all" if all_rows else "draws"
            for normalize in (True, False):
                label = f"{objective}-{rows}-{'unit' if normalize else 'asis'}"
                add(
                    "greedy_select", label,
                    lambda z, a=all_rows, o=objective, u=normalize: _greedy(z, a, o, u), exact=True,
                )  # fmt: skip
    return cases


def _spectrum_grad(z: Tensor) -> Tensor:
    """A gradient that is a symmetric function of the eigenvalues: eigenvectors of equal ones may differ."""
    return torch.ones(z.shape[0], z.shape[2], dtype=accumulation_dtype(z.dtype))


CASES = _cases()
