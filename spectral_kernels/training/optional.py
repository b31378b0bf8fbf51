"""Modules that only some commands need."""

import importlib
from typing import Any


def require(module: str, what: str, package: str | None = None) -> Any:
    """Import an optional module, or say which extra brings it.

    Raises:
        ModuleNotFoundError: `module` is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {package or module.partition('.')[0]}, which is not installed: "
            "pip install 'spectral_kernels[train]'"
        ) from error
