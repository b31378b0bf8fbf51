"""The end of an order-2 rank, inside the kernels that sum up what it is made of (kernels/tiles.py, kernels/row_tiles.py)."""

import triton
import triton.language as tl


@triton.jit
def store_rank(
    t, f, mean_square, quartics, quartic_count, grad, value, weights, batch, n,
    CENTER: tl.constexpr, NEGLIGIBLE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R₂ of a batch from t = tr M and f = ‖M‖² of its undivided matrix, unbiased where Σ‖x‖⁴ comes in `quartics`.

    With `grad` (b,) also `weights` (b, 4), the gradient on the sums, as `rank2_from_sums` in reference.py.
    """
    # n as a float of the accumulation dtype: n⁴ passes 2³¹
    size = tl.full([], 0.0, dtype=ACC) + n
    q = tl.full([], 0.0, dtype=ACC)
    a = size / size
    b = size - size
    c = size - size
    if quartics is not None:
        for first in range(0, quartic_count, BLOCK):
            part = first + tl.arange(0, BLOCK)
            q += tl.sum(tl.load(quartics + batch * quartic_count + part, mask=part < quartic_count, other=0.0), 0)
        if CENTER:
            common = (size - 1) / (size * (size - 2) * (size - 3))
            a = common * (size - 1) * (size - 2)
            b = common
            c = -common * size * (size - 1)
        else:
            a = size / (size - 1)
            c = -a
    total = t
    if CENTER:
        total = t + size * mean_square
    zero = (t <= NEGLIGIBLE * total) | (total == 0)
    e = a * f + b * t * t + c * q
    positive = (e > 0) & (zero == 0)
    safe = tl.where(positive, e, 1.0)
    by_e = tl.where(positive, -(t / safe) * (t / safe), 0.0)
    by_t = tl.where(positive, 2.0 * t / safe, 0.0) + 2.0 * b * t * by_e
    # NaN of NaN rows
    unbounded = tl.where(e == e, float("inf"), e)
    tl.store(value + batch, tl.where(positive, t * (t / safe), tl.where(zero, 0.0, unbounded)))
    if grad is not None:
        g = tl.load(grad + batch)
        tl.store(weights + batch * 4 + 0, t)
        tl.store(weights + batch * 4 + 1, g * by_t)
        tl.store(weights + batch * 4 + 2, g * a * by_e)
        tl.store(weights + batch * 4 + 3, g * c * by_e)
