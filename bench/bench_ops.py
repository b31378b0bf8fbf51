"""Covariance, effective rank, whitening and the losses on the CPU, against the torch expressions one would write."""

import itertools
from collections.abc import Callable, Iterator

import torch
from harness import Job, worst_relative
from torch import Tensor

import spectral_kernels as sk


def eager_covariance(z: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(z)
    x = x - x.mean(0)
    return x.T @ x / len(x)


def eager_rank(z: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(z, dim=-1)
    moment = x.mT @ x
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1).square() / moment.square().sum((-2, -1))


def gathered_rank(pool: Tensor, indices: Tensor) -> Tensor:
    return eager_rank(pool[indices])


def gathered_entropy_rank(pool: Tensor, indices: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(pool[indices], dim=-1)
    values = torch.linalg.eigvalsh(x.mT @ x).clamp_min(0)
    p = values / values.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(p, p).sum(-1))


def eager_pool_selection(pool: Tensor, size: int, draws: int, generator: torch.Generator) -> Tensor:
    """The most diverse draw; a permutation serves all of them."""
    indices = torch.randperm(len(pool), generator=generator)[: draws * size].view(draws, size)
    return indices[gathered_rank(pool, indices).argmax()]


def eager_whitening(z: Tensor) -> Tensor:
    x = z - z.mean(0)
    c = x.T @ x / len(x)
    c = c * (1 - 1e-4) + 1e-4 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(c)[0], x.T, upper=False).T


def eager_coding_rate(z: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(z)
    n, d = x.shape
    return 0.5 * torch.logdet(torch.eye(d, dtype=x.dtype) + d / (n * 0.5**2) * x.T @ x)


def eager_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(torch.cat([z0, z1]))
    logits = (x @ x.T / 0.5).masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(x), device=x.device).roll(len(z0)))


def eager_info_nce(query: Tensor, key: Tensor, temperature: Tensor, out: Tensor) -> Tensor:
    """`out`: the pairs that are no negatives, or labels of groups."""
    logits = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T / temperature
    mask = out if out.ndim == 2 else out[:, None] == out
    mask = mask & ~torch.eye(len(query), dtype=torch.bool, device=query.device)
    targets = torch.arange(len(query), device=query.device)
    return torch.nn.functional.cross_entropy(logits.masked_fill(mask, -torch.inf), targets)


def _both_passes(call: Callable[..., Tensor], *inputs: Tensor, grad: Tensor | None = None) -> Callable[[], Tensor]:
    leaves = [part.clone().requires_grad_() for part in inputs]

    def run() -> Tensor:
        return torch.autograd.grad(call(*leaves), leaves, grad)[0]

    return run


def _job(
    name: str,
    ours: Callable[[], Tensor],
    others: dict[str, tuple[Callable[[], object], float | None]],
    exact: Callable[[], Tensor],
    tolerance: float,
    **more: float,
) -> Job:
    """A job whose result is compared with an exact one; others: label -> call, and the speed-up that is asked for."""

    def check() -> None:
        error = worst_relative(ours(), exact())
        assert error <= tolerance, f"relative error {error:.1e} above {tolerance:.0e}"

    calls = {label: call for label, (call, _) in others.items()}
    bars = {label: bar for label, (_, bar) in others.items() if bar is not None}
    return Job(name, {"spectral_kernels": ours, **calls}, check, bars, **more)


def jobs() -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    for n in (4096, 65536):
        z = torch.randn(n, 128, generator=generator)
        yield _job(
            f"normalise, centre, covariance {n}x128",
            lambda z=z: sk.covariance(z, normalize=True),
            {
                "torch, eager": (lambda z=z: eager_covariance(z), 4.0 if n == 65536 else None),
                "torch.cov alone": (lambda z=z: torch.cov(z.T), 3.0 if n == 65536 else 2.0),
            },
            lambda z=z: eager_covariance(z.double()),
            1e-5,
        )
    wide = torch.randn(16384, 2048, generator=generator)
    yield _job(
        "normalise, centre, covariance 16384x2048",
        lambda: sk.covariance(wide, normalize=True),
        {"torch.cov alone": (lambda: torch.cov(wide.T), 1.6)},
        lambda: eager_covariance(wide.double()),
        1e-5,
    )
    pool = torch.randn(65536, 128, generator=generator)
    indices = torch.randint(65536, (64, 256), generator=generator)
    for order, label, eager, bar in (
        (2.0, "torch, gather and bmm", gathered_rank, 2.0),
        (1.0, "torch, gather, bmm and eigvalsh", gathered_entropy_rank, None),
    ):
        yield _job(
            f"batch_effective_rank, order {order:g}, 64 batches of 256x128",
            lambda order=order: sk.batch_effective_rank(pool, indices, order=order),
            {label: (lambda eager=eager: eager(pool, indices), bar)},
            lambda eager=eager: eager(pool.double(), indices),
            1e-5,
        )
    yield from pool_jobs(pool)
    unit = torch.nn.functional.normalize(pool[indices], dim=-1)
    stack = unit.mT @ unit / 256
    yield _job(
        "effective_rank, order 1, 64 batches of 256x128",
        lambda: sk.effective_rank(unit, order=1, normalize=False),
        {"torch.linalg.eigvalsh of the matrices": (lambda: torch.linalg.eigvalsh(stack), 3.0)},
        lambda: gathered_entropy_rank(pool.double(), indices),
        1e-5,
    )
    z = torch.randn(4096, 128, generator=generator)
    grad = torch.randn(4096, 128, generator=generator)
    yield _job(
        "whiten 4096x128, forward and backward",
        _both_passes(sk.whiten, z, grad=grad),
        {"torch, eager Cholesky": (_both_passes(eager_whitening, z, grad=grad), 2.0)},
        _both_passes(eager_whitening, z.double(), grad=grad.double()),
        1e-3,
    )
    for n, d in ((4096, 128), (256, 1024)):
        rows = torch.randn(n, d, generator=generator)
        yield _job(
            f"coding_rate {n}x{d}, forward and backward",
            _both_passes(sk.coding_rate, rows),
            {"torch, eager logdet": (_both_passes(eager_coding_rate, rows), 2.0)},
            _both_passes(eager_coding_rate, rows.double()),
            1e-4,
        )
    z0, z1 = torch.randn(512, 128, generator=generator), torch.randn(512, 128, generator=generator)
    yield _job(
        "nt_xent 2x512x128, forward and backward",
        _both_passes(sk.nt_xent, z0, z1),
        {"torch, eager": (_both_passes(eager_nt_xent, z0, z1), None)},
        _both_passes(eager_nt_xent, z0.double(), z1.double()),
        1e-4,
    )
    query, key = torch.randn(4096, 128, generator=generator), torch.randn(4096, 128, generator=generator)
    yield from option_jobs(query, key, generator)
    yield _job(
        "info_nce_grad_norms, B = 4096, d = 128",
        lambda: sk.info_nce_grad_norms(query, key, temperature=0.1),
        {
            "torch, autograd": (lambda: autograd_norms(query, key), 4.0),
            "torch, SDPA with V = K": (lambda: attention_norms(query, key), 0.95),
        },
        lambda: autograd_norms(query.double(), key.double()),
        1e-4,
    )
    yield from bank_jobs(generator)


def option_jobs(query: Tensor, key: Tensor, generator: torch.Generator) -> Iterator[Job]:
    """A learned temperature, and pairs left out."""
    inputs = (query, key, torch.tensor(0.1))
    wide = tuple(part.double() for part in inputs)
    labels = torch.randint(256, (len(query),), generator=generator)
    for how, out in (("groups", labels), ("mask", torch.rand(len(query), len(query), generator=generator) < 0.01)):

        def ours(q: Tensor, k: Tensor, t: Tensor, how: str = how, out: Tensor = out) -> Tensor:
            return sk.info_nce(q, k, temperature=t, **{how: out})  # type: ignore[arg-type]

        def eager(q: Tensor, k: Tensor, t: Tensor, out: Tensor = out) -> Tensor:
            return eager_info_nce(q, k, t, out)

        yield _job(
            f"info_nce {len(query)}x{query.shape[1]}, {how}, learned temperature, forward and backward",
            _both_passes(ours, *inputs),
            {"torch, eager": (_both_passes(eager, *inputs), 1.5)},
            _both_passes(eager, *wide),
            1e-4,
        )


def pool_jobs(pool: Tensor) -> Iterator[Job]:
    def ours() -> Tensor:
        return sk.pool_select(pool, 256, policy="high", generator=torch.Generator().manual_seed(0)).indices

    def eager(rows: Tensor = pool) -> Tensor:
        return eager_pool_selection(rows, 256, 16, torch.Generator().manual_seed(0))

    def check() -> None:
        assert torch.equal(ours(), eager(pool.double())), "another draw is chosen"

    yield Job(
        f"pool_select, the best of 16 batches of 256, {len(pool)}x{pool.shape[1]}",
        {"spectral_kernels": ours, "torch, gather and bmm": eager},
        check,
        {},
    )


def autograd_norms(query: Tensor, key: Tensor) -> Tensor:
    u = torch.nn.functional.normalize(query).requires_grad_()
    logits = u @ torch.nn.functional.normalize(key).T / 0.1
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(u), device=u.device), reduction="sum")
    return torch.autograd.grad(loss, u)[0].square().sum(1)


def attention_norms(query: Tensor, key: Tensor) -> Tensor:
    u, v = torch.nn.functional.normalize(query), torch.nn.functional.normalize(key)
    mean = torch.nn.functional.scaled_dot_product_attention(u[None, None], v[None, None], v[None, None], scale=10.0)
    return ((mean[0, 0] - v) / 0.1).square().sum(1)


def bank_jobs(generator: torch.Generator) -> Iterator[Job]:
    """A bank as large as ImageNet-1k."""
    bank = torch.randn(1_281_167, 128, generator=generator)
    valid = torch.rand(len(bank), generator=generator) < 0.9
    # as many multiply-adds as half of the covariance's: the ratio is its share of sgemm's rate, counting half
    left = torch.randn(2048, 2048, generator=generator)
    right = torch.randn(2048, len(bank) * 128 * 128 // 2 // 2048**2, generator=generator)

    def select(mask: Tensor | None = None) -> Tensor:
        return sk.greedy_select(
            bank, 256, candidates=64, valid=mask, generator=torch.Generator().manual_seed(0)
        ).indices

    def check_selection() -> None:
        chosen, masked = select(), select(valid)
        assert len(set(chosen.tolist())) == 256 and bool(valid[masked].all()), "picks repeat or are masked out"
        random = float(sk.effective_rank(bank[:256], order=2))
        assert float(sk.effective_rank(bank[chosen], order=2)) > random, "picks are no more diverse than random rows"

    yield Job(
        "greedy_select 256 of 1281167x128, 64 candidates",
        {"spectral_kernels": select, "with valid=": lambda: select(valid)},
        check_selection,
        {},
        most_ms=10.0,
        most_mb=64.0,
    )

    label = f"torch, a product of half its size, 2048x2048 by {right.shape[1]}"
    yield _job(
        "normalise, centre, covariance 1281167x128",
        lambda: sk.covariance(bank, normalize=True),
        {label: (lambda: left @ right, 0.6)},
        lambda: bank_covariance(bank),
        1e-5,
        most_mb=64.0,
    )
    yield from memory_bank_jobs(bank, generator)


def memory_bank_jobs(bank: Tensor, generator: torch.Generator) -> Iterator[Job]:
    """A batch's rows into a bank as large as that, and out of it."""
    memory = sk.MemoryBank(*bank.shape)
    ages = torch.zeros(len(bank), dtype=torch.int64)
    # other rows in each call: the same would soon lie in the caches
    batches = torch.randperm(len(bank), generator=generator)[: 1024 * 256].view(1024, 256)
    ours, theirs = itertools.cycle(batches), itertools.cycle(batches)
    rows = torch.randn(256, bank.shape[1], generator=generator)

    def update_by_torch(indices: Tensor) -> None:
        bank.index_copy_(0, indices, torch.nn.functional.normalize(rows))
        ages[indices] = memory.step

    def check_update() -> None:
        memory.update(batches[0], rows)
        update_by_torch(batches[0])
        error = worst_relative(memory.embeddings[batches[0]], bank[batches[0]])
        assert error <= 1e-6, f"relative error {error:.1e} above 1e-06"

    yield Job(
        f"MemoryBank.update, 256 of {len(bank)}x{bank.shape[1]}",
        {
            "spectral_kernels": lambda: memory.update(next(ours), rows),
            "torch, normalize and index_copy_": lambda: update_by_torch(next(theirs)),
        },
        check_update,
        {},
    )

    def check_gather() -> None:
        assert torch.equal(memory.gather(batches[0]), memory.embeddings[batches[0]]), "rows differ"

    yield Job(
        f"MemoryBank.gather, 256 of {len(bank)}x{bank.shape[1]}",
        {"spectral_kernels": lambda: memory.gather(next(ours)), "torch, indexing": lambda: bank[next(theirs)]},
        check_gather,
        {},
    )


def bank_covariance(bank: Tensor) -> Tensor:
    """In float64, in pieces."""
    moment, mean = torch.zeros(128, 128, dtype=torch.float64), torch.zeros(128, dtype=torch.float64)
    for piece in bank.split(65536):
        x = torch.nn.functional.normalize(piece.double())
        moment += x.T @ x / len(bank)
        mean += x.sum(0) / len(bank)
    return moment - torch.outer(mean, mean)
