"""What the batches of a training run look like to the loss, written down while it trains."""

import importlib
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spectral_kernels import checks
from spectral_kernels.monitor.log import COLUMNS, Log
from spectral_kernels.monitor.signatures import RECENT, SIGNATURES, exploding_variance
from spectral_kernels.ops.effective_rank import effective_rank, rank_of_spectrum
from spectral_kernels.ops.effective_rank.error import effective_rank_error
from spectral_kernels.ops.infonce import info_nce_grad_norms
from spectral_kernels.ops.infonce.arguments import LOSSES
from spectral_kernels.ops.spectrum import spectrum
from spectral_kernels.selection import MemoryBank
from spectral_kernels.theory.band import gradient_band

DUPLICATE = 0.98


class SpectrumWarning(UserWarning):
    """A failure signature, with the numbers behind it and what to try; or what could not be observed, and why."""


class SpectrumMonitor:
    """Measures a training run's batches every now and then; costs no more than a share of its time.

    Call `observe` after every step. A measurement reads the embeddings and never changes them, draws no random number,
    and is appended to a CSV at once. Failure signatures (collapse, redundant negatives, flat softmax, one-hot softmax,
    exploding variance) are `SpectrumWarning`s, each given again only after it had gone.

    Watching never ends the run: what cannot be observed (a loss or a norm that is no finite number, pairs of rows with
    NaN or Inf, a batch that the loss itself would refuse, a full disk) is left out, counted in `skipped`, and warned of
    once for each kind. In the CSV it is nan.

    Args:
        path: of the CSV; its spectra go to `<stem>_spectrum.csv` beside it. An existing file is continued: its
            rows from the first observed step on are dropped.
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
        skipped: how often something was left out, by what it was: "loss", "gradient_norm", "rows" (steps with such rows),
            "measurement", "bank", "window", "step", "file", "tensorboard", "embeddings" (of the Lightning callback), or a
            column that was not finite. Their sum is the column "skipped".

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
        self._log = Log(self.path)
        self.temperature = checks.positive(temperature, "temperature")
        self.loss = checks.one_of(loss, "loss", LOSSES)
        self.every = None if every is None else checks.integer(every, "every", 1)
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1, got {budget!r}")
        self.budget = budget
        self.rank, self.anchors = checks.integer(rank, "rank", 0), checks.integer(anchors, "anchors", 2)
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.skipped: dict[str, int] = {}
        self._norms: list[float] = []
        self._active: set[str] = set()
        self._began: float | None = None
        self._first = 0
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
            bank: its age is noted. window: the pool selector's, noted.

        Returns:
            The measurement, or None where the step was not due.
        """
        now = time.perf_counter()
        try:
            step = int(step)
        except Exception as error:  # of any type
            self.skip("step", f"step must be an integer, got {type(step).__name__}: {_first_line(error)}")
            return None
        if self._began is None:
            self._began, self._first = now, step
            self._to_file(lambda: self._log.open(step))
        norm = self._number(gradient_norm, "gradient_norm")
        if not math.isnan(norm):
            self._norms = [*self._norms[-6 * RECENT :], norm]
        if not self._due(step, now - self._began):
            return None
        try:
            record = self._measure(query, key, queue)
        except Exception as error:  # of whatever kind: the run is not to end by being watched
            self.skip("measurement", f"step {step} is not measured: {_first_line(error)}")
            record = None
        if record is not None:
            record |= {"step": step, "seconds": now - self._began, "gradient_norm": norm}
            record |= {"loss": self._number(value, "loss"), **self._surroundings(bank, window)}
            record["skipped"] = sum(self.skipped.values())
            record["warnings"] = "; ".join(self._warn(record))
            self.records.append(record)
            self._write(record)
        took = time.perf_counter() - now
        self.seconds += took
        self._dearest = max(0.9 * self._dearest, took)
        return record

    def skip(self, what: str, why: str) -> None:
        """Count what could not be observed, and warn of the first of its kind."""
        self.skipped[what] = self.skipped.get(what, 0) + 1
        if self.skipped[what] == 1:
            text = f"{why}. The run goes on; this is said once and counted in `skipped`"
            warnings.warn(text, SpectrumWarning, stacklevel=4)

    def _number(self, value: Any, what: str) -> float:
        """A finite number, or nan, counted where something else was given."""
        if value is None:
            return math.nan
        try:
            number = float(value)
        except Exception as error:  # of any type
            self.skip(what, f"{what} must be a number, got {type(value).__name__}: {_first_line(error)}")
            return math.nan
        if not math.isfinite(number):
            self.skip(what, f"{what} is {number}, which is left out")
            return math.nan
        return number

    def _surroundings(self, bank: Any, window: Any) -> dict[str, float]:
        found = dict.fromkeys(("bank_age", "bank_seen", "window_low", "window_high"), math.nan)
        if bank is not None:
            try:
                staleness = bank.staleness()
                found |= {"bank_age": float(staleness.mean_age), "bank_seen": float(staleness.seen)}
            except Exception as error:
                self.skip("bank", f"bank must be a MemoryBank, got {type(bank).__name__}: {_first_line(error)}")
        if window is not None:
            try:
                low, high = window
                found |= {"window_low": self._number(low, "window"), "window_high": self._number(high, "window")}
            except Exception as error:
                self.skip(
                    "window", f"window must be a pair of numbers, got {type(window).__name__}: {_first_line(error)}"
                )
        return found

    def _due(self, step: int, elapsed: float) -> bool:
        if self.every is not None:
            return step % self.every == 0
        # one that costs as much as the dearest of late must still fit
        return not self.seconds or self.seconds + self._dearest <= self.budget * elapsed

    def _rows(self, query: Tensor, key: Tensor, queue: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What there is to measure: some anchors, on one device and in one dtype, without pairs that hold NaN or Inf."""
        query, key = checks.floating(query, "query", ndim=2), checks.floating(key, "key", ndim=2)
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
        if queue is not None:
            queue = checks.floating(queue, "queue", ndim=2)
            dtype = torch.promote_types(dtype, queue.dtype)

        # the band is computed in float64, which MPS has not
        place = query.device if query.device.type != "mps" else torch.device("cpu")

        def read(part: Tensor) -> Tensor:
            wide = part.detach().to(place, dtype)
            # only directions are measured, and the squares of large numbers would overflow
            return wide / wide.abs().amax(1, keepdim=True).clamp_min(1)

        first, second = read(query[: self.anchors]), read(key[: self.anchors])
        rest = None if queue is None else read(queue)
        if first.shape != second.shape:
            raise ValueError(f"query is {tuple(query.shape)}, but key is {tuple(key.shape)}")
        finite = first.isfinite().all(1) & second.isfinite().all(1)
        seen = None if rest is None else rest.isfinite().all(1)
        bad = int((~finite).sum()) + (0 if seen is None else int((~seen).sum()))
        if bad:
            self.skip("rows", f"{bad} of the rows hold NaN or Inf and are left out")
            # on a GPU a kernel that read them would raise it later, in the run
            first, second = first[finite], second[finite]
            rest = None if rest is None or seen is None else rest[seen]
        if len(first) < 2 or (rest is not None and len(rest) == 0):
            raise ValueError(f"a measurement needs 2 pairs of finite rows and a negative, got {len(first)} pairs")
        return first, second, rest

    @torch.no_grad()
    def _measure(self, query: Tensor, key: Tensor, queue: Tensor | None) -> dict[str, Any]:
        query, key, queue = self._rows(query, key, queue)
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
        wide = unit.double()
        record: dict[str, Any] = {
            "effective_rank": float(effective_rank(key, order=2)),
            "effective_rank_error": float(effective_rank_error(key)),
            "centred_rank": float(effective_rank(key, order=2, center=True)),
            "rank1": float(rank_of_spectrum(values, 1)),
            "rank_inf": float(rank_of_spectrum(values, math.inf)),
            "spread": float(wide.square().sum(1).mean() - wide.mean(0).square().sum()),
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
        return {name: n if isinstance(n, int) else self._number(n, name) for name, n in record.items()}

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

    def _to_file(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:  # no space, no permission, another file in its place
            self.skip("file", f"{self.path} cannot be written: {_first_line(error)}")

    def _write(self, record: dict[str, Any]) -> None:
        values = self._spectrum.tolist()

        def write() -> None:
            self._log.open(self._first)
            self._log.append(record, values)

        self._to_file(write)
        if self._writer is None:
            return
        try:
            for name in COLUMNS:
                if isinstance(record[name], float) and math.isfinite(record[name]):
                    self._writer.add_scalar(f"spectrum/{name}", record[name], record["step"])
            self._writer.flush()
        except Exception as error:  # of its thread that writes
            self.skip("tensorboard", f"the event file cannot be written: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _tensorboard(folder: str | Path) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
    except ImportError:
        return None
