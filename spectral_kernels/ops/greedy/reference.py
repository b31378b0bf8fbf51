"""Greedy selection as its definition (docs/theory.md §1 and §5), a step at a time in float64.

A set S has T = Σ‖x‖² and D = ‖Σ xxᵀ‖²_F, so R₂ = T²/D. A row j changes D by 2 s_j + ‖x_j‖⁴ with s_j = Σ_{i∈S}
(x_i·x_j)². Each pick i therefore costs one product, s_j += (x_i·x_j)². The log-determinant ln det(I + Σ xxᵀ/δ) has
the same shape: its gain is ln(1 + q_j), q_j = x_jᵀA x_j with A = (δI + Σ xxᵀ)⁻¹, and after a pick i, q_j −=
(x_j·Ax_i)²/(1 + q_i).

Rules that every backend keeps:
- normalised rows are rounded to the accumulation dtype, and have length exactly 1 whatever it was; zero rows stay zero;
- a row of length up to `NORM_FLOOR` is *unseen* (as they are, a zero row; in float64 also one that is 2⁻²⁵⁰ of the longest or
  less, as squares of squares end at 1e-308); once picked it counts as any other;
- the first pick is the first of `start` that is valid and seen;
- a step looks at the rows not yet taken that are valid and seen: among its draws, or among all of them;
- of the scores within `TIE` of the best the first in the order of the draws is taken; of all rows, that of the lowest
  *key*. Keys are a random permutation (`row_keys` of the seed), so no row is favoured among equal ones;
- a step that has nothing to look at takes the seen row left of the lowest key, and failing that the row left of the lowest;
- rows as they are may be too long for the log-determinant: one whose q is all rounding when it is picked is an error.
"""

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.errors import TOO_LONG
from spectral_kernels.ops._rows import accumulation_dtype, read_rows
from spectral_kernels.ops._selection import is_seen, row_keys

# relative; absolute below s = TIE_FLOOR / TIE, where s_j is rounding noise of orthogonal rows
TIE = 1e-6
TIE_FLOOR = 1e-12
# δ of the log-determinant
RIDGE = 1e-3
# of ‖x‖²/δ: q below it is rounding; worth an error from LEAST_NOISE on. And the longest ‖x‖² whose square is held
NOISE = 2.0**-46
LEAST_NOISE = 1e-6
LONGEST_SQUARE = 2.0**490


def _score(objective: str, normalize: bool, s: Tensor, q: Tensor, squares: Tensor, t: float, d: float) -> Tensor:
    """What a step maximises over the rows."""
    if objective == "logdet":
        return q
    return -s if normalize else (t + squares) ** 2 / (d + 2 * s + squares.square())


def _best(score: Tensor, rows: Tensor) -> int:
    """First of `rows` whose score is within the tie tolerance of the best."""
    values = score[rows]
    best = values.max()
    return int(rows[values >= best - TIE * best.abs() - TIE_FLOOR][0])


def in_range(pool: Tensor, valid: Tensor | None, objective: str, normalize: bool) -> Tensor:
    """A pool (b, n, d) whose products, and their squares, float64 holds; R₂ is the same at every scale.

    Only float64 rows that are not normalised need it: each pool is scaled by a power of two, by its longest row, and rows
    that are 2⁻²⁵⁰ of that or less become zero. For the log-determinant scale matters: it is left alone.
    """
    if pool.dtype != torch.float64 or normalize or objective == "logdet":
        return pool
    largest = pool.abs().amax(-1, keepdim=True)
    bad = ~largest.isfinite()  # somebody else's to find
    counted = ~bad if valid is None else ~bad & valid[..., None]
    exponent = torch.frexp(torch.where(counted, largest, 0.0).amax(-2, keepdim=True)).exponent
    one = torch.ones_like(exponent, dtype=torch.float64)
    # in two steps: one power of two may not hold it
    for part in (-exponent // 2, -exponent - -exponent // 2):
        factor = torch.ldexp(one, part)
        pool, largest = pool * factor, largest * factor
    return torch.where(bad | (counted & (largest > 2.0**-250)), pool, 0.0)


def _too_long(row: int, batch: int | None) -> ValueError:
    return ValueError(f"pool {'' if batch is None else f'batch {batch} '}row {row} {TOO_LONG}")


def _select_one(
    rows: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, seed: int, batch: int | None, k: int,
    objective: str, normalize: bool,
) -> tuple[list[int], list[float], list[float]]:  # fmt: skip
    seen = is_seen(rows, normalize)
    x = read_rows(rows, normalize, torch.float64)
    if normalize:
        x = x.to(accumulation_dtype(rows.dtype)).double()
    squares = (x != 0).any(-1).double() if normalize else x.square().sum(-1)
    # rows in the order of their keys, in which those that are left are looked at
    order = row_keys(torch.arange(len(x), device=x.device), len(x), seed).argsort()
    left = torch.ones(len(x), dtype=torch.bool, device=x.device) if valid is None else valid.clone()
    too_long = (left & (squares > LONGEST_SQUARE)).nonzero()[:, 0]
    if objective == "logdet" and checks.enabled() and len(too_long) > 0:
        raise _too_long(int(too_long[0]), batch)
    s = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    q = squares / RIDGE
    inverse = torch.eye(x.shape[1], dtype=torch.float64, device=x.device) / RIDGE
    t = d = gain = 0.0
    indices: list[int] = []
    ranks: list[float] = []
    objectives: list[float] = []
    for step in range(k):
        looked = start if step == 0 else order if draws is None else draws[step]
        looked = looked[(left & seen)[looked]]
        if len(looked) == 0:
            fallback = left & seen if bool((left & seen).any()) else left
            pick = int(order[fallback[order]][0])
        elif step == 0:
            pick = int(looked[0])
        else:
            pick = _best(_score(objective, normalize, s, q, squares, t, d), looked)
        left[pick] = False
        d += 2 * float(s[pick]) + float(squares[pick]) ** 2
        t += float(squares[pick])
        gain += float(torch.log1p(q[pick]))
        s += (x @ x[pick]).square()
        if objective == "logdet":
            noise = NOISE * float(squares[pick]) / RIDGE
            if checks.enabled() and LEAST_NOISE < noise > float(q[pick]):
                raise _too_long(pick, batch)
            v, scale = inverse @ x[pick], 1 + float(q[pick])
            q = (q - (x @ v).square() / scale).clamp_min(0.0)
            inverse -= torch.outer(v, v) / scale
        indices.append(pick)
        ranks.append(t * t / d if d > 0 else 0.0)
        objectives.append(gain if objective == "logdet" else ranks[-1])
    return indices, ranks, objectives


def greedy_select(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, seed: Tensor, k: int, objective: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.finite_rows(pool, "pool")
    checks.inside(start, "start", pool.shape[1])
    if draws is not None:
        checks.inside(draws, "draws", pool.shape[1])
    checks.enough_left(None if valid is None else valid.sum(-1), k)
    pool = in_range(pool, valid, objective, normalize)
    chosen = [
        _select_one(
            pool[i], start[i], None if draws is None else draws[i], None if valid is None else valid[i],
            int(seed[i]), i if len(pool) > 1 else None, k, objective, normalize,
        )
        for i in range(len(pool))
    ]  # fmt: skip
    indices, ranks, objectives = zip(*chosen, strict=True)
    wide = accumulation_dtype(pool.dtype)
    return (
        torch.tensor(indices, dtype=torch.int64, device=pool.device),
        torch.tensor(ranks, dtype=wide, device=pool.device),
        torch.tensor(objectives, dtype=wide, device=pool.device),
    )
