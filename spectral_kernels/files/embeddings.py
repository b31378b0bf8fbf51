"""Embeddings on disk, of every kind of file, read where they are wanted."""

import glob
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from spectral_kernels.checks import shortened
from spectral_kernels.files.chunked_rows import open_folder, open_index, open_parquet, pick
from spectral_kernels.files.pickled import Opaque
from spectral_kernels.files.reading import FileError, from_json, one_line, opened, read_exactly
from spectral_kernels.files.stored_rows import FileRows, Place, StoredRows, swapped
from spectral_kernels.files.torch_files import member_start, read_places

HEADER = 2**25  # bytes of the longest header of a .safetensors file
# no embeddings are compressed by more than that; what is, fills the memory from a few bytes
RATIO = 100
_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUMPY = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16}


def open_embeddings(path: str | Path, key: str | None = None) -> FileRows | Tensor:
    """The (N, d) embeddings of a file; nothing of them is read yet, but where they do not lie row by row or are compressed.

    Args:
        path: .npy; .npz; .pt or .pth (a tensor, or a mapping of names to tensors and whatever else); .safetensors; .parquet, a
            folder of such files or a pattern with * (a column of lists, in the order of the files' names); a folder that
            `datasets.Dataset.save_to_disk` wrote; .faiss or .index.
        key: which tensor of a mapping, .npz or .safetensors file, which column of a table; None: the only one.

    Raises:
        FileNotFoundError: no such file. FileError, a ValueError: another kind of file, one that cannot be read, an unknown
            key, or a tensor that is no (N, d) of floating numbers. ModuleNotFoundError: what reads such a file (pyarrow, or
            faiss for an index that is not flat) is not installed.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str | None], Place | FileRows | Tensor]] = {
        ".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".pt": _pt, ".pth": _pt, ".faiss": open_index,
        ".index": open_index, ".parquet": lambda path, key: open_parquet(path, [path], key),
    }  # fmt: skip
    reader = readers.get(path.suffix)
    if (reader is None or path.suffix == ".parquet") and _is_folder(path):
        reader = open_folder
    if reader is None:
        raise FileError(path, f"must be a folder, or one of {', '.join(readers)}")
    found = reader(path, key)
    if not isinstance(found, Place):
        return found
    rows = StoredRows(path, found)
    return rows if found.strides[1] == 1 else rows[:]


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, or a pattern that names files, and not one of them by its own name."""
    try:
        return path.is_dir() or (not path.exists() and any(glob.iglob(os.fspath(path), recursive=True)))
    except (OSError, ValueError):
        return False


def _npy(path: Path, key: str | None) -> Place:
    if key is not None:
        raise FileError(path, f"holds one array, no key {key!r}")
    with opened(path) as file:
        return _array(path, file, 0)


def _array(path: Path, file: Any, start: int) -> Place:
    """The array whose .npy header is read from `file`; `start` is where `file` begins in the file of `path`."""
    formats = numpy.lib.format
    try:
        version = formats.read_magic(file)
        if version > (2, 0):  # 3.0 is for names of fields
            raise ValueError(f"version {version} of the format is for records")
        if version == (2, 0):
            size = int.from_bytes(file.read(4), "little")
            if size > 2**16:  # it would be read before its length is looked at
                raise ValueError(f"a header of {size} bytes")
            file.seek(-4, 1)
        read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        shape, columns_first, dtype = read(file)
    except Exception as error:  # what is no header ends in errors of any kind
        raise FileError(path, f"cannot be read as .npy: {one_line(error)}") from error
    kind = dtype.str[1:]
    if kind not in _NUMPY:
        raise FileError(path, f"must be float64, float32 or float16, got {dtype}")
    if any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
        raise FileError(path, f"cannot be read as .npy: its shape is {shortened(shape)}")
    strides = [1] * len(shape)
    order = range(1, len(shape)) if columns_first else range(len(shape) - 2, -1, -1)
    for axis in order:
        before = axis - 1 if columns_first else axis + 1
        strides[axis] = strides[before] * shape[before]
    return Place(_NUMPY[kind], shape, tuple(strides), start + file.tell(), not dtype.isnative)


def _npz(path: Path, key: str | None) -> Place | Tensor:
    with opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _member(path, key, file, archive)
        except FileError:
            raise
        except Exception as error:  # zipfile meets damaged archives with errors of any kind
            raise FileError(path, f"cannot be read as .npz: {one_line(error)}") from error


def _member(path: Path, key: str | None, file: BinaryIO, archive: zipfile.ZipFile) -> Place | Tensor:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    entry = archive.getinfo(f"{pick(path, names, key)}.npy")
    if entry.compress_size > os.fstat(file.fileno()).st_size:
        raise FileError(path, f"is truncated: {entry.compress_size} bytes are expected")
    with archive.open(entry) as member:
        if entry.compress_type == zipfile.ZIP_STORED:
            start = member_start(file, entry)
            place = _array(path, member, start)
            if place.start - start + place.span > min(entry.file_size, entry.compress_size):
                raise FileError(path, f"holds {entry.file_size} bytes for an array {place.shape}")
            return place
        if entry.file_size > RATIO * max(entry.compress_size, 2**20):
            raise FileError(
                path, f"is compressed by more than {RATIO}: {entry.compress_size} to {entry.file_size} bytes"
            )
        place = _array(path, member, 0)
        if len(place.shape) != 2 or place.start + place.span != entry.file_size:
            raise FileError(
                path, f"holds {entry.file_size} bytes for an array {place.shape}, which must have 2 dimensions"
            )
        content = numpy.frombuffer(bytearray(read_exactly(path, member, place.span)), numpy.uint8)
    # the archive's checksum is compared as its last byte is read
    found = torch.from_numpy(content)
    if place.swapped:
        found = swapped(found, place.dtype)
    return found.view(place.dtype).as_strided(place.shape, place.strides)


def _pt(path: Path, key: str | None) -> Place:
    found = read_places(path, lenient=True)
    if isinstance(found, Mapping):
        names = [name for name, value in found.items() if isinstance(value, Place) and isinstance(name, str)]
        found = found[pick(path, names, key)]
    elif key is not None:
        raise FileError(
            path, f"holds one {'tensor' if isinstance(found, Place) else type(found).__name__}, no key {key!r}"
        )
    if not isinstance(found, Place):
        what = f"what {found.name} makes" if isinstance(found, Opaque) else type(found).__name__
        raise FileError(path, f"must hold a tensor, got {what}")
    return found


def _safetensors(path: Path, key: str | None) -> Place:
    with opened(path) as file:
        size = int.from_bytes(read_exactly(path, file, 8), "little")
        if size > HEADER:
            raise FileError(path, f"cannot be read as .safetensors: a header of {size} bytes")
        content = read_exactly(path, file, size)
    try:
        header = from_json(content.decode())
        names = [name for name in header if name != "__metadata__"]
        entry = header[pick(path, names, key)]
        kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(shape) is not list or any(
            type(size) is not int or not 0 <= size < 2**63 for size in (*shape, first, last)
        ):
            raise ValueError(f"its shape is {shortened(shape)}, its place {shortened([first, last])}")
    except FileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(path, f"cannot be read as .safetensors: {one_line(error)}") from error
    if type(kind) is not str or kind not in _SAFETENSORS or len(shape) != 2:
        raise FileError(path, f"must hold (N, d) of {', '.join(_SAFETENSORS)}, got {str(kind)[:20]} {shape[:9]}")
    place = Place(_SAFETENSORS[kind], tuple(shape), (shape[1], 1), 8 + size + first, sys.byteorder != "little")
    if place.span != last - first:
        raise FileError(path, f"cannot be read as .safetensors: {last - first} bytes for {kind} {shape}")
    return place
