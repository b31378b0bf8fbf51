"""Greedy selection as its definition (theory.md §1 and §5), a step at a time in float64.

A set S has T = Σ‖x‖² and D = ‖Σ xxᵀ‖²_F, so R₂ = T²/D. A row j changes D by 2 s_j + ‖x_j‖⁴ with s_j = Σ_{i∈S}
(x_i·x_j)². Each pick i therefore costs one product, s_j += (x_i·x_j)². The log-determinant ln det(I + Σ xxᵀ/δ) has
the same shape: its gain is ln(1 + q_j), q_j = x_jᵀA x_j with A = (δI + Σ xxᵀ)⁻¹, and after a pick i, q_j −=
(x_j·Ax_i)²/(1 + q_i).

Rules that every backend keeps:
- normalised rows are rounded to the accumulation dtype, and have length exactly 1; a zero row is *unseen*;
- the first pick is the first of `start` that is valid and seen;
- a step looks at the rows not yet taken that are valid and seen: among its draws, or among all of them;
- the best is the lowest index within `TIE` of the best score, so duplicates and their scaled copies go to the lowest;
- with a window, a step raises R₂ below it, lowers it above it (log-det: its own objective), and inside it takes the
  first of its draws that is left; an edge of the window is met within `TIE`;
- a step that has nothing to look at takes the lowest seen row that is left, and failing that the lowest row left.
"""

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.ops._rows import accumulation_dtype, read_rows

# relative; absolute below s = TIE_FLOOR / TIE, where s_j is rounding noise of orthogonal rows
TIE = 1e-6
TIE_FLOOR = 1e-12
# δ of the log-determinant
RIDGE = 1e-3


def _score(objective: str, normalize: bool, s: Tensor, q: Tensor, squares: Tensor, t: float, d: float) -> Tensor:
    """What a step maximises over the rows."""
    if objective == "logdet":
        return q
    return -s if normalize else (t + squares) ** 2 / (d + 2 * s + squares.square())


def _best(score: Tensor, rows: Tensor, raise_it: bool) -> int:
    """Lowest of `rows` whose score is within the tie tolerance of the best."""
    values = score[rows] if raise_it else -score[rows]
    best = values.max()
    return int(rows[values >= best - TIE * best.abs() - TIE_FLOOR].min())


def _select_one(
    rows: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, k: int, all_rows: bool, objective: str,
    window: list[float] | None, normalize: bool,
) -> tuple[list[int], list[float], list[float]]:  # fmt: skip
    x = read_rows(rows, normalize, torch.float64)
    seen = (x != 0).any(-1)
    if normalize:
        x = x.to(accumulation_dtype(rows.dtype)).double()
    squares = torch.where(seen, 1.0, 0.0).double() if normalize else x.square().sum(-1)
    left = torch.ones(len(x), dtype=torch.bool, device=x.device) if valid is None else valid.clone()
    s = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    q = squares / RIDGE
    inverse = torch.eye(x.shape[1], dtype=torch.float64, device=x.device) / RIDGE
    t = d = gain = 0.0
    indices: list[int] = []
    ranks: list[float] = []
    objectives: list[float] = []
    for step in range(k):
        rank = ranks[-1] if ranks else 0.0
        below = window is None or rank < window[0] * (1 - TIE)
        inside = not below and rank <= window[1] * (1 + TIE)  # type: ignore[index]
        if step == 0 or inside or not all_rows:
            looked = start if step == 0 else draws[step]  # type: ignore[index]
            looked = looked[(left & seen)[looked]]
        else:
            looked = (left & seen).nonzero()[:, 0]
        if len(looked) == 0:
            fallback = left & seen if bool((left & seen).any()) else left
            pick = int(fallback.nonzero()[0])
        elif step == 0 or inside:
            pick = int(looked[0])
        else:
            score = _score(objective, normalize, s, q, squares, t, d)
            pick = _best(score, looked, raise_it=below)
        left[pick] = False
        d += 2 * float(s[pick]) + float(squares[pick]) ** 2
        t += float(squares[pick])
        gain += float(torch.log1p(q[pick]))
        s += (x @ x[pick]).square()
        if objective == "logdet":
            v, scale = inverse @ x[pick], 1 + float(q[pick])
            q = (q - (x @ v).square() / scale).clamp_min(0.0)
            inverse -= torch.outer(v, v) / scale
        indices.append(pick)
        ranks.append(t * t / d if d > 0 else 0.0)
        objectives.append(gain if objective == "logdet" else ranks[-1])
    return indices, ranks, objectives


def greedy_select(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, k: int, all_rows: bool, objective: str,
    window: list[float] | None, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.finite_rows(pool, "pool")
    checks.inside(start, "start", pool.shape[1])
    if draws is not None:
        checks.inside(draws, "draws", pool.shape[1])
    checks.enough_left(None if valid is None else valid.sum(-1), k)
    chosen = [
        _select_one(
            pool[i], start[i], None if draws is None else draws[i], None if valid is None else valid[i],
            k, all_rows, objective, window, normalize,
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
