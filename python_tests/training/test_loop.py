"""The training loop: it learns, it is deterministic, and a run that stopped goes on bit for bit."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from torch.nn import functional
from training_helpers import assert_goes_on, blobs, settings, state_of

from spectral_kernels.training.callbacks import Callback
from spectral_kernels.training.clock import PARTS
from spectral_kernels.training.config import OptimizerConfig
from spectral_kernels.training.data import load
from spectral_kernels.training.loop import Run, train
from spectral_kernels.training.run_state import STEP_COLUMNS
from spectral_kernels.training.samplers import derive_seed
from spectral_kernels.training.settings import read_config
from spectral_kernels.training.simclr import Diverged, SimCLR, forward_loss, learning_rate, make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:the memory bank is cold")
STRATEGIES = ["random", "pool-balanced", "greedy-4"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_is_bit_identical(strategy: str, optimizer: str, tmp_path: Path) -> None:
    """Six steps at once, against three, a kill one step later, and the rest."""
    config = settings(selection={"strategy": strategy}, optimizer={"name": optimizer, "lr": 0.02})
    whole = assert_goes_on(config, 4, tmp_path)
    assert [row["step"] for row in whole.evaluations] == [0, 3, 6]
    if strategy != "random":
        assert any(row[STEP_COLUMNS.index("chosen")] for row in whole.steps)


@pytest.mark.parametrize("strategy", ["greedy-4", "pool-low"])
def test_resume_without_replacement(strategy: str, tmp_path: Path) -> None:
    """Later batches of an epoch depend on what earlier ones took; the second half ends an epoch of 10."""
    selection = {"strategy": strategy, "replacement": False}
    config = settings(selection=selection, train={"steps": 13, "checkpoint_every": 7}, evaluate={"every": 100})
    assert_goes_on(config, 9, tmp_path)


@pytest.mark.parametrize("strategy", ["random", "greedy-4"])
def test_resume_of_moco(strategy: str, tmp_path: Path) -> None:
    config = settings(train={"method": "moco"}, moco={"queue": 37, "momentum": 0.9}, selection={"strategy": strategy})
    assert int(assert_goes_on(config, 4, tmp_path).model.cursor) > 0


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_accumulated_gradients_are_the_parts_mean(method: str) -> None:
    """By hand, from the same images, augmentations and parameters; MoCo's keys follow once a step."""
    config = settings(train={"method": method, "amp": False, "accumulate": 4}, moco={"queue": 64})
    run, same = Run(config, blobs()), Run(config, blobs())
    run.model.load_state_dict(same.model.state_dict())
    run.advance(1)
    indices = torch.tensor(next(same._batches))
    same.model.train()
    losses, rows = [], []
    for place, part in enumerate(indices.split(8)):
        views = same.augment(same.pool[part].repeat(2, 1, 1, 1), same.generator)
        found = same._losses(views, place == 0)
        (found.loss / 4).backward()
        losses.append(found.loss.item())
        rows.append(found.embeddings)
    for mine, expected in zip(run.model.parameters(), same.model.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(mine.grad, expected.grad, rtol=0, atol=0)
        else:
            assert torch.equal(mine, expected)
    assert run.steps[0][0] == pytest.approx(sum(losses) / 4)
    assert run.last is not None
    assert torch.equal(run.last.embeddings, torch.cat(rows))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_compiled_encoder(method: str, tmp_path: Path) -> None:
    """The same losses up to rounding, and checkpoints that fit a run which is not compiled."""
    options = {"method": method, "amp": False, "steps": 4}
    plain, compiled = (
        train(settings(train={**options, "compile": value}, moco={"queue": 32}), blobs(), tmp_path / str(value))
        for value in (False, True)
    )
    for one, other in zip(plain.steps, compiled.steps, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-3)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_overlapped_selection(strategy: str, tmp_path: Path) -> None:
    """Resumed bit by bit; chosen from the bank of one step before; random batches are those without overlap."""
    steps = {"steps": 8, "checkpoint_every": 3}
    whole = assert_goes_on(settings(selection={"strategy": strategy, "overlap": True}, train=steps), 5, tmp_path)
    plain = train(settings(selection={"strategy": strategy}, train=steps), blobs())
    losses = [[row[0] for row in run.steps] for run in (whole, plain)]
    assert (losses[0] == losses[1]) == (strategy == "random")
    chosen = STEP_COLUMNS.index("chosen")
    # warm one step later
    assert sum(row[chosen] for row in plain.steps) - sum(row[chosen] for row in whole.steps) == (strategy != "random")


def test_same_seed_same_run_and_other_seed_another() -> None:
    data, config = blobs(), settings(selection={"strategy": "greedy-4"})
    first, second = train(config, data), train(config, data)
    assert_same(state_of(first), state_of(second))
    other = train(replace(config, train=replace(config.train, seed=1)), data)
    assert first.steps[0][0] != other.steps[0][0]


def test_strategies_share_start_and_augmentations() -> None:
    """Until the bank is warm nothing differs; afterwards the augmentation stream still is the same."""
    data = blobs()
    runs = [train(settings(selection={"strategy": name}), data) for name in STRATEGIES]
    assert len({run.steps[0][0] for run in runs}) == 1
    for run in runs[1:]:
        assert run.evaluations[0] == runs[0].evaluations[0] | {"seconds": 0.0}
        assert torch.equal(run.generator.get_state(), runs[0].generator.get_state())


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train(settings(selection={"strategy": "greedy-4"}), blobs())
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_learns() -> None:
    """On scans of digits, in a second: far better features than the untrained encoder's."""
    pytest.importorskip("sklearn")
    words = ["train.steps=60", "train.seed=1", "evaluate.every=60", "evaluate.train_images=null"]
    config = read_config("tiny", [*words, "model.width=16", "model.dim=32", "model.hidden=64"])
    run = train(config, load("digits"))
    untrained, trained = run.evaluations
    assert trained["linear"] > untrained["linear"] + 0.04
    assert trained["knn200"] > untrained["knn200"] + 0.08
    assert run.steps[-1][0] < run.steps[0][0] - 1


def test_record() -> None:
    run = train(settings(selection={"strategy": "greedy-4"}), blobs())
    assert len(run.steps) == run.step == 6
    rows = [dict(zip(STEP_COLUMNS, row, strict=True)) for row in run.steps]
    assert [math.isnan(row["effective_rank"]) for row in rows] == [False, True] * 3
    assert all(1 <= row["effective_rank"] <= 8 for row in rows[::2])
    assert all(row[part] > 0 for row in rows for part in PARTS)
    assert run.elapsed == pytest.approx(sum(row[part] for row in rows for part in PARTS))
    assert run.evaluations[-1]["seconds"] == pytest.approx(run.elapsed)
    assert run.progress == 1


def test_evaluation_is_off_the_clock() -> None:
    run = Run(settings(), blobs())
    run.turn()
    assert run.elapsed == 0
    run.turn()
    before = run.elapsed
    run.evaluate()
    run.warm_up()
    assert run.elapsed == before


def test_warm_up_changes_nothing() -> None:
    data = blobs()
    left, right = Run(settings(), data), Run(settings(), data)
    left.warm_up()
    assert_same(state_of(left), state_of(right))


def test_budget_in_seconds() -> None:
    run = train(settings(train={"steps": None, "seconds": 0.4}, evaluate={"every": 5}), blobs())
    assert run.finished
    assert run.elapsed >= 0.4
    assert run.elapsed - sum(run.steps[-1][-3:]) < 0.4
    assert run.evaluations[-1]["step"] == run.step


def test_bank_holds_the_mean_of_both_views() -> None:
    model = SimCLR(settings().model, 1)
    views = torch.randn(16, 1, 8, 8)
    loss, _, _, embeddings = forward_loss(model, views, 0.2, amp=False)
    first, second = functional.normalize(model(views), dim=1).chunk(2)
    assert torch.allclose(embeddings, functional.normalize(first + second, dim=1), atol=1e-5)
    assert not embeddings.requires_grad
    logits = torch.cat([first, second]) @ torch.cat([first, second]).T / 0.2
    logits.fill_diagonal_(-torch.inf)
    expected = functional.cross_entropy(logits, (torch.arange(16) + 8) % 16)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_schedule() -> None:
    config = OptimizerConfig(lr=2.0, warmup=0.25)
    for progress, rate in ((0.125, 1.0), (0.25, 2.0), (0.625, 1.0), (1.0, 0.0)):
        assert learning_rate(progress, config) == pytest.approx(rate)
    assert learning_rate(0.0, replace(config, warmup=0.0)) == 2.0


def test_no_decay_on_biases_and_normalisation() -> None:
    optimizer = make_optimizer(SimCLR(settings().model, 1), OptimizerConfig(weight_decay=0.1))
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], {p.ndim for p in decayed["params"]}) == (0.1, {2, 4})
    assert (free["weight_decay"], {p.ndim for p in free["params"]}) == (0, {1})


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(seed, purpose) for seed in range(20) for purpose in ("model", "augment", "sampler")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- what must not go wrong silently


def test_divergence_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    data, config = blobs(), settings()

    class Poison(Callback):
        def step(self, run: Run) -> None:
            if run.step == 4:
                with torch.no_grad():
                    next(run.model.parameters()).fill_(torch.nan)

    with pytest.raises(Diverged, match=r"training diverged at step 4: a projection is NaN or Inf; .*last\.ckpt"):
        train(config, data, tmp_path, [Poison()])
    kept = Run(config, data, tmp_path)
    assert kept.step == 3
    with pytest.raises(Diverged, match=r"last\.ckpt, and goes on to the same end with the same settings\. Try a sm"):
        train(config, data, tmp_path, [Poison()])
    with pytest.raises(Diverged, match=r"projection is NaN or Inf; try a smaller optimizer\.lr"):
        train(config, data, None, [Poison()])
    assert all(parameter.isfinite().all() for parameter in kept.model.parameters())


def test_a_poisoned_state_is_not_saved(tmp_path: Path) -> None:
    run = Run(settings(), blobs(), tmp_path)
    run.save()
    before = (tmp_path / "last.ckpt").read_bytes()
    with torch.no_grad():
        next(run.model.parameters())[0] = torch.inf
    with pytest.raises(Diverged, match="a parameter is NaN or Inf"):
        run.save()
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"train\.device is 'cuda', but PyTorch sees no CUDA device"):
        Run(settings(train={"device": "cuda"}), blobs())
