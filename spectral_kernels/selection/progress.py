"""How far an epoch has come."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Progress:
    """An epoch that has begun: what it is made of, and what of it was handed out.

    Attributes:
        epoch, ranks: which one, under which num_replicas and rank.
        active: (n,) bool, the rows of the bank that it was dealt out from; None without a bank, or where it has not begun.
        shard: (r,) int64, the rank's rows of these, in the epoch's order.
        batch: batches handed out.
        taken: the batches so far, recorded only where later ones depend on them.
        orders: (batch, rows): what `partition.by_commonness` said as that batch was chosen.
        fresh: of each batch since this process began or resumed, the rows never handed out before.
        within, left: masks (n,) on the bank's device, of the shard and of what may still be handed out; None is every row,
            so that the bank is read as it stands.
    """

    epoch: int
    ranks: tuple[int, int]
    active: Tensor | None = None
    shard: Tensor = field(default_factory=lambda: joined([]))
    batch: int = 0
    taken: list[Tensor] = field(default_factory=list)
    orders: list[tuple[int, Tensor]] = field(default_factory=list)
    fresh: list[Tensor] = field(default_factory=list)
    within: Tensor | None = None
    left: Tensor | None = None

    def taken_rows(self, batches: int) -> Tensor:
        """All rows of the first batches, int64."""
        return joined(self.taken[:batches])

    def order_left(self, batches: int) -> Tensor:
        """The order that holds after the first batches, less their rows; empty where there is none."""
        orders = [rows.cpu() for made, rows in self.orders if made < batches]
        if not orders:
            return joined([])
        return orders[-1][~torch.isin(orders[-1], self.taken_rows(batches))]

    def fresh_rows(self, batches: int) -> Tensor:
        """The rows that only batches after the first ones handed out."""
        return joined(self.fresh[len(self.fresh) - (self.batch - batches) :])


def joined(rows: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows])
