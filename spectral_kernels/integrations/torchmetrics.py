"""Effective rank as a metric of torchmetrics, which this module imports."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from spectral_kernels import checks
from spectral_kernels.ops._rows import read_rows
from spectral_kernels.ops.effective_rank import check_order, rank_of_spectrum

# raw float64 rows whose squares float64 holds, with digits to spare
SMALLEST, LARGEST = 1e-140, 1e140
# share of tr M up to which the spread of rows is the rounding of sums of them
NEGLIGIBLE = 1e-13


class EffectiveRank(Metric):  # type: ignore[misc]
    """`sk.effective_rank` of all rows since the last reset, of all processes: rows are not kept, but their float64 moments.

    The state is three sums, so that it merges and is summed over processes: `count`, `total` (d,) and `second` (d, d), and
    `narrow`, the number of rows that were not float64. It stays float64, whatever `set_dtype` asks for.

    Args:
        num_features: d.
        order: α, any number from 0 to `math.inf`.
        center: use the covariance instead of the second moment. From sums, whose rounding is 1e-16 of the rows' mean square:
            rows whose variance is below 1e-13 of that count as identical, with rank 0.
        normalize: L2-normalise the rows first; if not, elements of float64 rows are to lie between 1e-140 and 1e140.
        kwargs: of `torchmetrics.Metric`.

    Returns:
        of `compute`: (), in units of dimensions; float64 where all rows were, else float32. 0 before the first update.

    Raises:
        ValueError: an argument out of range; in `update`, rows that are no (B, num_features) of floating numbers, or that hold
            NaN or Inf (named on the CPU; on a GPU the rank is NaN).
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    count: Tensor
    narrow: Tensor
    total: Tensor
    second: Tensor

    def __init__(
        self, num_features: int, *, order: float = 1.0, center: bool = False, normalize: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_features = d = checks.integer(num_features, "num_features", 1)
        self.order, self.center, self.normalize = check_order(order), bool(center), bool(normalize)
        for name, shape in (("count", ()), ("narrow", ()), ("total", (d,)), ("second", (d, d))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Add rows (B, num_features), a tensor or an array."""
        z = checks.floating(z, "z", ndim=2).detach()
        if z.shape[1] != self.num_features:
            raise ValueError(f"z has d = {z.shape[1]}, but num_features is {self.num_features}")
        checks.finite_rows(z, "z")
        rows = read_rows(z.to(self.second.device), self.normalize, torch.float64)
        if not self.normalize and z.dtype == torch.float64:
            sizes = rows.abs().amax(1)
            if bool(((sizes > LARGEST) | ((sizes > 0) & (sizes < SMALLEST))).any()):
                raise ValueError("z has rows whose squares leave float64: scale them")
        self.count += len(rows)
        self.narrow += 0 if z.dtype == torch.float64 else len(rows)
        self.total += rows.sum(0)
        self.second += rows.mT @ rows

    def compute(self) -> Tensor:
        """The effective rank."""
        noise = self.second.trace()
        if self.center:
            moment = self.second - torch.outer(self.total, self.total) / self.count.clamp(min=1)
            moment = torch.where(moment.trace() <= NEGLIGIBLE * noise, 0.0, moment)
        else:
            moment = self.second
        values = torch.linalg.eigvalsh(moment).flip(0)
        # what is the rounding of the sums is no eigenvalue
        rounding = self.num_features * torch.finfo(torch.float64).eps
        values = torch.where(values <= rounding * (noise if self.center else values[0]), 0.0, values)
        largest = values[0]
        values = values / torch.where(largest > 0, largest, 1.0)
        return rank_of_spectrum(values.float() if self.narrow > 0 else values, self.order)

    def set_dtype(self, dst_type: str | torch.dtype) -> "EffectiveRank":
        """Change nothing: in fewer bits than float64 sums lose rows."""
        return self
