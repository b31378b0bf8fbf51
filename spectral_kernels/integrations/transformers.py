"""Transformers' Trainer and sentence-transformers', imported only when something is made for them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import BatchSampler, SequentialSampler

from spectral_kernels.integrations.bank_updater import FILE, BankUpdater
from spectral_kernels.selection.batch_sampler import BaseBatchSampler
from spectral_kernels.selection.global_batches import GlobalBatchSampler


def transformers_callback(updater: BankUpdater) -> Any:
    """A `transformers.TrainerCallback` that keeps the bank up and puts it into the checkpoints, also for sentence-transformers.

    A resumed run goes on in mid-epoch with the batches that would have come, and with the bank as it was.

    Args:
        updater: of the training set's sampler.

    Returns:
        The callback; give it to the trainer as `callbacks=[...]` or by `add_callback`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    transformers = importlib.import_module("transformers")

    class BankCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not (folder / FILE).exists():
                raise FileNotFoundError(
                    f"the run goes on from step {state.global_step}, but {folder / FILE} is not there: copy the checkpoint to "
                    "output_dir, or it was saved without this callback"
                )
            updater.load(folder)
            if not args.ignore_data_skip:
                updater.sampler.will_be_skipped(updater.sampler.state_dict()["batch"])

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            updater.batch_end()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            updater.batch_end()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            updater.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return BankCallback()


def sentence_transformers_batches(sampler: BaseBatchSampler | GlobalBatchSampler) -> Callable[..., Any]:
    """`batch_sampler=` of `SentenceTransformerTrainingArguments`, so that its trainer trains on the sampler's batches.

    A data set of another length than the sampler's, such as the one to evaluate on, gets ordinary batches in its own order.

    Args:
        sampler: of the training set's rows; its batch_size must be per_device_train_batch_size.

    Returns:
        The function that the trainer calls with a data set and a batch size.
    """
    given = False

    def batches(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
        nonlocal given
        if len(dataset) == sampler.n:
            if batch_size == sampler.batch_size:
                given = True
                return sampler
            if not given:
                raise ValueError(
                    f"per_device_train_batch_size is {batch_size}, but the sampler's batch_size is {sampler.batch_size}"
                )
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    return batches
