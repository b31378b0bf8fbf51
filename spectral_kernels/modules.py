"""Layers and losses as `torch.nn` modules."""

import torch
from torch import Tensor, nn

from spectral_kernels import checks
from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops.covariance import covariance as covariance_of
from spectral_kernels.ops.infonce import info_nce, nt_xent
from spectral_kernels.ops.whitening import check_options, whiten_with_mean
from spectral_kernels.ops.whitening.reference import whitening_matrix


class Whitening(nn.Module):
    """Whitens by the batch's own statistics in training and by running ones in evaluation, like `nn.BatchNorm1d`.

    Args:
        d: number of features.
        method, shrinkage, center: as in `whiten`.
        momentum: weight of the newest batch in the running mean and covariance.

    Buffers `running_mean` (d,), `running_covariance` (d, d) start at those of white data.

    Raises:
        ValueError: d below 1, momentum outside (0, 1], or what `whiten` raises.
    """

    running_mean: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        d: int,
        *,
        method: str = "cholesky",
        shrinkage: float = 1e-4,
        center: bool = True,
        momentum: float = 0.1,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.d = checks.integer(d, "d", 1)
        self.method, self.shrinkage, self.center = method, check_options(method, shrinkage), center
        self.momentum = checks.number(momentum, "momentum", "above 0 and at most 1", lambda x: 0 < x <= 1)
        self.backend = backend
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_covariance", torch.eye(d))

    def forward(self, z: Tensor) -> Tensor:
        """(..., n, d) to (..., n, d); in training each leading batch is whitened by itself."""
        z = checks.floating(z, "z")
        if z.shape[-1] != self.d:
            raise ValueError(f"z has d = {z.shape[-1]}, but this layer has d = {self.d}")
        if not self.training:
            matrix = whitening_matrix(self.running_covariance, self.method, self.shrinkage)
            wide = accumulation_dtype(z.dtype)
            with torch.autocast(z.device.type, enabled=False):
                return ((z.to(wide) - self.running_mean.to(wide)) @ matrix.to(wide).mT).to(z.dtype)
        y, mean, covariance = whiten_with_mean(z, self.method, self.shrinkage, self.center, self.backend)
        with torch.no_grad():
            if covariance is None:
                covariance = covariance_of(z.detach(), center=self.center, backend=self.backend)
            self.running_mean.lerp_(mean.reshape(-1, self.d).mean(0).to(self.running_mean), self.momentum)
            pooled = covariance.reshape(-1, self.d, self.d).mean(0)
            self.running_covariance.lerp_(pooled.to(self.running_covariance), self.momentum)
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.d}, method={self.method!r}, shrinkage={self.shrinkage}, "
            f"center={self.center}, momentum={self.momentum}"
        )


class _Loss(nn.Module):
    """A temperature, fixed or learned: as ln τ, so that no step makes it negative and weight decay pulls it to 1."""

    log_temperature: nn.Parameter | None

    def __init__(self, temperature: float, learnable_temperature: bool, backend: str | None) -> None:
        super().__init__()
        self._fixed = checks.positive(temperature, "temperature")
        start = torch.tensor(self._fixed).log()
        self.register_parameter("log_temperature", nn.Parameter(start) if learnable_temperature else None)
        self.backend = backend

    @property
    def temperature(self) -> float | Tensor:
        """τ: a number, or a scalar tensor where it is learned."""
        return self._fixed if self.log_temperature is None else self.log_temperature.exp()

    def extra_repr(self) -> str:
        if self.log_temperature is None:
            return f"temperature={self.temperature}"
        return f"temperature={self.log_temperature.exp().item():.4g}, learnable_temperature=True"


class NTXentLoss(_Loss):
    """`nt_xent` as a module: `criterion(z0, z1)`, or `criterion(z0, z1, groups=labels)`.

    Args:
        temperature: τ > 0.
        learnable_temperature: τ is learned, from `temperature` on; the parameter is `log_temperature`, ln τ.
        backend: see `use_backend`.
    """

    def __init__(
        self, temperature: float = 0.5, *, learnable_temperature: bool = False, backend: str | None = None
    ) -> None:
        super().__init__(temperature, learnable_temperature, backend)

    def forward(self, z0: Tensor, z1: Tensor, *, groups: Tensor | None = None) -> Tensor:
        return nt_xent(z0, z1, groups=groups, temperature=self.temperature, backend=self.backend)


class InfoNCELoss(_Loss):
    """`info_nce` as a module: `criterion(query, key)`, `criterion(query, key, queue)` for MoCo, and with its `negatives`,
    `mask`, `groups` and `queue_groups` by name.

    Args:
        temperature: τ > 0.
        learnable_temperature: τ is learned, from `temperature` on; the parameter is `log_temperature`, ln τ.
        symmetric: as in `info_nce`.
        backend: see `use_backend`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        symmetric: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature, learnable_temperature, backend)
        self.symmetric = symmetric

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        queue: Tensor | None = None,
        *,
        negatives: Tensor | None = None,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        queue_groups: Tensor | None = None,
    ) -> Tensor:
        return info_nce(
            query, key, queue=queue, negatives=negatives, mask=mask, groups=groups, queue_groups=queue_groups,
            symmetric=self.symmetric, temperature=self.temperature, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + (", symmetric=True" if self.symmetric else "")
