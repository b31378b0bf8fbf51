"""Greedy-m builder: a diverse batch, a row at a time."""

from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import Fit, choose, define, op
from spectral_kernels.ops._rows import accumulation_dtype, flatten
from spectral_kernels.ops._selection import (
    Selection,
    ValidRows,
    check_generator,
    check_valid,
    draw_rows,
    draw_seed,
)
from spectral_kernels.ops.greedy import reference

__all__ = ["OBJECTIVES", "Selection", "greedy_select"]

OBJECTIVES = ("effective_rank", "logdet")

# rows drawn for the first pick: so many that a cold pool seldom has none that is seen among them
SPARE_DRAWS = 16

# pools up to here have their Gram matrix made beforehand on a GPU (order 2, all rows)
GRAM_ROWS = 4096


def _fake(
    pool: Tensor, start: Tensor, draws: Any, valid: Any, seed: Tensor, k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(pool.dtype)
    shape = (pool.shape[0], k)
    return (
        pool.new_empty(shape, dtype=torch.int64),
        pool.new_empty(shape, dtype=wide),
        pool.new_empty(shape, dtype=wide),
    )


# indices have no gradient; the C++ and Triton kernels look for NaN as they read the rows
define(
    reference.greedy_select,
    fake=_fake,
    cuda="own",
)


def _start_rows(
    start: int | None, pool: Tensor, mask: Tensor | None, left: ValidRows | None, generator: torch.Generator | None
) -> Tensor:
    if start is None:
        return draw_rows(pool, left, (SPARE_DRAWS,), generator)
    start = checks.integer(start, "start", 0, pool.shape[1] - 1)
    if mask is not None and pool.device.type == "cpu" and not bool(mask[:, start].all()):
        raise ValueError(f"start = {start} is masked out by valid")
    return torch.full((pool.shape[0], 1), start, dtype=torch.int64, device=pool.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_fit(
    pool: tuple[int, int, int], k: int, candidates: int | None, logdet: bool, normalize: bool, device: torch.device,
    wide: bool,
) -> Fit:  # fmt: skip
    """How pools (b, n, d) suit the cuda backend, whose blocks keep what a step adds to in their shared memory."""
    place = torch.cuda.current_device() if device.index is None else device.index
    if not torch.ops.spectral_kernels_cuda.greedy_fits(place, *pool, k, candidates or 0, logdet, normalize, wide):
        return Fit(f"the scores of {pool[1]} rows of {pool[2]} do not fit the shared memory of {device}")
    return Fit()


def greedy_select(
    pool: Tensor,
    k: int,
    *,
    candidates: int | None = 64,
    objective: str = "effective_rank",
    start: int | None = None,
    valid: Tensor | None = None,
    normalize: bool = True,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Selection:
    """Choose k rows one at a time, each the best of m random candidates (Greedy-m, docs/theory.md §5) or of all rows.

    The exact rules (ties, unseen rows, exhausted draws) stand in `ops/greedy/reference.py`. All draws are made up
    front from the generator, so the same seed gives the same indices on every backend and number of threads; with
    `objective="logdet"` the same objective, since near-ties are decided by rounding. Rows within 1e-6 of the best tie: the
    first drawn of them is taken, or with all rows a random one, so that no row of a collapsed pool is favoured.

    Args:
        pool: (..., N, d) embeddings, float64, float32, bfloat16 or float16; leading dimensions are independent pools.
            Rows of length up to 1e-12 (as they are: zero rows) count as unseen: never picked while a seen row is left.
        k: rows to pick, at most N.
        candidates: m, random rows looked at in each step (with replacement; rows already taken are passed over); None
            looks at every row.
        objective: `"effective_rank"` (order 2, of the uncentred second moment) or `"logdet"` (ln det(I + Σ xxᵀ/δ) with
            δ = 1e-3: D-optimal, DPP-MAP).
        start: first row picked; None draws it.
        valid: (..., N) bool, False masks a row out.
        normalize: L2-normalise the rows first.
        generator: of any device; None uses torch's global one.
        backend: see `use_backend`.

    Returns:
        `Selection` of shapes (..., k); `effective_rank` and `objective` after each pick, float64 for a float64 pool,
        else float32. No gradient. On a GPU, where the mask is not waited for, indices are -1 once no row is left, and the
        other two stay as they were.

    Raises:
        ValueError: wrong shape or dtype, k not in [1, N], candidates below 1, unknown objective, start outside
            the pool or masked out, a valid mask that leaves fewer than k rows, a row that holds NaN or Inf, rows too long
            for float64 to tell what they add to the log-determinant (as they are, of length 265 or more).
        BackendError: a forced backend that cannot run here.
    """
    pool = checks.floating(pool, "pool")
    rows = pool.shape[-2]
    k = checks.integer(k, "k", 1, rows)
    if candidates is not None:
        candidates = checks.integer(candidates, "candidates", 1)
    checks.one_of(objective, "objective", OBJECTIVES)
    check_generator(generator)
    if valid is not None:
        valid = checks.tensor(valid, "valid")
    left = check_valid(valid, pool.shape[:-1], k, pool.device)
    flat = flatten(pool)
    mask = None if valid is None else valid.reshape(-1, rows)
    first = _start_rows(start, flat, mask, left, generator)
    draws = None if candidates is None else draw_rows(flat, left, (k, candidates), generator)
    seed = draw_seed(flat, generator)
    name = choose(
        "greedy_select",
        pool.device,
        backend,
        cuda=lambda: _cuda_fit(
            (flat.shape[0], rows, pool.shape[-1]),
            k,
            candidates,
            objective == "logdet",
            normalize,
            pool.device,
            pool.dtype == torch.float64,
        ),
    )
    chosen = op("greedy_select")(flat.detach(), first, draws, mask, seed, k, objective, normalize, name)
    return Selection(*(part.reshape(*pool.shape[:-2], k) for part in chosen))


def greedy_select_among(pool: Tensor, draws: Tensor, *, objective: str) -> Selection:
    """As `greedy_select` of unit rows, each step looking at rows that are given: pool (N, d), draws (k, m) int64 on its device.

    Step i takes one of row i of draws, the first step its first. Where no two steps share a row, none is left without.
    """
    k, candidates = draws.shape
    name = choose(
        "greedy_select",
        pool.device,
        cuda=lambda: _cuda_fit(
            (1, *pool.shape),
            k,
            candidates,
            objective == "logdet",
            True,
            pool.device,
            pool.dtype == torch.float64,
        ),
    )
    # a step finds a row among its draws: no key decides
    seed = torch.zeros(1, dtype=torch.int64, device=pool.device)
    chosen = op("greedy_select")(pool.detach()[None], draws[:1], draws[None], None, seed, k, objective, True, name)
    return Selection(*(part[0] for part in chosen))
