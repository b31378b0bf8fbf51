"""Covariance, effective rank, whitening and the losses on the CPU, against the torch expressions one would write."""

from collections.abc import Callable, Iterator

import torch
from harness import Job, worst_relative
from torch import Tensor

import spectral_kernels as sk


def _close(ours: Callable[[], Tensor], exact: Callable[[], Tensor], tolerance: float) -> Callable[[], None]:
    def check() -> None:
        error = worst_relative(ours(), exact())
        assert error <= tolerance, f"relative error {error:.1e} above {tolerance:.0e}"

    return check


def eager_covariance(z: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(z)
    x = x - x.mean(0)
    return x.T @ x / len(x)


def gathered_rank(pool: Tensor, indices: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(pool[indices], dim=-1)
    moment = x.mT @ x
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1).square() / moment.square().sum((-2, -1))


def gathered_entropy_rank(pool: Tensor, indices: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(pool[indices], dim=-1)
    values = torch.linalg.eigvalsh(x.mT @ x).clamp_min(0)
    p = values / values.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(p, p).sum(-1))


def eager_whitening(z: Tensor) -> Tensor:
    x = z - z.mean(0)
    c = x.T @ x / len(x)
    level = c.diagonal().mean()
    factor = torch.linalg.cholesky(c * (1 - 1e-4) + 1e-4 * level * torch.eye(len(c)))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


def eager_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(torch.cat([z0, z1]))
    logits = (x @ x.T / 0.5).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(x)).roll(len(z0)))


def _both_passes(call: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Tensor]:
    leaves = [part.clone().requires_grad_() for part in inputs]

    def run() -> Tensor:
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))[0]

    return run


def jobs() -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    for n in (4096, 65536):
        z = torch.randn(n, 128, generator=generator)

        def ours(z: Tensor = z) -> Tensor:
            return sk.covariance(z, normalize=True)

        yield Job(
            f"normalise, centre, covariance {n}x128",
            {
                "spectral_kernels": ours,
                "torch, eager": lambda z=z: eager_covariance(z),
                "torch.cov alone": lambda z=z: torch.cov(z.T),
            },
            _close(ours, lambda z=z: eager_covariance(z.double()), 1e-5),
            {},
        )
    pool = torch.randn(65536, 128, generator=generator)
    indices = torch.randint(65536, (64, 256), generator=generator)
    for order, eager in ((2.0, gathered_rank), (1.0, gathered_entropy_rank)):

        def rank(order: float = order) -> Tensor:
            return sk.batch_effective_rank(pool, indices, order=order)

        yield Job(
            f"batch_effective_rank, order {order:g}, 64 batches of 256x128",
            {"spectral_kernels": rank, "torch, eager": lambda eager=eager: eager(pool, indices)},
            _close(rank, lambda eager=eager: eager(pool.double(), indices), 1e-5),
            {},
        )
    z = torch.randn(4096, 128, generator=generator)
    weight = torch.randn(4096, 128, generator=generator)
    whiten = _both_passes(lambda z: sk.whiten(z) * weight, z)
    yield Job(
        "whiten 4096x128, forward and backward",
        {"spectral_kernels": whiten, "torch, eager Cholesky": _both_passes(lambda z: eager_whitening(z) * weight, z)},
        _close(whiten, _both_passes(lambda z: eager_whitening(z) * weight.double(), z.double()), 1e-3),
        {},
    )
    z0, z1 = torch.randn(512, 128, generator=generator), torch.randn(512, 128, generator=generator)
    loss = _both_passes(sk.nt_xent, z0, z1)
    yield Job(
        "nt_xent 2x512x128, forward and backward",
        {"spectral_kernels": loss, "torch, eager": _both_passes(eager_nt_xent, z0, z1)},
        _close(loss, _both_passes(eager_nt_xent, z0.double(), z1.double()), 1e-4),
        {},
    )
