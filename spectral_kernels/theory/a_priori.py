"""What mean and variance alone say of a softmax over similarities (docs/theory.md §3, a-priori band).

For s in [lo, hi] with mean m and variance v, two-point distributions are extremal for E e^{Ls} (Bennett 1962). All in
log space: at τ = 0.01 the exponentials themselves do not fit a float64.
"""

import torch
from torch import Tensor

_TINY = 1e-300


def _two_points(side: Tensor, variance: Tensor, slope: Tensor) -> Tensor:
    """ln((side²·e^{−slope·v/side} + v·e^{slope·side}) / (side² + v)) of a centred variable."""
    side = side.clamp(min=1e-150)
    squared, variance = side.square(), variance.clamp(min=_TINY)
    first = squared.log() - slope * variance / side
    second = variance.log() + slope * side
    return torch.logaddexp(first, second) - (squared + variance).log()


def log_moments(mean: Tensor, variance: Tensor, lo: float, hi: float, slope: float) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of ln E e^{slope·s}, slope > 0; s has this mean and variance and lies in [lo, hi]."""
    up, down = (hi - mean).clamp(min=0), (mean - lo).clamp(min=0)
    variance = torch.minimum(variance, up * down)
    rate = torch.as_tensor(slope, dtype=mean.dtype, device=mean.device)
    return slope * mean + _two_points(down, variance, -rate), slope * mean + _two_points(up, variance, rate)
