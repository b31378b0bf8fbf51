"""InfoNCE and NT-Xent as their definition (docs/theory.md §2), with all similarities at once.

The loss is softplus(ℓ), ℓ = logsumexp over the negatives of s/τ minus a/τ: exact also where the positive has all but
won. An anchor that has no negatives has the loss 0.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from spectral_kernels.ops._rows import read_rows, read_rows_backward


def _loss(negatives: Tensor, positive: Tensor, may_be_none: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and log-partition of each anchor from its logits; excluded negatives are -inf, and perhaps all of them."""
    if may_be_none:
        none = (negatives == -torch.inf).all(-1)
        loss = _loss(negatives.masked_fill(none.unsqueeze(-1), 0.0), positive)[0].masked_fill(none, 0.0)
    else:
        loss = softplus(torch.logsumexp(negatives, -1) - positive, threshold=40)
    return loss, positive + loss


def _softmax_weights(
    grad: Tensor, negatives: Tensor, loss: Tensor, lse: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient on the logits of the negatives, and minus that on the positive's, both divided by τ."""
    scale = (grad / temperature).unsqueeze(-1)
    return scale * torch.exp(negatives - lse.unsqueeze(-1)), scale * -torch.expm1(-loss).unsqueeze(-1)


def _drop_diagonal(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.eye(*logits.shape, dtype=torch.bool, device=logits.device), -torch.inf)


def _drop_groups(logits: Tensor, groups: Tensor | None, other_groups: Tensor | None) -> Tensor:
    """Without the others of the anchor's group; others beyond the labels have none."""
    if groups is None or other_groups is None:
        return logits
    same = groups[: logits.shape[0], None] == other_groups
    return logits.masked_fill(pad(same, (0, logits.shape[1] - other_groups.shape[0])), -torch.inf)


def _negatives(
    u: Tensor, others: Tensor, in_batch: bool, temperature: float | Tensor, mask: Tensor | None, groups: Tensor | None,
    queue_groups: Tensor | None,
) -> Tensor:  # fmt: skip
    logits = u @ others.mT / temperature
    if in_batch:
        logits = _drop_diagonal(logits)
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    return _drop_groups(logits, groups, groups if in_batch else queue_groups)


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor | None, temperature: float | Tensor, mask: Tensor | None,
    groups: Tensor | None, queue_groups: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    u, v = read_rows(query, True), read_rows(key, True)
    positive = (u * v[: u.shape[0]]).sum(-1) / temperature
    others = v if queue is None else read_rows(queue, True)
    negatives = _negatives(u, others, queue is None, temperature, mask, groups, queue_groups)
    return _loss(negatives, positive, mask is not None or groups is not None)


def _along(u: Tensor, du: Tensor, wanted: bool) -> Tensor:
    """u·du of each anchor, nothing where it is not wanted: -1/τ times their sum is the gradient on τ."""
    return (u * du).sum(-1) if wanted else u.new_empty(0)


def info_nce_backward(
    grad: Tensor, query: Tensor, key: Tensor, queue: Tensor | None, loss: Tensor, lse: Tensor, temperature: float | Tensor,
    mask: Tensor | None, groups: Tensor | None, queue_groups: Tensor | None, precision: str, queue_gradient: bool,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    u, v = read_rows(query, True), read_rows(key, True)
    b = u.shape[0]
    others = v if queue is None else read_rows(queue, True)
    negatives = _negatives(u, others, queue is None, temperature, mask, groups, queue_groups)
    weights, positive = _softmax_weights(grad, negatives, loss, lse, temperature)
    du = weights @ others - positive * v[:b]
    dv = pad(-positive * u, (0, 0, 0, v.shape[0] - b))
    dquery = read_rows_backward(du, query, True)
    dqueue = query.new_empty(0, query.shape[1])
    if queue is None:
        dv = dv + weights.mT @ u
    elif queue_gradient:
        dqueue = read_rows_backward(weights.mT @ u, queue, True)
    return dquery, read_rows_backward(dv, key, True), dqueue, _along(u, du, temperature_gradient)


def info_nce_own(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> Tensor:
    u = read_rows(query, True)
    logits = (read_rows(negatives, True) @ u.unsqueeze(-1)).squeeze(-1) / temperature
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    return _loss(logits, (u * read_rows(key, True)).sum(-1) / temperature, mask is not None)[0]


def _two_views(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Views (2B, d), their logits with self and positive left out, and the positive's logit."""
    x = read_rows(torch.cat([z0, z1]), True)
    b = z0.shape[0]
    positive = (x * x.roll(b, 0)).sum(-1) / temperature
    logits = _drop_diagonal(x @ x.mT / temperature)
    rows = torch.arange(2 * b, device=x.device)
    logits[rows, (rows + b) % (2 * b)] = -torch.inf
    both = None if groups is None else groups.repeat(2)
    return x, _drop_groups(logits, both, both), positive


def nt_xent(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, groups: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    _, negatives, positive = _two_views(z0, z1, temperature, groups)
    return _loss(negatives, positive, groups is not None)


def nt_xent_backward(
    grad: Tensor, z0: Tensor, z1: Tensor, loss: Tensor, lse: Tensor, temperature: float | Tensor, groups: Tensor | None,
    precision: str, temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, negatives, _ = _two_views(z0, z1, temperature, groups)
    b = z0.shape[0]
    weights, positive = _softmax_weights(grad, negatives, loss, lse, temperature)
    pulled = positive * x.roll(b, 0) + (positive * x).roll(b, 0)
    dx = weights @ x + weights.mT @ x - pulled
    dz = read_rows_backward(dx, torch.cat([z0, z1]), True)
    return dz[:b].clone(), dz[b:].clone(), _along(x, dx, temperature_gradient)


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
