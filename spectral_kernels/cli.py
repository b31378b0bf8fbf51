"""The command line, `spectral-kernels`."""

import argparse
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import spectral_kernels
from spectral_kernels import plots
from spectral_kernels.commands import band, inspect, order, variance
from spectral_kernels.figures import drawn
from spectral_kernels.files import lock
from spectral_kernels.files.reading import printable, shown
from spectral_kernels.files.writing import sweep
from spectral_kernels.monitor import plots as monitor_plots
from spectral_kernels.monitor.log import spectrum_path
from spectral_kernels.training import report
from spectral_kernels.training.checkpoint import CheckpointError
from spectral_kernels.training.compare import Comparison, run_record
from spectral_kernels.training.config import Config
from spectral_kernels.training.data import ImageData, load
from spectral_kernels.training.loop import train
from spectral_kernels.training.monitoring import Monitored
from spectral_kernels.training.progress import Progress
from spectral_kernels.training.settings import named_configs, read_config
from spectral_kernels.training.simclr import Diverged
from spectral_kernels.training.termination import Terminated, stopped_by_sigterm

DESCRIPTION = """\
Measure and steer the diversity (the effective rank) of the batches of contrastive learning.

Chosen batches may teach an encoder faster than random ones. This command trains SimCLR with
either and says what choosing gained and cost on your machine.
"""
EPILOG = """\
examples:
  spectral-kernels info                     what is installed, and what each operation would use
  spectral-kernels compare                  three strategies on Fashion-MNIST, in minutes
  spectral-kernels compare train.steps=200  the same, shorter
  spectral-kernels train --config fashion_mnist selection.strategy=random
  spectral-kernels inspect z.npy            what embeddings are like, duplicates, a diverse subset
  spectral-kernels order z.npy --batch-size 256   diverse batches of an epoch, for any loader
  spectral-kernels bench                    time the operations (from a source tree)

`spectral-kernels COMMAND --help` says more. The package itself is used from Python:
import spectral_kernels as sk.
"""
CONFIG_HELP = """\
Configs that come with the package:
  {names}
or name a YAML file.
Every setting can be changed by its dotted name (spectral_kernels/training/config.py says what
they mean):
  train.steps=500 train.seed=3 optimizer.lr=0.1 data.long_tail=100
  "compare.strategies=[random, greedy-16]"
"""
TRAIN_HELP = """\
Train SimCLR with one selection strategy. Writes last.ckpt, results.csv, steps.csv, and what the
SpectrumMonitor saw (monitor.csv, monitor_spectrum.csv, monitor.png); the same command goes on where
it was stopped. Exit status: 1 after an error, 130 after Ctrl-C, 143 after SIGTERM (it saves first).

selection.strategy is one of
  random               shuffled epochs
  pool-low, pool-balanced, pool-high, pool-0.25
                       of selection.draws random batches the one with that effective rank
  pool-low+window      of those inside selection.window=[low, high] first; any pool-… does
  greedy-64            built row by row, each the best of 64 random candidates; any number does
  greedy-all           the same, among all rows
  ...+whiten           any of them, the batch whitened before the loss
"""
COMPARE_HELP = """\
Train SimCLR with several selection strategies and seeds on one budget, and report
  - final accuracy: linear probe and kNN on frozen features, the untrained encoder's beside;
  - seconds and steps to the accuracy that random batches reach at a share of the budget;
  - the effective rank of the batches, and the time that selection costs.
Evaluation is off the clock. Writes results.csv, steps.csv, summary.json and comparison.png. The
same command goes on where it was stopped, and prints a finished comparison again.
"""


LONGEST = 1000  # characters of an error
# what torch says where memory cannot be had, which is no error of a kind of its own on the CPU
NO_MEMORY = re.compile("allocate memory|out of memory|[Ss]torage size calculation overflow|numel.*overflow", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments:  # argparse gives up on those that follow an option
        arguments.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if "handed_on" in arguments:
        arguments.handed_on, rest = rest, []
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments) or 0)
    except Terminated as stopped:
        print(f"spectral-kernels: {stopped}; the same command goes on from there", file=sys.stderr)
        return 128 + signal.SIGTERM  # not 0: what follows `&&` is to wait for the rest
    except KeyboardInterrupt:
        print(
            "spectral-kernels: interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
        return 1
    except (ValueError, OSError, ImportError, spectral_kernels.BackendError, Diverged) as error:
        return _failed(arguments, str(error), error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        return _failed(arguments, f"not enough memory for these settings: {error}", error)


def _failed(arguments: argparse.Namespace, reason: str, error: Exception) -> int:
    if arguments.debug:
        raise error
    text = " ".join(reason.split())
    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    print(f"spectral-kernels: error: {printable(text)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("spectral-kernels", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"spectral_kernels {spectral_kernels.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str, description: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=description, formatter_class=raw)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        return command

    command = add("train", _train, "train SimCLR with one selection strategy", TRAIN_HELP)
    command.add_argument("--no-monitor", dest="monitor", action="store_false", help="no diagnostics (monitor.csv)")
    _add_run_arguments(command)
    _add_run_arguments(add("compare", _compare, "compare selection strategies on one budget", COMPARE_HELP))
    _add_run_arguments(add("band", _band, "bounds of the gradient against measured gradients", band.HELP))
    text = "variance of the gradient, with and without in-batch whitening"
    _add_run_arguments(add("variance", _variance, text, variance.HELP))
    command = add("inspect", _inspect, "diagnose embeddings from a file", inspect.HELP)
    command.add_argument("file", type=Path, metavar="FILE", help="of embeddings (see above)")
    command.add_argument("--key", metavar="NAME", help="which tensor of a file, or column of a table")
    command.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where to write (default: here)")
    command.add_argument("--subset", type=int, metavar="K", help="write the row numbers of a diverse subset of K rows")
    text = "list near-duplicates of at least this cosine among up to 200,000 rows (default: 0.98, among 20,000)"
    command.add_argument("--duplicates", type=float, metavar="COSINE", help=text)
    command.add_argument("--temperature", type=float, default=0.1, metavar="τ", help="of the softmax (default: 0.1)")
    command = add("order", _order, "batches of an epoch, chosen by embeddings from a file", order.HELP)
    command.add_argument("file", type=Path, metavar="FILE", help="of embeddings, as for inspect")
    command.add_argument("--batch-size", type=int, required=True, metavar="B", help="rows of a batch")
    command.add_argument("--key", metavar="NAME", help="which tensor of a file, or column of a table")
    command.add_argument("--labels", type=Path, metavar="FILE", help="whole numbers, one a row: .npy, .csv or .txt")
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another one gives another epoch (default: 0)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", help=".npy or .jsonl (default: FILE's name_order.npy, here)"
    )
    text = "Run bench/run.py of the source tree; what follows is handed on to it."
    add("bench", _bench, "time the operations against references", text).set_defaults(handed_on=[])
    add(
        "info",
        _info,
        "what is installed, and what each operation would use",
        "What `python -m spectral_kernels.info` prints.",
    )
    return parser


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    command.epilog = CONFIG_HELP.format(names=", ".join(named_configs()))
    command.add_argument("--config", default="demo", metavar="NAME_OR_FILE", help="which settings (default: demo)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: runs/COMMAND-CONFIG)")
    command.add_argument("--fresh", action="store_true", help="start anew, whatever FOLDER holds of these runs")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")


def _train(arguments: argparse.Namespace) -> None:
    config, out = _open(arguments, "train")
    if arguments.fresh:
        (out / "last.ckpt").unlink(missing_ok=True)
    data = _load(config)
    print(f"Training on {data.name} with {config.selection.strategy} batches, writing to {out}", flush=True)
    watched = Monitored(out / "monitor.csv") if arguments.monitor else None
    with Progress(config.train) as progress, _hint(out), stopped_by_sigterm() as stopping:
        run = train(config, data, out, [*([watched] if watched else []), progress, stopping])
    record = run_record(run.config, run.state_dict())
    files = [run.path, *report.write_runs(out, [record])]
    print(f"\n{report.run_table(record)}\n")
    if watched is not None:
        files += _monitor_files(watched)
    print(f"Written: {', '.join(map(str, files))}")


def _monitor_files(watched: Monitored) -> list[Path]:
    files = [path for path in (watched.path, spectrum_path(watched.path)) if path.exists()]
    if not files:  # the run was finished before there was a monitor
        return files
    try:
        files.append(monitor_plots.monitor(watched.path))
    except (ModuleNotFoundError, ValueError) as error:  # the figures are there all the same
        print(f"No picture of the monitor: {printable(str(error))}")
    return files


def _compare(arguments: argparse.Namespace) -> None:
    config, out = _open(arguments, "compare")
    data = _load(config)
    comparison = Comparison(config, data, out / "runs")
    if arguments.fresh:
        comparison.forget()
    runs = len(config.compare.strategies) * len(config.compare.seeds)
    print(
        f"Comparing {', '.join(config.compare.strategies)} on {data.name}: {runs} runs, writing to {out}",
        flush=True,
    )
    began = time.monotonic()
    with Progress(config.train, runs) as progress, _hint(out), stopped_by_sigterm() as stopping:
        records = comparison.records([progress, stopping])
    summary = report.summarise(records, config)
    files = report.write(out, records, summary, config, data.name)
    print(f"\n{report.table(summary, config, data.name)}\n")
    files += drawn(out / "comparison.png", lambda path: plots.comparison(path, records, summary, config, data.name))
    print(f"Took {time.monotonic() - began:.0f} s. Written: {', '.join(map(str, files))}")


def _band(arguments: argparse.Namespace) -> int:
    config, out = _open(arguments, "band", band.DEFAULTS)
    return band.run(config, _load(config), out)


def _variance(arguments: argparse.Namespace) -> None:
    config, out = _open(arguments, "variance", variance.DEFAULTS)
    variance.run(config, _load(config), out)


def _inspect(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in ("key", "subset", "temperature", "duplicates")}
    inspect.run(arguments.file, arguments.out, **options)


def _order(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in ("key", "labels", "seed", "out")}
    order.run(arguments.file, arguments.batch_size, **options)


def _open(arguments: argparse.Namespace, command: str, defaults: Sequence[str] = ()) -> tuple[Config, Path]:
    # every run starts with an empty memory bank; the sampler's warning about it is for people who bring
    # their own
    warnings.filterwarnings("ignore", message="the memory bank is cold")
    out = arguments.out or Path("runs") / f"{command}-{Path(arguments.config).stem}"
    config = read_config(arguments.config, [*defaults, *arguments.overrides])
    arguments.lock = lock.hold(out)
    sweep(out)
    return config, out


def _load(config: Config) -> ImageData:
    data = config.data
    options = {name: getattr(data, name) for name in ("download", "fallback", "size", "corrupt", "workers")}
    return load(data.name, data.root, **options)


@contextmanager
def _hint(out: Path) -> Iterator[None]:
    """Say what to do about a folder that holds other runs."""
    try:
        yield
    except CheckpointError as error:
        raise ValueError(
            f"{error}. Start anew with --fresh, or write elsewhere than {shown(out)} with --out"
        ) from error


def _bench(arguments: argparse.Namespace) -> int:
    script = Path(spectral_kernels.__file__).parent.parent / "bench" / "run.py"
    if not script.is_file():
        raise FileNotFoundError("bench needs the source tree (bench/run.py is not part of the installed package)")
    return subprocess.run([sys.executable, str(script), *arguments.handed_on], check=False).returncode


def _info(arguments: argparse.Namespace) -> int | None:
    from spectral_kernels import info

    return info.main([])


if __name__ == "__main__":
    sys.exit(main())
