"""SigLIP's sigmoid loss, in strips of rows: the similarities of all pairs are never stored."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from spectral_kernels import checks
from spectral_kernels.dispatch import choose, define, differentiate, op
from spectral_kernels.ops._rows import accumulation_dtype, read_rows, read_rows_backward
from spectral_kernels.ops.infonce.arguments import REDUCTIONS, check_rows, reduce, scalar

# similarities of a strip
STRIP = 1 << 22


def _strips(
    query: Tensor, v: Tensor, temperature: float | Tensor, bias: float | Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows of a strip, normalised, their similarities, and -z (s/τ + b) of each pair."""
    step = max(1, STRIP // v.shape[0])
    for first in range(0, query.shape[0], step):
        rows = slice(first, min(first + step, query.shape[0]))
        u = read_rows(query[rows], True)
        similarity = u @ v.mT
        logit = similarity / temperature + bias
        yield rows, u, similarity, logit.diagonal_scatter(-logit.diagonal(first), first)


def sigmoid_loss_rows(query: Tensor, key: Tensor, temperature: float | Tensor, bias: float | Tensor) -> Tensor:
    strips = _strips(query, read_rows(key, True), temperature, bias)
    return torch.cat([softplus(logit, threshold=40).sum(-1) for *_, logit in strips])


def sigmoid_loss_rows_backward(
    grad: Tensor, query: Tensor, key: Tensor, temperature: float | Tensor, bias: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = read_rows(key, True)
    dquery, dkey, dv = torch.empty_like(query), torch.empty_like(key), torch.zeros_like(v)
    along, pulled = v.new_zeros(()), v.new_zeros(())
    for rows, u, similarity, logit in _strips(query, v, temperature, bias):
        weights = logit.sigmoid_().mul_(grad[rows, None])
        weights.diagonal(rows.start).neg_()
        pulled += weights.sum()
        dquery[rows] = read_rows_backward(weights @ v / temperature, query[rows], True)
        dv.addmm_(weights.mT, u)
        along += weights.mul_(similarity).sum()
    for first in range(0, key.shape[0], 1024):
        rows = slice(first, first + 1024)
        dkey[rows] = read_rows_backward(dv[rows] / temperature, key[rows], True)
    return dquery, dkey, along / -(temperature**2), pulled


def _fake(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[:1], dtype=accumulation_dtype(query.dtype))


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), grad.new_empty(()), grad.new_empty(())


def _check(query: Tensor, key: Tensor, *_: Any) -> None:
    checks.finite_rows(query, "query")
    checks.finite_rows(key, "key")


def _backward(
    grad: Tensor, tensors: tuple[Tensor, ...], _kept: Any, options: tuple[Any, ...], _wanted: Any
) -> tuple[Tensor, ...]:
    dquery, dkey, dtemperature, dbias = op("sigmoid_loss_rows_backward")(grad, *tensors, *options)
    return dquery, dkey, dtemperature.to(tensors[2]), dbias.to(tensors[3])


define(sigmoid_loss_rows, fake=_fake, check=_check, cpp="reference", triton=False)
define(sigmoid_loss_rows_backward, fake=_fake_backward, cpp="reference", triton=False)
differentiate("sigmoid_loss_rows", tensors=4, backward=_backward)


def sigmoid_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """SigLIP's loss: −(1/B) Σ_ij ln σ(z_ij (s_ij/τ + b)), z_ij = 1 for i = j and −1 else, s_ij = u_i·v_j (Zhai et al. 2023,
    section 3). Each pair is judged by itself; nothing is normalised over the batch.

    Rows are L2-normalised inside. Memory is O(Bd): the B² similarities are walked in strips of rows, in plain PyTorch on
    every backend, forward and backward.

    Args:
        query, key: (B, d), row i of key is the positive of row i of query; dtypes as in `info_nce`.
        temperature: τ > 0, the inverse of the paper's t; a number, or a tensor of one element, which may get a gradient.
        bias: b, likewise. The paper starts at t = 10, b = −10 and learns ln t.
        reduction: `"mean"` (over the rows of query), `"sum"` or `"none"`: (B,), each the sum over its row's B pairs.
        backend: see `use_backend`.

    Returns:
        Scalar, or (B,) unreduced; float64 for float64 rows, else float32.

    Raises:
        ValueError: wrong shapes or dtypes, one row, temperature not above 0, bias not finite, unknown reduction, a row that
            holds NaN or Inf.
        BackendError: a forced backend that cannot run here.
    """
    query, key, _ = check_rows(query, "query", key, "key")
    checks.one_of(reduction, "reduction", REDUCTIONS)
    temperature, bias = scalar(temperature, "temperature", query), scalar(bias, "bias", query, positive=False)
    name = choose("sigmoid_loss_rows", query.device, backend)
    return reduce(op("sigmoid_loss_rows")(query, key, temperature, bias, name), reduction)
