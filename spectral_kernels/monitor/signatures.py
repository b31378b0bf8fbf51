"""The failure signatures of contrastive training, each with its numbers and what to try."""

from collections.abc import Mapping, Sequence

# a measurement, by the names of spectrum_monitor.COLUMNS
Numbers = Mapping[str, float]

COLLAPSED_SPREAD = 0.01
COLLAPSED_RANK = 1.5
DUPLICATE_SHARE = 0.25
FLAT_CHI2 = 0.05
ONE_HOT_SHARE = 0.5
BURST = 5.0
RECENT = 20


def collapse(now: Numbers) -> str | None:
    spread, rank = now["spread"], now["centred_rank"]
    if spread >= COLLAPSED_SPREAD and rank >= COLLAPSED_RANK:
        return None
    return (
        f"collapse: the embeddings' variance is {spread:.3g} of at most 1, in {rank:.2f} directions "
        f"(healthy: above {COLLAPSED_SPREAD:g} and {COLLAPSED_RANK:g}). Try a smaller learning rate or a longer warm-up, "
        "a higher temperature, whitening before the loss (train.whiten), or stronger augmentation"
    )


def redundant_negatives(now: Numbers) -> str | None:
    share = now["duplicate_share"]
    if share < DUPLICATE_SHARE or now["spread"] < COLLAPSED_SPREAD:  # that is collapse
        return None
    return (
        f"redundant negatives: {100 * share:.0f} % of the samples have another one of the batch within cosine 0.98 "
        f"(healthy: below {100 * DUPLICATE_SHARE:.0f} %; effective rank {now['effective_rank']:.1f}). Try greedy "
        "selection, a larger pool, or look for duplicates in the data (spectral-kernels inspect)"
    )


def flat_softmax(now: Numbers) -> str | None:
    if now["chi2"] >= FLAT_CHI2 or now["spread"] < COLLAPSED_SPREAD:
        return None
    return (
        f"flat softmax: the negatives' weights vary by χ² = {now['chi2']:.2g} (healthy: above {FLAT_CHI2:g}), so that hard "
        "negatives count like easy ones and the gradient is that of the batch mean. Try a lower temperature, or batches "
        "of lower effective rank (a selection window)"
    )


def one_hot_softmax(now: Numbers) -> str | None:
    share = now["chi2"] / max(now["negatives"] - 1, 1)
    if share <= ONE_HOT_SHARE or now["negatives"] < 3:
        return None
    return (
        f"one-hot softmax: one negative carries the gradient of an anchor (χ² is {100 * share:.0f} % of its maximum; "
        f"healthy: below {100 * ONE_HOT_SHARE:.0f} %), so that it is noisy. Try a higher temperature or a larger batch"
    )


def exploding_variance(norms: Sequence[float]) -> str | None:
    """norms: of the gradients of the steps so far, the newest last."""
    recent, before = norms[-RECENT:], norms[-6 * RECENT : -RECENT]
    if len(recent) < RECENT or len(before) < RECENT:
        return None
    now, then = _variance(recent), _variance(before)
    mean = sum(recent) / len(recent)
    # tenfold and no longer small beside the gradient itself
    if now < BURST**2 * then or now < (0.5 * mean) ** 2:
        return None
    return (
        f"exploding variance: the gradient norm of the last {RECENT} steps varies by ±{now**0.5:.3g} about {mean:.3g}, of "
        f"those before by ±{then**0.5:.3g}. Try a smaller learning rate, gradient clipping, whitening before the loss, or "
        "a larger batch"
    )


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


SIGNATURES = {
    "collapse": collapse,
    "redundant negatives": redundant_negatives,
    "flat softmax": flat_softmax,
    "one-hot softmax": one_hot_softmax,
}
