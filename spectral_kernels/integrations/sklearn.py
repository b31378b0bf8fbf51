"""A diverse subset of rows as a selector with scikit-learn's interface, which this module imports."""

from typing import Any

import numpy
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import TransformerTags, _safe_indexing, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from spectral_kernels import checks
from spectral_kernels.ops.greedy import greedy_select


class DiverseSubset(BaseEstimator):  # type: ignore[misc]
    """Choose rows that are as diverse as may be: `sk.greedy_select`, with `fit` and `transform` as apricot's selectors have.

    It chooses rows and leaves columns as they are: other than a transformer's, its output has n_samples rows, whatever y is,
    so that in a pipeline only what needs no y may follow.

    Args:
        n_samples: rows to choose.
        objective: `"effective_rank"` (order 2) or `"logdet"`, of the L2-normalised rows.
        candidates: random rows looked at for each pick; None looks at all.
        random_state: None, a seed, or a numpy RandomState.

    Attributes:
        ranking_: (n_samples,) int64, the rows chosen, in the order of choice.
        gains_: (n_samples,) float, what each pick added to the objective.
        n_features_in_, feature_names_in_: as of any estimator of scikit-learn.
    """

    def __init__(
        self,
        n_samples: int = 10,
        objective: str = "effective_rank",
        candidates: int | None = 64,
        random_state: Any = None,
    ) -> None:
        self.n_samples = n_samples
        self.objective = objective
        self.candidates = candidates
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "DiverseSubset":
        """Choose rows of X (n, d); y is not looked at.

        Raises:
            ValueError: fewer rows than n_samples, NaN or Inf, an argument out of range.
        """
        k = checks.integer(self.n_samples, "n_samples", 1)
        kinds = [numpy.float64, numpy.float32, numpy.float16]
        z = torch.tensor(validate_data(self, X, dtype=kinds, ensure_min_samples=k))
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31)))
        chosen = greedy_select(z, k, candidates=self.candidates, objective=self.objective, generator=generator)
        self.ranking_, self._rows = chosen.indices.numpy(), len(z)
        self.gains_ = numpy.diff(chosen.objective.numpy(), prepend=0)
        return self

    def transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """The chosen rows of X, which must have as many rows as that of `fit`, in the order of choice.

        Returns:
            (n_samples, d), a DataFrame where X is one; with y or sample_weight a tuple as apricot's, (X, y) or (X, y,
            sample_weight), in which y is None where it was not given.

        Raises:
            ValueError: other rows or features than `fit` had.
        """
        check_is_fitted(self)
        found = validate_data(self, X, dtype=None, reset=False)
        if len(found) != self._rows:
            raise ValueError(f"X has {len(found)} rows, but those of {self._rows} were ranked")
        rows = self.ranking_
        chosen = [X.iloc[rows] if hasattr(X, "iloc") else found[rows]]
        if y is None and sample_weight is None:
            return chosen[0]
        chosen.append(None if y is None else _safe_indexing(y, rows))
        if sample_weight is not None:
            chosen.append(_safe_indexing(sample_weight, rows))
        return tuple(chosen)

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, then `transform`."""
        return self.fit(X, y).transform(X, y, sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags(preserves_dtype=["float64", "float32", "float16"])
        return tags
