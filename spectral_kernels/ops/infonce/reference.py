"""InfoNCE and NT-Xent as their definition (docs/theory.md §2), with all similarities at once.

The loss is softplus(ℓ), ℓ = logsumexp over the negatives of s/τ minus a/τ: exact also where the positive has all but
won.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from spectral_kernels.ops._rows import read_rows, read_rows_backward


def _loss(negatives: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-partition of each anchor from its logits; excluded negatives are -inf."""
    loss = softplus(torch.logsumexp(negatives, -1) - positive, threshold=40)
    return loss, positive + loss


def _softmax_weights(
    grad: Tensor, negatives: Tensor, loss: Tensor, lse: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient on the logits of the negatives, and minus that on the positive's, both divided by τ."""
    scale = (grad / temperature).unsqueeze(-1)
    return scale * torch.exp(negatives - lse.unsqueeze(-1)), scale * -torch.expm1(-loss).unsqueeze(-1)


def _drop_diagonal(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device), -torch.inf)


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float | Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    u, v = read_rows(query, True), read_rows(key, True)
    positive = (u * v).sum(-1) / temperature
    if queue is None:
        return _loss(_drop_diagonal(u @ v.mT / temperature), positive)
    return _loss(u @ read_rows(queue, True).mT / temperature, positive)


def info_nce_backward(
    grad: Tensor, query: Tensor, key: Tensor, queue: Tensor | None, loss: Tensor, lse: Tensor, temperature: float | Tensor,
    precision: str, queue_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    u, v = read_rows(query, True), read_rows(key, True)
    others = v if queue is None else read_rows(queue, True)
    logits = u @ others.mT / temperature
    negatives = _drop_diagonal(logits) if queue is None else logits
    weights, positive = _softmax_weights(grad, negatives, loss, lse, temperature)
    du = weights @ others - positive * v
    dv = -positive * u
    dquery = read_rows_backward(du, query, True)
    dqueue = query.new_empty(0, query.shape[1])
    if queue is None:
        dv = dv + weights.mT @ u
    elif queue_gradient:
        dqueue = read_rows_backward(weights.mT @ u, queue, True)
    return dquery, read_rows_backward(dv, key, True), dqueue


def _two_views(z0: Tensor, z1: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (2B, d), their logits with self and positive left out, and the positive's logit."""
    x = read_rows(torch.cat([z0, z1]), True)
    b = z0.shape[0]
    positive = (x * x.roll(b, 0)).sum(-1) / temperature
    logits = _drop_diagonal(x @ x.mT / temperature)
    rows = torch.arange(2 * b, device=x.device)
    logits[rows, (rows + b) % (2 * b)] = -torch.inf
    return x, logits, positive


def nt_xent(z0: Tensor, z1: Tensor, temperature: float | Tensor, precision: str) -> tuple[Tensor, Tensor]:
    _, negatives, positive = _two_views(z0, z1, temperature)
    return _loss(negatives, positive)


def nt_xent_backward(
    grad: Tensor, z0: Tensor, z1: Tensor, loss: Tensor, lse: Tensor, temperature: float | Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    x, negatives, _ = _two_views(z0, z1, temperature)
    b = z0.shape[0]
    weights, positive = _softmax_weights(grad, negatives, loss, lse, temperature)
    pulled = positive * x.roll(b, 0) + (positive * x).roll(b, 0)
    dx = weights @ x + weights.mT @ x - pulled
    dz = read_rows_backward(dx, torch.cat([z0, z1]), True)
    return dz[:b].clone(), dz[b:].clone()


def info_nce_grad_norms(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float | Tensor, loss: str, precision: str
) -> Tensor:
    if loss == "nt_xent":
        keys, negatives, positive = _two_views(query, key, temperature)
        others, own = keys, keys.roll(query.shape[0], 0)
    else:
        u, own = read_rows(query, True), read_rows(key, True)
        others = own if queue is None else read_rows(queue, True)
        positive = (u * own).sum(-1) / temperature
        logits = u @ others.mT / temperature
        negatives = _drop_diagonal(logits) if queue is None else logits
    # rows are taken from one origin among them: their differences are what counts, also in a collapsed batch
    origin = own[:1]
    difference = torch.softmax(negatives, -1) @ (others - origin) - (own - origin)
    mass = -torch.expm1(-_loss(negatives, positive)[0])
    return (mass / temperature) ** 2 * difference.square().sum(-1)
