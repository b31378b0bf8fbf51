"""Modules that only some commands need."""

import importlib
import importlib.metadata
from typing import Any

import torch


def require(module: str, what: str, package: str | None = None, install: str = "'spectral_kernels[train]'") -> Any:
    """Import an optional module, or say what to install.

    Raises:
        ModuleNotFoundError: `module` is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {package or module.partition('.')[0]}, which is not installed: pip install {install}"
        ) from error


def import_torchvision(part: str) -> Any:
    """Import `torchvision.<part>`.

    Raises:
        ImportError: torchvision is missing (ModuleNotFoundError), or was built for another torch than the one that is there.
    """
    try:
        return importlib.import_module(f"torchvision.{part}")
    except RuntimeError as error:  # its binary part did not load: "operator torchvision::nms does not exist"
        raise ImportError(
            f"torchvision {importlib.metadata.version('torchvision')} was not built for torch {torch.__version__} ({error}): "
            "install the build of torchvision that is made for this torch (pytorch.org says how)"
        ) from error
