"""What a run's gradients do: embeddings for the band, and their variance with and without in-batch whitening."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import spectral_kernels as sk
from spectral_kernels.theory.gradient_variance import Gradients
from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.loop import Run

STEPS = 50  # the paper's variance is over 50 steps


def draw_views(run: Run, batches: int) -> Iterator[Tensor]:
    """Two augmented views (2B, C, H, W), the first ones first, of `batches` random batches; always the same ones."""
    generator = torch.Generator(run.device).manual_seed(0)
    for _ in range(batches):
        rows = torch.randperm(len(run.pool), generator=generator, device=run.device)[: run.config.train.batch_size]
        yield run.augment(run.pool[rows].repeat(2, 1, 1, 1), generator)


def embed(run: Run, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs (B, dim) of views' projections as a training step would make them; the run is left as it was."""
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    run.model.train()
    with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16, enabled=run.amp):
        pairs = [tuple(run.model(views).float().chunk(2)) for views in draw_views(run, batches)]
    for name, buffer in run.model.named_buffers():
        buffer.copy_(buffers[name])
    return pairs


@dataclass(frozen=True)
class Measured:
    """Variance of the parameters' gradient over 50 batches, and the mean upper bound of an anchor's ‖g‖² (rank 0)."""

    variance: sk.GradientVariance
    upper: float


@dataclass(frozen=True)
class Comparison:
    """At one place: as it is, and whitened."""

    where: str
    step: int
    plain: Measured
    whitened: Measured

    @property
    def ratios(self) -> dict[str, float]:
        """How many times smaller whitening makes: the total variance, the same after scaling both to one mean norm,
        and the upper band.
        """
        plain, whitened = self.plain, self.whitened
        return {
            "total": plain.variance.total / whitened.variance.total,
            "equal_norm": plain.variance.at_equal_norm / whitened.variance.at_equal_norm,
            "band": plain.upper / whitened.upper,
        }


def at_fixed_parameters(run: Run) -> Comparison:
    """The same parameters and the same 50 batches, without and with whitening before the loss."""
    run.model.train()
    whitening = sk.Whitening(run.config.model.dim).to(run.device)
    return Comparison("fixed", run.step, _measured(run, nn.Identity()), _measured(run, whitening))


def _measured(run: Run, module: nn.Module) -> Measured:
    """With a module between the projections and the loss."""
    uppers: list[float] = []

    def loss(model: nn.Module, views: Tensor) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.amp):
            projections = model(views)
        first, second = module(projections.float()).chunk(2)
        uppers.append(_upper(run, first, second))
        return sk.nt_xent(first, second, temperature=run.config.train.temperature)

    variance = sk.gradient_variance(run.model, loss, draw_views(run, STEPS))
    return Measured(variance, sum(uppers) / len(uppers))


class _Window(Callback):
    """Gradients of consecutive steps, while the parameters move."""

    def __init__(self) -> None:
        self.gradients = Gradients()
        self.uppers: list[float] = []

    def step(self, run: Run) -> None:
        assert run.last is not None
        self.gradients.add(p.grad for p in run.model.parameters() if p.grad is not None)
        if len(self.gradients.norms) % 10 == 1:  # the bound is dearer than the step
            self.uppers.append(_upper(run, run.last.first, run.last.second))


def along_training(plain: Run, whitened: Run) -> Comparison:
    """The next 50 steps of two runs that differ in whitening only."""
    measured, step = [], plain.step
    for run in (plain, whitened):
        window = _Window()
        run.advance(run.step + STEPS, [window])
        measured.append(Measured(window.gradients.variance(), sum(window.uppers) / len(window.uppers)))
    return Comparison("along", step, *measured)


def _upper(run: Run, first: Tensor, second: Tensor) -> float:
    temperature = run.config.train.temperature
    return float(sk.gradient_band(first, second, temperature=temperature, loss="nt_xent").batch_upper)
