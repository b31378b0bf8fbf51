"""A diagnosis: its numbers, as a table and as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spectral_kernels.figures import BASELINE, COLOURS, drawing

BATCH = 256
DUPLICATE = 0.98


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Of rows scaled to unit length, but for RankMe.

    Attributes:
        rows, dim, dtype: of the file. zero_rows: rows of length 0, which have no direction.
        spectrum, centred_spectrum: (d,) float64 eigenvalues of the second moment and of the covariance, descending.
        ranks: effective rank by name; those of the centred rows by "centred ...". "RankMe" is that of the raw rows (Garrido
            et al. 2023, equation 1): the exponential of the entropy of their singular values.
        rank_error: jackknife standard error of R₂; of a sample of 4096 and scaled by √(sample/rows) where there are more.
        mean_cosine: ‖mean‖², the mean cosine of two rows drawn with replacement.
        uniformity: ln E e^{−2‖x−y‖²} (Wang & Isola 2020) of two rows of a sample of 4096.
        duplicate_share: share of rows that have another row within cosine 0.98, of `queries` rows drawn, each compared
            with all rows; duplicate_error: its standard error, 0 where all rows were compared.
        batch_ranks, greedy_ranks: mean R₂ of 16 batches of 256 from a sample of 16,384, random and built by Greedy-64;
            None below 512 rows.
        batch_chi2: median χ² of the softmax weights in such random batches at `temperature`, of n = batch - 1 negatives.
    """

    rows: int
    dim: int
    dtype: str
    zero_rows: int
    spectrum: Tensor
    centred_spectrum: Tensor
    ranks: dict[str, float]
    rank_error: float
    mean_cosine: float
    uniformity: float
    duplicate_share: float
    duplicate_error: float
    queries: int
    temperature: float
    batch_ranks: float | None
    greedy_ranks: float | None
    batch_chi2: float | None

    def __repr__(self) -> str:
        return self.table()

    def table(self, name: str = "embeddings") -> str:
        """The diagnosis for a terminal; `repr` gives it too."""
        ranks = self.ranks
        lines = [
            f"{name}: {self.rows:,} rows × {self.dim}, {self.dtype}, {self.zero_rows:,} zero rows",
            "",
            "effective rank           R1        R2      Rinf",
            *(
                f"  {label:<14} {ranks[p + 'R1']:>9.2f} {ranks[p + 'R2']:>9.2f} {ranks[p + 'Rinf']:>9.2f}"
                for label, p in (("as they are", ""), ("centred", "centred "))
            ),
            f"  R2 ± {self.rank_error:.2g} (jackknife); unbiased {ranks['R2 unbiased']:.2f}",
            f"  RankMe of the raw rows   {ranks['RankMe']:.2f}",
            f"mean cosine              {self.mean_cosine:.4f}",
            f"uniformity               {self.uniformity:.3f}",
            f"near-duplicates          {100 * self.duplicate_share:.2f} % have another row within cosine {DUPLICATE}"
            + (f" (± {100 * self.duplicate_error:.2f}, of {self.queries} rows drawn)" if self.duplicate_error else ""),
        ]
        if self.batch_ranks is not None and self.greedy_ranks is not None and self.batch_chi2 is not None:
            share = self.batch_chi2 / (BATCH - 2)
            lines += [
                f"batches of {BATCH}           R2 {self.batch_ranks:.1f} random, {self.greedy_ranks:.1f} by Greedy-64",
                f"softmax at τ = {self.temperature:g}       χ² {self.batch_chi2:.3g}, {100 * share:.1f} % of one-hot",
            ]
        return "\n".join(lines)

    def plot(self, path: str | Path, name: str = "embeddings") -> Path:
        """Draw both spectra; returns the picture's path.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with drawing(path) as pyplot:
            figure, axis = pyplot.subplots(figsize=(6.4, 3.8))
            k = range(1, self.dim + 1)
            curves: list[tuple[Any, str, str, str]] = [
                (self.spectrum, "-", COLOURS[0], f"as they are, R₂ = {self.ranks['R2']:.1f}"),
                (self.centred_spectrum, "--", COLOURS[1], f"centred, R₂ = {self.ranks['centred R2']:.1f}"),
            ]
            for values, style, colour, label in curves:
                share = values / values.sum().clamp(min=1e-300)
                axis.plot(k, share.clamp(min=1e-12).tolist(), style, color=colour, label=label)
            axis.axhline(1 / self.dim, color=BASELINE, lw=0.8, ls=":", label="isotropic")
            axis.set(xscale="log", yscale="log", xlabel="k", ylabel="λₖ / Σλ")
            axis.legend()
            figure.suptitle(f"{name}: {self.rows:,} rows × {self.dim}", x=0.01, ha="left")
        return path
