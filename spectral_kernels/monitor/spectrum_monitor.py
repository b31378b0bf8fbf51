"""What the batches of a training run look like to the loss, written down while it trains."""

import csv
import importlib
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spectral_kernels import checks
from spectral_kernels.monitor.signatures import RECENT, SIGNATURES, exploding_variance
from spectral_kernels.ops.effective_rank import effective_rank, rank_of_spectrum
from spectral_kernels.ops.effective_rank.error import effective_rank_error
from spectral_kernels.ops.infonce import LOSSES, info_nce_grad_norms
from spectral_kernels.ops.spectrum import spectrum
from spectral_kernels.selection import MemoryBank
from spectral_kernels.theory.band import gradient_band

COLUMNS = (
    "step", "seconds", "loss", "gradient_norm", "effective_rank", "effective_rank_error", "centred_rank", "rank1",
    "rank_inf", "spread", "alignment", "uniformity", "negative_mass", "chi2", "negatives", "duplicate_share", "lower",
    "norm", "upper", "bank_age", "bank_seen", "window_low", "window_high", "warnings",
)  # fmt: skip
DUPLICATE = 0.98


def spectrum_path(path: Path) -> Path:
    """Where the spectra of the monitor of `path` go."""
    return path.with_name(f"{path.stem}_spectrum.csv")


class SpectrumWarning(UserWarning):
    """A failure signature, with the numbers behind it and what to try."""


class SpectrumMonitor:
    """Measures a training run's batches every now and then; costs no more than a share of its time.

    Call `observe` after every step. A measurement reads the embeddings and never changes them, draws no random number,
    and is appended to a CSV at once. Failure signatures (collapse, redundant negatives, flat softmax, one-hot softmax,
    exploding variance) are `SpectrumWarning`s, each given again only after it had gone.

    Args:
        path: of the CSV; its spectra go to `<stem>_spectrum.csv` beside it. A file that is there is gone on with: rows
            of steps not before the first one observed are dropped.
        temperature: τ of the loss.
        loss: `"info_nce"` or `"nt_xent"`.
        every: steps between measurements; None: as often as `budget` allows.
        budget: share of the wall-clock since the first step that measurements may take, with `every=None`.
        rank: of the gradient band.
        anchors: of a larger batch the first ones are looked at, as a batch of their own.
        tensorboard: folder of an event file, written if the package tensorboard is installed.

    Attributes:
        records: the measurements of this process, dicts by `COLUMNS`.
        seconds: time spent measuring.

    Raises:
        ValueError: bad argument, or a file at `path` that is no monitor's.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        temperature: float,
        loss: str = "nt_xent",
        every: int | None = None,
        budget: float = 0.01,
        rank: int = 0,
        anchors: int = 256,
        tensorboard: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.spectra_path = spectrum_path(self.path)
        self.temperature = checks.positive(temperature, "temperature")
        self.loss = checks.one_of(loss, "loss", LOSSES)
        self.every = None if every is None else checks.integer(every, "every", 1)
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1, got {budget!r}")
        self.budget = budget
        self.rank, self.anchors = checks.integer(rank, "rank", 0), checks.integer(anchors, "anchors", 2)
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._norms: list[float] = []
        self._active: set[str] = set()
        self._began: float | None = None
        self._dearest = 0.0
        self._writer = None if tensorboard is None else _tensorboard(tensorboard)

    def observe(
        self,
        step: int,
        query: Tensor,
        key: Tensor,
        *,
        queue: Tensor | None = None,
        value: float | None = None,
        gradient_norm: float | None = None,
        bank: MemoryBank | None = None,
        window: tuple[float, float] | None = None,
    ) -> dict[str, Any] | None:
        """Note a step, and measure it if it is due.

        Args:
            step: number of the step, rising.
            query, key, queue: the embeddings as the loss was given them: (B, d), (B, d), (K, d) or None.
            value: of the loss.
            gradient_norm: of the parameters' gradient; every step's is used, due or not.
            bank: its age is noted. window: the selector's, noted.

        Returns:
            The measurement, or None where the step was not due.
        """
        now = time.perf_counter()
        if self._began is None:
            self._began = now
            self._open(step)
        if gradient_norm is not None:
            self._norms = [*self._norms[-6 * RECENT :], float(gradient_norm)]
        if not self._due(step, now - self._began):
            return None
        record = self._measure(query.detach(), key.detach(), None if queue is None else queue.detach())
        staleness = None if bank is None else bank.staleness()
        record |= {
            "step": step,
            "seconds": now - self._began,
            "loss": math.nan if value is None else float(value),
            "gradient_norm": math.nan if gradient_norm is None else float(gradient_norm),
            "bank_age": math.nan if staleness is None else staleness.mean_age,
            "bank_seen": math.nan if staleness is None else staleness.seen,
            "window_low": math.nan if window is None else float(window[0]),
            "window_high": math.nan if window is None else float(window[1]),
        }
        record["warnings"] = "; ".join(self._warn(record))
        self._write(record)
        self.records.append(record)
        took = time.perf_counter() - now
        self.seconds += took
        self._dearest = max(0.9 * self._dearest, took)
        return record

    def _due(self, step: int, elapsed: float) -> bool:
        if self.every is not None:
            return step % self.every == 0
        # one that costs as much as the dearest of late must still fit
        return not self.records or self.seconds + self._dearest <= self.budget * elapsed

    def _measure(self, query: Tensor, key: Tensor, queue: Tensor | None) -> dict[str, Any]:
        query, key = query[: self.anchors], key[: self.anchors]
        rank = min(self.rank, query.shape[1])
        where = {"queue": queue, "temperature": self.temperature, "loss": self.loss}
        band = gradient_band(query, key, rank=rank, **where)  # type: ignore[arg-type]
        norms = info_nce_grad_norms(query, key, **where)  # type: ignore[arg-type]
        rows = torch.cat([query, key]).float()
        values = spectrum(key, center=False).double()
        unit = normalize(key.float(), dim=1)
        similar = unit @ unit.mT
        similar.fill_diagonal_(-1)
        distances = torch.pdist(normalize(rows, dim=1)).square()
        self._spectrum = values / values.sum().clamp(min=1e-300)
        return {
            "effective_rank": float(effective_rank(key, order=2)),
            "effective_rank_error": float(effective_rank_error(key)),
            "centred_rank": float(effective_rank(key, order=2, center=True)),
            "rank1": float(rank_of_spectrum(values, 1)),
            "rank_inf": float(rank_of_spectrum(values, math.inf)),
            "spread": float(1 - unit.double().mean(0).square().sum()),
            "alignment": float(band.alignment.mean()),
            "uniformity": float(distances.mul(-2).exp().mean().log()),
            "negative_mass": float(band.negative_mass.mean()),
            "chi2": float(band.chi2.median()),
            "negatives": band.negatives,
            "duplicate_share": float((similar.amax(1) > DUPLICATE).float().mean()),
            "lower": float(band.batch_lower),
            "norm": float(norms.double().mean()),
            "upper": float(band.batch_upper),
        }

    def _warn(self, record: dict[str, Any]) -> list[str]:
        history = [*self.records[-3:], record]
        found = {name: signature(history) for name, signature in SIGNATURES.items()}
        found["exploding variance"] = exploding_variance(self._norms)
        present = {name for name, text in found.items() if text is not None}
        for name in sorted(present - self._active):
            warnings.warn(f"step {record['step']}: {found[name]}", SpectrumWarning, stacklevel=4)
        self._active = present
        return sorted(present)

    # --- files

    def _open(self, first: int) -> None:
        """Keep what a stopped run wrote of the steps before this one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, header in ((self.path, list(COLUMNS)), (self.spectra_path, None)):
            kept: list[list[str]] = []
            if path.exists():
                with path.open(newline="") as file:
                    rows = list(csv.reader(file))
                if rows and (rows[0] != header if header else rows[0][:1] != ["step"]):
                    raise ValueError(f"{path} is no monitor's file: its first line is {','.join(rows[0])[:60]!r}")
                # a run that was killed may have left half a line
                kept = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) < first]
                header = rows[0] if rows else header
            temporary = path.with_name(f".{path.name}.tmp")
            with temporary.open("w", newline="") as file:
                if header:
                    csv.writer(file, lineterminator="\n").writerows([header, *kept])
            temporary.replace(path)

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([_text(record[name]) for name in COLUMNS])
        values = self._spectrum.tolist()
        with self.spectra_path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(["step", *(f"p{i + 1}" for i in range(len(values)))])
            writer.writerow([record["step"], *(f"{value:.6g}" for value in values)])
        if self._writer is not None:
            for name in COLUMNS:
                if isinstance(record[name], float) and math.isfinite(record[name]):
                    self._writer.add_scalar(f"spectrum/{name}", record[name], record["step"])
            self._writer.flush()


def _text(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _tensorboard(folder: str | Path) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
    except ImportError:
        return None
