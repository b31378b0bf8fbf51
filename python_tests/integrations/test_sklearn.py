"""`DiverseSubset` by scikit-learn's own checks, and against `greedy_select`."""

import os
from typing import Any

import numpy as np
import pytest
import torch

import spectral_kernels as sk

if os.environ.get("SPECTRAL_KERNELS_PEERS") != "require":
    pytest.importorskip("sklearn")
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from spectral_kernels.integrations.sklearn import DiverseSubset

ROWS = np.random.default_rng(0).normal(size=(200, 8))
# what is asked of a transformer, which has a row for each row of its input
FEWER = "the output has n_samples rows, not one for each row of X"
EXPECTED = {
    "check_transformer_general": FEWER,
    "check_transformer_data_not_an_array": FEWER,
    "check_methods_subset_invariance": "a subset of the ranked rows has another ranking: it is refused",
    "check_fit_idempotent": "rows that were not ranked are refused",
    "check_pipeline_consistency": "given y, the chosen labels come with the rows: a tuple, which the check cannot compare",
    "check_methods_sample_order_invariance": "a ranking is of rows in their order",
}


def test_checks_of_scikit_learn() -> None:
    found = check_estimator(DiverseSubset(), expected_failed_checks=EXPECTED, on_fail=None, on_skip=None)
    by_status: dict[str, set[str]] = {}
    for one in found:
        by_status.setdefault(one["status"], set()).add(one["check_name"])
    assert "failed" not in by_status, by_status["failed"]
    assert by_status["xfail"] == EXPECTED.keys()
    assert len(by_status["passed"]) > 30


@pytest.mark.parametrize("objective", ["effective_rank", "logdet"])
def test_is_greedy_select(objective: str) -> None:
    selector = DiverseSubset(20, objective, None, random_state=3)
    chosen = selector.fit_transform(ROWS)
    assert np.array_equal(chosen, ROWS[selector.ranking_]) and len(set(selector.ranking_.tolist())) == 20
    generator = torch.Generator().manual_seed(int(np.random.RandomState(3).randint(2**31)))
    expected = sk.greedy_select(torch.tensor(ROWS), 20, candidates=None, objective=objective, generator=generator)
    assert selector.ranking_.tolist() == expected.indices.tolist()
    assert np.allclose(selector.gains_.cumsum(), expected.objective)
    assert sk.effective_rank(chosen, order=2) > 1.1 * sk.effective_rank(ROWS[:20], order=2)


def test_labels_weights_and_frames() -> None:
    labels, weights = np.arange(200), np.arange(200) / 2
    selector = DiverseSubset(5, random_state=0).fit(ROWS)
    x, y, w = selector.transform(ROWS, labels, weights)
    assert np.array_equal(x, ROWS[y]) and np.array_equal(w, y / 2)
    assert selector.transform(ROWS, sample_weight=weights)[1] is None
    x, y = DiverseSubset(5, random_state=0).fit_transform(ROWS, labels.tolist())
    assert np.array_equal(x, ROWS[y]) and isinstance(y, list)
    pandas: Any = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, columns=list("abcdefgh"))
    assert DiverseSubset(5, random_state=0).fit_transform(frame).index.tolist() == list(y)


def test_in_a_pipeline() -> None:
    chosen = make_pipeline(StandardScaler(), DiverseSubset(7, random_state=0)).fit_transform(ROWS)
    assert chosen.shape == (7, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_samples": 201}, "a minimum of 201 is required"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"objective": "trace"}, "objective must be one of"),
        ({"candidates": 0}, "candidates must be at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiverseSubset(**options).fit(ROWS)
    with pytest.raises(ValueError, match="X has 199 rows, but those of 200 were ranked"):
        DiverseSubset(3).fit(ROWS).transform(ROWS[1:])
