"""MoCo-v2 (Chen et al. 2020): a query encoder, a slow copy of it for the keys, and a queue of keys as negatives.

The published shuffling of a batch between GPUs before the key encoder keeps batch normalisation from telling which key
belongs to which query by their GPU; one process normalises over one batch, in which there is nothing to shuffle.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional

import spectral_kernels as sk
from spectral_kernels.training.config import MoCoConfig, ModelConfig
from spectral_kernels.training.simclr import Diverged, Forward, SimCLR


class MoCo(SimCLR):
    """Query encoder and head as in `SimCLR`; `key_encoder` and `key_head` follow them, `queue` (K, dim) holds keys.

    The queue starts with random unit rows, as published; `cursor` is where the next keys go.
    """

    queue: Tensor
    cursor: Tensor

    def __init__(self, config: ModelConfig, moco: MoCoConfig, in_channels: int) -> None:
        super().__init__(config, in_channels)
        self.momentum = moco.momentum
        self.key_encoder, self.key_head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        for parameter in (*self.key_encoder.parameters(), *self.key_head.parameters()):
            parameter.requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(moco.queue, config.dim), dim=1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the key encoder a step after the query encoder."""
        for slow, fast in ((self.key_encoder, self.encoder), (self.key_head, self.head)):
            for mine, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
                mine.lerp_(theirs, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, views: Tensor) -> Tensor:
        """Projections of the key encoder."""
        projections: Tensor = self.key_head(self.key_encoder(views))
        return projections

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put unit keys (B, dim) in the place of the oldest ones."""
        rows = (self.cursor + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys.to(self.queue.dtype)
        self.cursor.copy_((self.cursor + len(keys)) % len(self.queue))


def forward_moco(model: MoCo, views: Tensor, temperature: float, amp: bool, *, follow: bool = True) -> Forward:
    """InfoNCE of the first views against the keys of the second ones and the queue, which is moved on.

    Args:
        views: (2B, C, H, W), the first views of all samples and then the second ones.
        amp: bfloat16 autocast for the encoders; the loss is computed in float32.
        follow: move the key encoder first, once in a step of the optimizer.

    Returns:
        See `simclr.Forward`; what the bank remembers are the keys: they change slowly.

    Raises:
        Diverged: a projection is NaN or Inf.
    """
    if follow:
        model.follow()
    first, second = views.chunk(2)
    with torch.autocast(views.device.type, torch.bfloat16, enabled=amp):
        queries, keys = model(first), model.keys(second)
    queries, keys = queries.float(), keys.float()
    if not bool(queries.detach().isfinite().all() and keys.isfinite().all()):
        raise Diverged("a projection is NaN or Inf")
    loss = sk.info_nce(queries, keys, queue=model.queue.clone(), temperature=temperature)
    keys = functional.normalize(keys, dim=1)
    model.enqueue(keys)
    return Forward(loss, queries.detach(), keys, keys)
