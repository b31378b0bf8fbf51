"""What bench/gpu_check.py checks and times: every op at sizes that are met in training, beside what one would write instead."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from bench_greedy import logdet
from bench_ops import (
    attention_norms,
    autograd_norms,
    eager_covariance,
    eager_nt_xent,
    eager_rank,
    eager_whitening,
    gathered_entropy_rank,
    gathered_rank,
)
from floors import Work
from torch import Tensor

import spectral_kernels as sk

Inputs = tuple[Tensor, ...]
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        name: op, size, dtype.
        make: inputs on a device, fresh with every generator.
        ours: the call.
        exact: the same from the inputs in float64; None: `score` decides.
        eager: as one would write it in torch; its error is the measure of ours.
        work: what its floor is counted from.
        peers: label -> another call for the same thing, such as a library's.
        routes: label -> the same op by another backend or precision, checked and timed too.
        grants: route -> error granted in place of `allowed`.
        compiled: whether torch.compile of `eager` is timed too.
        synchronises: labels of calls that a CUDA graph cannot hold; these are timed by the clock.
        allowed: error beyond the eager one's that is granted, relative to the largest value.
        score: of selections, what they reach; ours must reach this `share` of eager's.
        goal: µs on an H100 that the project asks for.
    """

    name: str
    make: Callable[[torch.Generator, torch.device], Inputs]
    ours: Call
    eager: Call
    work: Work
    exact: Call | None = None
    peers: dict[str, Call] = field(default_factory=dict)
    routes: dict[str, Call] = field(default_factory=dict)
    grants: dict[str, float] = field(default_factory=lambda: {"bf16x3": 1e-5, "tf32": 1e-3})
    compiled: bool = True
    synchronises: Sequence[str] = ()
    allowed: float = 2e-6
    score: Callable[[Inputs, Tensor], float] | None = None
    share: float = 0.999
    goal: float | None = None


def rows(*shape: int, dtype: torch.dtype = torch.float32, count: int = 1) -> Callable[..., Inputs]:
    """Standard normal rows with a spectrum that falls off, as embeddings have."""

    def make(generator: torch.Generator, device: torch.device) -> Inputs:
        scale = torch.logspace(0, -1.5, shape[-1], device=device)
        return tuple((torch.randn(shape, generator=generator, device=device) * scale).to(dtype) for _ in range(count))

    return make


def pool_and_batches(size: int, d: int, batches: int, rows_each: int) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device) -> Inputs:
        (pool,) = rows(size, d)(generator, device)
        return pool, torch.randint(size, (batches, rows_each), generator=generator, device=device)

    return make


def triangle(n: float, d: float) -> float:
    """Flops of a symmetric product, half of them counted."""
    return n * d * (d + 1)


def other(z: Tensor, backend: str) -> str | None:
    """A backend to force on a GPU; elsewhere there is none to choose."""
    return backend if z.is_cuda else None


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def covariance_cases(tiny: bool) -> Iterator[Case]:
    for n, d, dtype, goal in (
        (4096, 128, torch.float32, None),
        (65536, 128, torch.float32, 20.0),
        (16384, 2048, torch.bfloat16, None),
        (16384, 2048, torch.float32, None),
    ):
        size = (96, 24) if tiny else (n, d)
        item = dtype.itemsize
        yield Case(
            f"covariance {n}x{d} {dtype_name(dtype)}",
            rows(*size, dtype=dtype),
            lambda z: sk.covariance(z, normalize=True),
            lambda z: eager_covariance(z.float()),
            # products of half precision are bf16's, those of float32 three of them
            Work(item * n * d + 4 * d * d, triangle(n, d) * (1 if item == 2 else 3), "bf16", 2),
            exact=lambda z: eager_covariance(z.double()),
            peers={"torch.matmul alone": lambda z: z.mT @ z},
            routes={
                precision: lambda z, precision=precision: sk.covariance(z, normalize=True, precision=precision)
                for precision in (("bf16x3", "tf32") if item == 4 else ())
            },
            goal=goal,
        )


def rank_cases(tiny: bool) -> Iterator[Case]:
    for n in (4096, 65536):
        yield Case(
            f"effective_rank order 2 {n}x128 fp32",
            rows(96 if tiny else n, 128),
            lambda z: sk.effective_rank(z, order=2),
            eager_rank,
            Work(4 * n * 128, 3 * triangle(n, 128), "bf16"),
            exact=lambda z: eager_rank(z.double()),
        )
    for d, order, goal in ((128, 2.0, 8.0), (1024, 2.0, None), (128, 1.0, None)):
        eager = gathered_rank if order == 2 else gathered_entropy_rank
        side = min(256, d)
        moment = 64 * triangle(max(256, d), side)
        yield Case(
            f"batch_effective_rank order {order:g} 64x(256x{d}) fp32",
            pool_and_batches(300, 24, 4, 32) if tiny else pool_and_batches(65536, d, 64, 256),
            lambda pool, indices, order=order: sk.batch_effective_rank(pool, indices, order=order),
            eager,
            Work(64 * 256 * (4 * d + 8), 3 * moment, "bf16")
            if order == 2
            else Work(64 * 256 * (4 * d + 8), moment + 64 * 4 / 3 * side**3, "fp64", 2, side - 2),
            exact=lambda pool, indices, eager=eager: eager(pool.double(), indices),
            # products keep 16 bits of each operand
            allowed=1e-5 if order == 2 else 2e-6,
            compiled=order == 2,
            synchronises=() if order == 2 else ("eager",),
            goal=goal,
        )
    for n, d, goal in ((256, 128, 130.0), (1024, 512, None)):

        def make(generator: torch.Generator, device: torch.device, n: int = n, d: int = d) -> Inputs:
            return rows(4, 32, 24)(generator, device) if tiny else rows(64, n, d)(generator, device)

        def values(z: Tensor) -> Tensor:
            x = torch.nn.functional.normalize(z, dim=-1)
            return torch.linalg.eigvalsh(x.mT @ x / z.shape[1]).flip(-1).clamp_min(0)

        yield Case(
            f"spectrum 64x({n}x{d}) fp32",
            make,
            lambda z: sk.spectrum(z),
            values,
            Work(64 * (4 * n * d + 8 * d * d), 64 * (triangle(n, d) + 4 / 3 * d**3), "fp64", 2, d - 2),
            exact=lambda z: values(z.double()),
            routes={"triton": lambda z: sk.spectrum(z, backend=other(z, "triton"))},
            compiled=False,
            synchronises=("eager", "triton"),
            goal=goal,
        )


def whitening_cases(tiny: bool) -> Iterator[Case]:
    def both(call: Call) -> Call:
        def run(z: Tensor, weight: Tensor) -> Tensor:
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad((call(leaf) * weight.to(z.dtype)).sum(), leaf)[0]

        return run

    size, d = (96, 24) if tiny else (4096, 128), 128
    half = triangle(4096, 128)
    yield Case(
        "whiten 4096x128 fp32",
        rows(*size),
        lambda z: sk.whiten(z),
        eager_whitening,
        Work(2 * 4 * 4096 * d, 3 * half, "bf16", 3, d),
        exact=lambda z: eager_whitening(z.double()),
        routes={"triton": lambda z: sk.whiten(z, backend=other(z, "triton"))},
        compiled=False,
        allowed=2e-5,
    )
    yield Case(
        "whiten 4096x128 fp32, forward and backward",
        rows(*size, count=2),
        both(lambda z: sk.whiten(z)),
        both(eager_whitening),
        Work(5 * 4 * 4096 * d, 5 * 3 * half, "bf16", 7, 2 * d),
        exact=lambda z, weight: both(eager_whitening)(z.double(), weight.double()),
        compiled=False,
        allowed=1e-4,
        goal=90.0,
    )


def greedy_cases(tiny: bool) -> Iterator[Case]:
    def eager(z: Tensor, k: int, m: int | None, objective: str) -> Tensor:
        """A step at a time, one product with all rows and one argmin on the device."""
        x = torch.nn.functional.normalize(z.float())
        cost = torch.zeros(len(x), device=z.device)
        taken = torch.zeros(len(x), dtype=torch.bool, device=z.device)
        chosen = torch.zeros(k, dtype=torch.int64, device=z.device)
        inverse = torch.eye(x.shape[1], device=z.device) / 1e-3
        draws = None if m is None else torch.randint(len(x), (k, m), device=z.device)
        for step in range(k):
            left = cost.masked_fill(taken, torch.inf)
            if draws is not None and step > 0:
                chosen[step] = draws[step, left[draws[step]].argmin()]
            elif step > 0:
                chosen[step] = left.argmin()
            pick = x[chosen[step]]
            taken[chosen[step]] = True
            if objective == "logdet":
                pick = inverse @ pick
                pick = pick / (1 + pick @ x[chosen[step]]).sqrt()
                inverse = inverse - pick.outer(pick)
            cost += (x @ pick).square()
        return chosen

    def reached(inputs: Inputs, chosen: Tensor) -> float:
        return float(sk.effective_rank(inputs[0][chosen].double(), order=2))

    for n, m, objective, goal in (
        (4096, None, "effective_rank", 260.0),
        (6144, None, "effective_rank", None),
        (65536, None, "effective_rank", None),
        (65536, 64, "effective_rank", None),
        (4096, None, "logdet", None),
        (4096, 64, "logdet", None),
    ):
        k = 16 if tiny else 256
        label = "all rows" if m is None else f"{m} candidates"

        def ours(
            z: Tensor, k: int = k, m: int | None = m, objective: str = objective, backend: str | None = None
        ) -> Tensor:
            forced = None if backend is None else other(z, backend)
            return sk.greedy_select(z, k, candidates=m, objective=objective, start=0, backend=forced).indices

        yield Case(
            f"greedy_select {objective} 256 of {n}x128, {label}",
            rows(200 if tiny else n, 128),
            ours,
            lambda z, k=k, m=m, objective=objective: eager(z, k, m, objective),
            Work(4 * n * 128, 2 * 256 * min(n, m or n) * 128, "fp32", 2, 255),
            routes={
                backend: lambda z, ours=ours, backend=backend: ours(z, backend=backend)
                for backend in (("cuda", "triton") if n <= 6144 else ())
            },
            compiled=False,
            score=(lambda inputs, chosen: logdet(inputs[0][chosen])) if objective == "logdet" else reached,
            # draws differ; by log-determinant the second pick is decided by rounding
            share=0.95 if m is not None else 0.995 if objective == "logdet" else 0.999,
            goal=goal,
        )


def loss_cases(tiny: bool) -> Iterator[Case]:
    b, d = (96, 24) if tiny else (4096, 128), 128
    for dtype in (torch.float32, torch.bfloat16):
        item, name = dtype.itemsize, dtype_name(dtype)
        unit = "fp32" if item == 4 else "bf16"

        def both(call: Call) -> Call:
            def run(z0: Tensor, z1: Tensor) -> Tensor:
                leaves = [z0.detach().requires_grad_(), z1.detach().requires_grad_()]
                return torch.cat(torch.autograd.grad(call(*leaves), leaves))

            return run

        flops = 2 * 8192 * 8192 * 128
        yield Case(
            f"nt_xent 2x4096x128 {name}",
            rows(*b, dtype=dtype, count=2),
            lambda z0, z1: sk.nt_xent(z0, z1),
            eager_nt_xent,
            Work(2 * item * 4096 * d, flops, unit),
            exact=lambda z0, z1: eager_nt_xent(z0.double(), z1.double()),
        )
        yield Case(
            f"nt_xent 2x4096x128 {name}, forward and backward",
            rows(*b, dtype=dtype, count=2),
            both(lambda z0, z1: sk.nt_xent(z0, z1)),
            both(eager_nt_xent),
            Work(4 * item * 4096 * d, 3 * flops, unit, 2),
            exact=lambda z0, z1: both(eager_nt_xent)(z0.double(), z1.double()),
            allowed=1e-5 if item == 4 else 1e-2,
            compiled=False,
        )
        yield Case(
            f"info_nce_grad_norms 4096x128 {name}",
            rows(*b, dtype=dtype, count=2),
            lambda q, k: sk.info_nce_grad_norms(q, k, temperature=0.1),
            autograd_norms,
            Work(2 * item * 4096 * d, 4 * 4096 * 4096 * d, unit),
            exact=lambda q, k: autograd_norms(q.double(), k.double()),
            peers={"SDPA with V = K": attention_norms},
            routes={
                precision: lambda q, k, precision=precision: sk.info_nce_grad_norms(
                    q, k, temperature=0.1, precision=precision
                )
                for precision in (("bf16x3", "tf32") if item == 4 else ("tf32",))
            },
            compiled=False,
            allowed=2e-5 if item == 4 else 2e-3,
            goal=30.0 if item == 2 else None,
        )


def cases(tiny: bool = False) -> list[Case]:
    """All of them; `tiny` has the same names and small inputs, for a machine without a GPU."""
    makers: list[Callable[[bool], Iterator[Case]]] = [
        covariance_cases, rank_cases, whitening_cases, greedy_cases, loss_cases,
    ]  # fmt: skip
    return [case for maker in makers for case in maker(tiny)]
