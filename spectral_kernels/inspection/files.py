"""Embeddings on disk as one tensor that is read where it is touched."""

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_kernels import checks

SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")


def open_embeddings(path: str | Path, key: str | None = None) -> Tensor:
    """The (N, d) embeddings of a file, memory-mapped: nothing is read yet, and the file is never written.

    Args:
        path: .npy; .pt or .pth (a tensor, or a mapping of names to tensors, loaded with `weights_only=True`); .safetensors.
        key: which tensor of a mapping or of a .safetensors file; None: the only one.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, one that cannot be read, an unknown key, or a
            tensor that is no (N, d) of floating numbers.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must be one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if key is not None and path.suffix == ".npy":
        raise ValueError(f"key goes with .pt and .safetensors files; {path} holds one array")
    reader = {".npy": _npy, ".safetensors": _safetensors}.get(path.suffix, _pt)
    found = reader(path, key)
    if not isinstance(found, Tensor):
        raise ValueError(f"{path} must hold a tensor, got {type(found).__name__}")
    return checks.floating(found, str(path), ndim=2)


def _npy(path: Path, key: str | None) -> Any:
    numpy = importlib.import_module("numpy")
    try:
        array = numpy.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as .npy: {error}") from error
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{path} must be float64, float32 or float16, got {array.dtype}")
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _pt(path: Path, key: str | None) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen kinds
        raise ValueError(f"{path} cannot be read as tensors alone: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Mapping):
        if key is not None:
            raise ValueError(f"{path} holds one {type(found).__name__}, no key {key!r}")
        return found
    return found[_pick(path, [name for name, value in found.items() if isinstance(value, Tensor)], key)]


def _safetensors(path: Path, key: str | None) -> Any:
    try:
        module = importlib.import_module("safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {path} needs safetensors, which is not installed: pip install safetensors"
        ) from error
    try:
        with module.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return file.get_tensor(_pick(path, names, key))
    except module.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as .safetensors: {error}") from error


def _pick(path: Path, names: list[str], key: str | None) -> str:
    listed = ", ".join(map(repr, names)) or "none"
    if key is None and len(names) != 1:
        raise ValueError(f"{path} holds {len(names)} tensors ({listed}): say which one with --key")
    if key is not None and key not in names:
        raise ValueError(f"{path} has no tensor {key!r}; there are: {listed}")
    return names[0] if key is None else key
