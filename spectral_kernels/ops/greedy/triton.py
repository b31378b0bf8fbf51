"""Greedy selection: one program runs the whole loop of a pool, so that no step returns to the host.

Both objectives have one skeleton. A pick brings a vector u, and what a row's score needs is Σ (x_j·u)² over the picks:
u = x_i for order 2; for the log-determinant u_i = A x_i / √(1 + q_i) with A = I/δ − Σ u uᵀ, so that no d x d inverse is kept
and q_j = ‖x_j‖²/δ − Σ (x_j·u)². With all rows as candidates these sums are kept for every row; for order 2 and pools of up to
`GRAM_ROWS` rows a step reads one row of a Gram matrix made beforehand on the whole chip, of rows normalised on the way. With m
candidates the sums are worked out for the draws alone, against the picks so far. Scores are float64 throughout; the rules are
those of reference.py, keys of rows those of `row_keys`, computed where rows tie and nowhere kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_kernels.errors import words as error_words
from spectral_kernels.kernels.launch import AotCall, Configuration, launch
from spectral_kernels.kernels.moments import moments
from spectral_kernels.kernels.rows import WORD, batch_strides, dense_rows, in_units, note, power_of_two
from spectral_kernels.ops._rows import accumulation_dtype
from spectral_kernels.ops._selection import KEY_BITS
from spectral_kernels.ops.greedy import GRAM_ROWS
from spectral_kernels.ops.greedy.best_triton import DELTA, best_of_all, best_of_draws
from spectral_kernels.ops.greedy.pool_triton import READ, first_free, first_left, read_pool_kernel
from spectral_kernels.ops.greedy.reference import LEAST_NOISE, NOISE, in_range

NOISE_SHARE = tl.constexpr(NOISE)
NOISE_LEAST = tl.constexpr(LEAST_NOISE)


@triton.jit(do_not_specialize=["n", "bits", "k", "s", "m"])
def greedy_kernel(
    x, start, draws, gram, seeds, squares, free, overlaps, vectors, scores, indices, ranks, objectives,
    errors, n_unit, n, bits, d, k, s, m,
    ALL_ROWS: tl.constexpr, LOGDET: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The k steps of one pool. `x` (b, n, d), `squares` and `free` are as `read_pool_kernel` left them; `vectors` (b, k, d)
    takes u. With `gram` x is not looked at. Keys have `bits` bits.
    """
    BLOCK_R: tl.constexpr = TILE // BLOCK_D if TILE > BLOCK_D else 1
    n *= n_unit
    batch = tl.program_id(0).to(tl.int64)
    x += batch * n * d
    start += batch * s
    squares += batch * n
    free += batch * n
    indices += batch * k
    ranks += batch * k
    objectives += batch * k
    if ALL_ROWS:
        overlaps += batch * n
    else:
        scores += batch * m
        draws += batch * k * m
    if LOGDET or not ALL_ROWS:
        vectors += batch * k * d
    if gram is not None:
        gram += batch * n * n
    seed = tl.load(seeds + batch)
    columns = tl.arange(0, BLOCK_D)
    zero = tl.full([], 0.0, dtype=tl.float64)
    t = zero
    frobenius = zero
    gain = zero
    for step in range(0, k):
        pick = tl.full([], 0, dtype=tl.int64) + n
        at_step = tl.full([], 0, dtype=tl.int64) + step
        if step == 0:
            pick = first_free(start, s, free, n, BLOCK_M)
        elif ALL_ROWS:
            pick = best_of_all(overlaps, squares, free, n, seed, bits, t, frobenius, LOGDET, NORMALIZE, BLOCK_L)
        else:
            pick = best_of_draws(
                draws + at_step * m, m, x, vectors, squares, free, scores, step, n, d, t, frobenius,
                LOGDET, NORMALIZE, BLOCK_M, BLOCK_S, BLOCK_K,
            )  # fmt: skip
        if pick >= n:
            pick = first_left(free, n, seed, bits, BLOCK_L)
        # where no row is left, as after a mask of too few, the step takes a row of zeros: sums and rank stay as they are
        found = pick < n
        if errors is not None:  # noqa: SIM102 (constants decide whether there are words)
            if pick >= n:
                note(errors + WORD, batch * 4294967296 + step)
        tl.debug_barrier()
        tl.store(free + pick, tl.full([], 0, dtype=tl.uint8), mask=found)
        tl.store(indices + step, tl.where(found, pick, -1))
        square = tl.load(squares + pick, mask=found, other=0.0)
        chosen = tl.zeros([BLOCK_D], dtype=tl.float64)
        if gram is None:
            chosen = tl.load(x + pick * d + columns, mask=columns < tl.where(found, d, 0), other=0.0).to(tl.float64)
        # Σ (x_i·x_pick)² over the picks before, and for log-det A x_pick and q_pick
        overlap = zero
        vector = chosen
        q = square / DELTA
        if LOGDET:
            vector = chosen / DELTA
        if LOGDET or not ALL_ROWS:
            for first in range(0, step, BLOCK_R):
                picks = first + tl.arange(0, BLOCK_R)
                before = tl.load(indices + picks, mask=picks < step, other=-1)
                inside = (before >= 0)[:, None] & (columns < d)[None, :]
                rows = tl.load(x + before[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float64)
                product = tl.sum(rows * chosen[None, :], 1)
                overlap += tl.sum(product * product, 0)
                if LOGDET:
                    u = tl.load(vectors + picks[:, None] * d + columns[None, :], mask=inside, other=0.0)
                    along = tl.sum(u * chosen[None, :], 1)
                    q -= tl.sum(along * along, 0)
                    vector -= tl.sum(u * along[:, None], 0)
        else:
            # every warp reads it before one of them adds to it below
            overlap = tl.load(overlaps + pick, mask=found, other=0.0)
            tl.debug_barrier()
        if LOGDET:
            q = tl.maximum(q, 0.0)
            if errors is not None and not NORMALIZE:
                noise = square / DELTA * NOISE_SHARE
                if (noise > NOISE_LEAST) & (q < noise):
                    note(errors + 2 * WORD, batch * 4294967296 + pick)
            vector = vector / tl.sqrt(1.0 + q)
            gain += tl.log(1.0 + q)
        if LOGDET or not ALL_ROWS:
            tl.store(vectors + at_step * d + columns, vector, mask=columns < d)
        frobenius += 2.0 * overlap + square * square
        t += square
        rank = tl.where(frobenius > 0, t * t / tl.where(frobenius > 0, frobenius, 1.0), 0.0)
        tl.store(ranks + step, rank.to(ranks.dtype.element_ty))
        if LOGDET:
            tl.store(objectives + step, gain.to(objectives.dtype.element_ty))
        else:
            tl.store(objectives + step, rank.to(objectives.dtype.element_ty))
        if gram is not None:
            for first in range(0, n, BLOCK_L):
                rows = first + tl.arange(0, BLOCK_L)
                product = tl.load(gram + pick * n + rows, mask=rows < tl.where(found, n, 0), other=0.0)
                total = tl.load(overlaps + rows, mask=rows < n, other=0.0) + product * product
                tl.store(overlaps + rows, total, mask=rows < n)
        elif ALL_ROWS:
            for first in range(0, n, BLOCK_R):
                rows = first + tl.arange(0, BLOCK_R)
                inside = (rows < n)[:, None] & (columns < d)[None, :]
                at = x + rows.to(tl.int64)[:, None] * d + columns[None, :]
                product = tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64) * vector[None, :], 1)
                total = tl.load(overlaps + rows, mask=rows < n, other=0.0) + product * product
                tl.store(overlaps + rows, total, mask=rows < n)
        tl.debug_barrier()


# TILE: elements of a tile of whole rows
GREEDY = Configuration(
    {"TILE": 8192, "BLOCK_L": 1024, "BLOCK_M": 64, "BLOCK_S": 32, "BLOCK_K": 32}, num_warps=16, num_stages=1
)
CONFIGURATIONS = {"greedy": GREEDY}


def _wants_gram(n: int, k: int) -> bool:
    # the Gram matrix costs n²d/2 products on the whole chip, the steps k·n·d on one multiprocessor
    return n <= GRAM_ROWS and 64 * k >= n


def greedy_select(
    pool: Tensor, start: Tensor, draws: Tensor | None, valid: Tensor | None, seed: Tensor, k: int, objective: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pool, k, words = dense_rows(in_range(pool, valid, objective, normalize)), int(k), error_words(pool)
    b, n, d = pool.shape
    acc = accumulation_dtype(pool.dtype)
    squares = pool.new_empty(b, n, dtype=torch.float64)
    free = pool.new_empty(b, n, dtype=torch.uint8)
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    all_rows, logdet = draws is None, objective == "logdet"
    rows = pool.new_empty(b, n, d, dtype=acc) if normalize else pool.contiguous()
    blocks = -(-n // READ["BLOCK_N"])
    launch(
        read_pool_kernel,
        b * blocks,
        (pool, mask, rows if normalize else None, squares, free, words, n, d, blocks, *batch_strides(pool)),
        {"NORMALIZE": normalize, "LOGDET": logdet and not normalize},
        READ,
    )
    gram = None
    if all_rows and not logdet and _wants_gram(n, k):
        # half precision goes by way of float32, exactly: Triton 3.6 compiles no float64 products of it
        wide = rows if rows.dtype == torch.float64 else rows.float()
        gram = moments(wide, None, False, False, acc=torch.float64, gram=True).matrix
    candidates = 1 if draws is None else draws.shape[-1]
    indices = start.new_empty(b, k)
    ranks, objectives = pool.new_empty(b, k, dtype=acc), pool.new_empty(b, k, dtype=acc)
    launch(
        greedy_kernel,
        b,
        (
            rows, start.contiguous(), None if draws is None else draws.contiguous(), gram, seed.contiguous(),
            squares, free,
            pool.new_zeros(b, n, dtype=torch.float64) if all_rows else None,
            pool.new_empty(b, k, d, dtype=torch.float64) if logdet or not all_rows else None,
            None if all_rows else pool.new_empty(b, candidates, dtype=torch.float64),
            indices, ranks, objectives, words, *(in_units(n) if gram is not None else (1, n)),
            max(KEY_BITS, (n - 1).bit_length()), d, k, start.shape[-1], candidates,
        ),
        {"ALL_ROWS": all_rows, "LOGDET": logdet, "NORMALIZE": normalize, "BLOCK_D": power_of_two(d)},
        GREEDY,
    )  # fmt: skip
    return indices, ranks, objectives


def aot_calls() -> list[AotCall]:
    """Calls whose launches cover the kernels and configurations of this module and pool_triton.py."""

    def call(n: int, d: int, all_rows: bool, objective: str, dtype: torch.dtype, normalize: bool) -> None:
        pool = torch.empty(1, n, d, dtype=dtype, device="meta")
        start = torch.empty(1, 16, dtype=torch.int64, device="meta")
        draws = None if all_rows else torch.empty(1, 256, 64, dtype=torch.int64, device="meta")
        valid = torch.empty(1, n, dtype=torch.bool, device="meta")
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        greedy_select(pool, start, draws, valid, seed, 256, objective, normalize)

    return [
        lambda: call(4096, 128, True, "effective_rank", torch.float32, True),
        lambda: call(50000, 128, True, "effective_rank", torch.float32, True),
        lambda: call(50000, 512, True, "effective_rank", torch.bfloat16, False),
        lambda: call(50000, 128, True, "logdet", torch.float32, True),
        lambda: call(50000, 128, False, "effective_rank", torch.float32, True),
        lambda: call(50000, 512, False, "logdet", torch.float64, False),
        lambda: call(50000, 128, False, "effective_rank", torch.float64, True),
    ]
