"""Where people train: a bank that follows a trainer, and callbacks for Transformers, sentence-transformers and Lightning."""

from spectral_kernels.integrations.bank_updater import BankUpdater

__all__ = ["BankUpdater"]
