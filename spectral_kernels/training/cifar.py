"""CIFAR-10 from its python batches (Krizhevsky 2009), read without running what a pickle may hold."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILES = ("test_batch",)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# what pickles of arrays are made of, by numpy's old and new names; nothing else is looked up
_ALLOWED = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def cifar_folder(root: Path) -> Path | None:
    """`root` itself or its `cifar-10-batches-py`, where the batches are; None: neither."""
    return next((folder for folder in (root, root / FOLDER) if (folder / TEST_FILES[0]).is_file()), None)


def read_batches(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of some batch files.

    Raises:
        ValueError: a file that is missing, truncated, no batch, or holds more than arrays; it is named.
    """
    images, labels = zip(*(_read_batch(folder / name) for name in names), strict=True)
    return torch.cat(images), torch.cat(labels)


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a CIFAR-10 batch: {error}") from error
    try:
        data, labels = content[b"data"], list(content[b"labels"])
        images = torch.from_numpy(data.copy()).reshape(-1, 3, 32, 32)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} is no CIFAR-10 batch: {error!r}") from error
    if images.dtype != torch.uint8 or len(images) != len(labels) or not all(label in range(10) for label in labels):
        raise ValueError(
            f"{path} is no CIFAR-10 batch: {len(images)} images of {images.dtype} and {len(labels)} labels, all of which "
            "must lie in 0 to 9"
        )
    return images, torch.tensor(labels, dtype=torch.int64)
