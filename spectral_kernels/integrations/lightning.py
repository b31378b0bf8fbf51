"""Lightning, imported only when something is made for it."""

from typing import Any

from spectral_kernels.integrations.bank_updater import BankUpdater
from spectral_kernels.monitor.lightning import callback_class


def lightning_bank_callback(updater: BankUpdater) -> Any:
    """A `lightning.pytorch.Callback` that keeps the bank up and puts it and the sampler into the checkpoints.

    Args:
        updater: of the training loader's sampler.

    Returns:
        The callback, for `Trainer(callbacks=[...], use_distributed_sampler=False)`.

    Raises:
        ModuleNotFoundError: neither lightning nor pytorch_lightning is installed.
    """

    class BankCallback(callback_class()):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            updater.batch_end()

        def state_dict(self) -> dict[str, Any]:
            return updater.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            updater.load_state_dict(state)

    return BankCallback()
