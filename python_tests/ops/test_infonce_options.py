"""The losses' options in random combinations, against dense autograd in float64; and what each alone promises."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

import spectral_kernels as sk

BACKENDS = ("reference", "cpp", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[2:]
# what values and gradients, the temperature's too, may be off, relative to the largest of them; of half precision, losses and
# temperatures, but gradients on rows are rounded
WITHIN = {torch.float64: 1e-11}


@dataclass(frozen=True)
class Configuration:
    loss: str
    b: int
    m: int
    d: int
    queue: int | None
    mask: float | None
    groups: int | None
    all_labelled: bool
    symmetric: bool
    learned: bool
    reduction: str
    dtype: torch.dtype
    backend: str
    strided: bool
    temperature: float


def drawn(seed: int) -> Configuration:
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    loss = pick("info_nce", "info_nce", "nt_xent")
    backend = pick(*BACKENDS)
    # beyond a block of each kind, which Triton's interpreter takes seconds for
    b = pick(2, 3, 5, 16, 33, 65, 131) if backend != "triton" else pick(2, 3, 5, 33, 65)
    queue = pick(None, None, 1, 7, 70, 600 if backend != "triton" else 130)
    symmetric = queue is None and pick(False, False, True)
    m = b if queue is not None or symmetric else b + pick(0, 0, 1, 7, 70, 500 if backend != "triton" else 65)
    return Configuration(
        loss, b, b if loss == "nt_xent" else m, pick(2, 3, 8, 33, 130), queue, pick(None, 0.2, 0.9), pick(None, 1, 3, 40),
        pick(True, False), symmetric, pick(True, True, False), pick("mean", "sum", "none"), pick(*DTYPES), backend,
        pick(True, False), pick(0.05, 0.2, 1.0),
    )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    queue: Tensor | None
    temperature: Tensor
    mask: Tensor | None
    groups: Tensor | None
    queue_groups: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.query, self.key, self.queue, self.temperature) if x is not None and x.requires_grad]


def made(c: Configuration, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        x = torch.randn(n, c.d, generator=generator, dtype=torch.float64) + 0.2
        x[5::11] = 0
        x = x.to(c.dtype)
        return (x.mT.contiguous().mT if c.strided else x).requires_grad_()

    def labels(n: int) -> Tensor:
        return torch.randint(
            -1, c.groups or 1, (n,), generator=generator, dtype=torch.int32 if c.strided else torch.int64
        )

    others = c.m if c.queue is None else c.queue
    mask = None
    if c.mask is not None and c.loss == "info_nce":
        mask = torch.rand(others, c.b, generator=generator).mT < c.mask
        mask[0] = True
    in_batch = c.loss == "nt_xent" or c.queue is None
    queue = None if in_batch else rows(others)
    tau = torch.tensor(c.temperature, dtype=torch.float32 if c.strided else torch.float64, requires_grad=c.learned)
    return Inputs(
        rows(c.b), rows(c.m), queue, tau, mask,
        None if c.groups is None else labels(c.m if c.all_labelled and in_batch else c.b),
        None if c.groups is None or in_batch else labels(others),
    )  # fmt: skip


def called(c: Configuration, i: Inputs) -> Tensor:
    options = {
        "temperature": i.temperature if c.learned else float(i.temperature),
        "reduction": c.reduction,
        "backend": c.backend,
    }
    if c.loss == "nt_xent":
        return sk.nt_xent(i.query, i.key, groups=i.groups, **options)
    return sk.info_nce(
        i.query, i.key, queue=i.queue, mask=i.mask, groups=i.groups, queue_groups=i.queue_groups, symmetric=c.symmetric,
        **options,
    )  # fmt: skip


def unit(x: Tensor) -> Tensor:
    return torch.where((x == 0).all(-1, keepdim=True), x * 0, normalize(torch.where(x == 0, 1e-300, x), dim=-1))


def rows_of_loss(logits: Tensor, positive: Tensor, out: Tensor) -> Tensor:
    """Of each anchor, from its logits and which of them are no negatives."""
    none = out.all(1)
    negatives = logits.masked_fill(out, -torch.inf).masked_fill(none[:, None], 0.0)
    return torch.where(none, 0.0, softplus(negatives.logsumexp(1) - positive, threshold=700))


def same_group(groups: Tensor, others: Tensor, n: int) -> Tensor:
    out = torch.zeros(len(groups), n, dtype=torch.bool)
    out[:, : len(others)] = groups[:, None] == others[None, :]
    return out


def dense(c: Configuration, i: Inputs) -> Tensor:
    """All pairs at once, in float64."""
    u, v = unit(i.query.double()), unit(i.key.double())
    tau = i.temperature.double()
    if c.loss == "nt_xent":
        x = torch.cat([u, v])
        out = torch.eye(c.b, dtype=torch.bool).repeat(2, 2)
        if i.groups is not None:
            out |= same_group(i.groups, i.groups, c.b).repeat(2, 2)
        loss = rows_of_loss(x @ x.mT / tau, (x * x.roll(c.b, 0)).sum(1) / tau, out)
    else:
        others = v if i.queue is None else unit(i.queue.double())
        out = torch.eye(c.b, len(others), dtype=torch.bool) if i.queue is None else torch.zeros(c.b, len(others)).bool()
        if i.mask is not None:
            out |= i.mask
        if i.groups is not None:
            out |= same_group(i.groups[: c.b], i.groups if i.queue_groups is None else i.queue_groups, len(others))
        positive = (u * v[: c.b]).sum(1) / tau
        loss = rows_of_loss(u @ others.mT / tau, positive, out)
        if c.symmetric:
            loss = (loss + rows_of_loss(v @ u.mT / tau, positive, out.mT)) / 2
    return loss if c.reduction == "none" else loss.mean() if c.reduction == "mean" else loss.sum()


def error(got: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Largest difference, relative to the largest expected value, at least `floor`."""
    assert got.shape == expected.shape and bool(got.isfinite().all())
    got, expected = got.detach(), expected.detach()
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(floor))


def check(seed: int) -> None:
    c = drawn(seed)
    i = made(c, seed)
    loss, exact = called(c, i), dense(c, i)
    within = WITHIN.get(c.dtype, 1e-5)
    assert error(loss, exact) <= within, c
    weight = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), i.leaves)
    expected = torch.autograd.grad((exact * weight).sum(), i.leaves)
    # where what is added up cancels, torch's own float32 is off by more: a share of the terms, of the order of 1/τ and 1/τ²
    floor = 0.02 * float(weight.abs().max()) / c.temperature / (c.b if c.reduction == "mean" else 1)
    for leaf, one, other in zip(i.leaves, found, expected, strict=True):
        assert one.dtype == leaf.dtype
        allowed = max(within, 4 * torch.finfo(leaf.dtype).eps)
        assert error(one, other, 5 * floor / c.temperature if leaf is i.temperature else floor) <= allowed, (
            c,
            leaf.shape,
        )


@pytest.mark.parametrize("first", range(0, 150, 10))
def test_random_configurations(first: int) -> None:
    for seed in range(first, first + 10):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_a_thousand_random_configurations(first: int) -> None:
    for seed in range(first, first + 50):
        check(seed)
