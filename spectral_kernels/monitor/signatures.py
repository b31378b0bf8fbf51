"""The failure signatures of contrastive training, each with its numbers and what to try.

None speaks of a number that is nan: that was not observed.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

# measurements by the names of spectrum_monitor.COLUMNS, the newest last
History = Sequence[Mapping[str, float]]

COLLAPSED_SPREAD = 0.05
COLLAPSED_RANK = 1.5
DUPLICATE_SHARE = 0.25
WIDENING = 0.9
FLAT_CHI2 = 0.05
ONE_HOT_SHARE = 0.5
BURST = 5.0
RECENT = 20


def collapse(history: History) -> str | None:
    now = history[-1]
    spread, rank = now["spread"], now["centred_rank"]
    if not (spread < COLLAPSED_SPREAD or rank < COLLAPSED_RANK):
        return None
    return (
        f"collapse: the embeddings' variance is {spread:.3g} of at most 1, in {rank:.2f} directions "
        f"(healthy: above {COLLAPSED_SPREAD:g} and {COLLAPSED_RANK:g}). Try a smaller learning rate or a longer warm-up, "
        "a higher temperature, whitening before the loss (train.whiten), or stronger augmentation"
    )


def redundant_negatives(history: History) -> str | None:
    now, shares = history[-1], [numbers["duplicate_share"] for numbers in history[-4:]]
    share = shares[-1]
    # every encoder starts with a narrow cloud: wait until it has stopped to widen
    if len(shares) < 4 or not all(s >= DUPLICATE_SHARE for s in shares) or sum(shares[2:]) < WIDENING * sum(shares[:2]):
        return None
    if now["spread"] < COLLAPSED_SPREAD:  # that is collapse
        return None
    return (
        f"redundant negatives: {100 * share:.0f} % of the samples have another one of the batch within cosine 0.98 "
        f"(healthy: below {100 * DUPLICATE_SHARE:.0f} %; effective rank {now['effective_rank']:.1f}). Try greedy "
        "selection, a larger pool, or look for duplicates in the data (spectral-kernels inspect)"
    )


def flat_softmax(history: History) -> str | None:
    now = history[-1]
    if not now["chi2"] < FLAT_CHI2 or now["spread"] < COLLAPSED_SPREAD:
        return None
    return (
        f"flat softmax: the negatives' weights vary by χ² = {now['chi2']:.2g} (healthy: above {FLAT_CHI2:g}), so that hard "
        "negatives count like easy ones and the gradient is that of the batch mean. Try a lower temperature, or batches "
        "of lower effective rank (pool selection, policy 'low')"
    )


def one_hot_softmax(history: History) -> str | None:
    now = history[-1]
    share = now["chi2"] / max(now["negatives"] - 1, 1)
    if not share > ONE_HOT_SHARE or now["negatives"] < 3:
        return None
    return (
        f"one-hot softmax: one negative carries the gradient of an anchor (χ² is {100 * share:.0f} % of its maximum; "
        f"healthy: below {100 * ONE_HOT_SHARE:.0f} %), so that it is noisy. Try a higher temperature or a larger batch"
    )


def exploding_variance(norms: Sequence[float]) -> str | None:
    """norms: of the gradients of the steps so far, the newest last; those that are not finite do not count."""
    norms = [norm for norm in norms if math.isfinite(norm)]
    recent, before = norms[-RECENT:], norms[-6 * RECENT : -RECENT]
    scale = max(map(abs, norms), default=0.0)
    if len(recent) < RECENT or len(before) < RECENT or scale == 0:
        return None
    # sums of the largest numbers would overflow
    recent, before = [norm / scale for norm in recent], [norm / scale for norm in before]
    now, then = statistics.pstdev(recent), _usual_deviation(before)
    mean = statistics.fmean(recent)
    # far above what it was, and no longer small beside the gradient itself
    if now < BURST * then or now < 0.5 * mean:
        return None
    return (
        f"exploding variance: the gradient norm of the last {RECENT} steps varies by ±{scale * now:.3g} about "
        f"{scale * mean:.3g}, of those before by ±{scale * then:.3g} (healthy: below {BURST:g} times as much). Try a smaller "
        "learning rate or weight decay, gradient clipping, or a larger batch"
    )


def _usual_deviation(values: Sequence[float]) -> float:
    """Standard deviation as the median deviation gives it: the first steps of a run do not count."""
    centre = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - centre) for value in values)


SIGNATURES = {
    "collapse": collapse,
    "redundant negatives": redundant_negatives,
    "flat softmax": flat_softmax,
    "one-hot softmax": one_hot_softmax,
}
