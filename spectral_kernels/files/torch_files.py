"""What `torch.save` writes, read as data: the zip archive, the pickle in it, and where the numbers of each tensor lie."""

import functools
import math
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spectral_kernels.files.pickled import LIMIT, Function, NotPlain, Opaque, as_tree, from_latin1, read_pickled
from spectral_kernels.files.reading import FileError, one_line, opened, read_exactly
from spectral_kernels.files.stored_rows import Place, swapped

STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
# of the file's size: what tensors that share a storage may take in memory
TIMES = 16
# 64 dimensions are torch's own limit
_DIMENSIONS = 64


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    start: int
    count: int


def read_places(path: str | Path, *, lenient: bool = False) -> Any:
    """The value that `torch.save` wrote, with a `Place` for each tensor: dictionaries, lists, tuples, numbers, text and None.

    Args:
        lenient: of other values `pickled.Opaque` is told; else they are refused.

    Raises:
        FileNotFoundError: no such file. FileError: not of `torch.save`, damaged, or holding anything else.
    """
    with opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _Archive(file, archive).value(lenient)
        except FileError:
            raise
        except NotPlain as error:
            raise FileError(path, f"cannot be read as tensors alone: {error}") from error
        except Exception as error:  # zipfile meets damaged archives with errors of any kind
            raise FileError(path, f"cannot be read as a file of torch.save: {one_line(error)}") from error


def read_tensors(path: str | Path) -> Any:
    """The value that `torch.save` wrote, its tensors in memory on the CPU; raises as `read_places` does."""
    value = read_places(path)
    with opened(path) as file:
        left = TIMES * os.fstat(file.fileno()).st_size

        def tensor(place: Place) -> Tensor:
            nonlocal left
            left -= place.span
            if left < 0:
                raise NotPlain(f"its tensors have more than {TIMES} times its size")
            return _tensor(path, file, place)

        try:
            return as_tree(value, functools.cache(tensor))  # what is named twice is one tensor
        except NotPlain as error:
            raise FileError(path, f"cannot be read as tensors alone: {error}") from error


def _tensor(path: str | Path, file: BinaryIO, place: Place) -> Tensor:
    if place.overlaps:
        raise NotPlain(f"it holds a tensor {place.shape} whose elements share memory")
    if place.span == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    file.seek(place.start)
    content = torch.frombuffer(bytearray(read_exactly(path, file, place.span)), dtype=torch.uint8)
    if place.swapped:
        content = swapped(content, place.dtype)
    return content.view(place.dtype).as_strided(place.shape, place.strides).clone()


class _Archive:
    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile) -> None:
        names = [entry.filename for entry in archive.infolist()]
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) < len(names):
            raise NotPlain("it is no archive of torch.save")
        self._file, self._archive = file, archive
        self._folder = pickles[0].removesuffix("data.pkl")
        order = self._entry("byteorder", 16) if f"{self._folder}byteorder" in names else b"little"
        if order not in (b"little", b"big"):
            raise NotPlain("an unknown order of bytes")
        self._swapped = order.decode() != sys.byteorder
        self._storages: dict[str, _Storage] = {}

    def value(self, lenient: bool) -> Any:
        known: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(STORAGES, _not_called),
            "torch._utils._rebuild_tensor_v2": self._rebuild,
            "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
            "_codecs.encode": from_latin1,
            "collections.OrderedDict": lambda: {},
            "torch.Size": _sizes,
        }
        value = read_pickled(self._entry("data.pkl", LIMIT), known, self._storage, lenient=lenient)
        return as_tree(value, lambda one: one if lenient and isinstance(one, Opaque) else _only_places(one))

    def _entry(self, name: str, limit: int) -> bytes:
        with self._archive.open(f"{self._folder}{name}") as entry:
            content = entry.read(limit + 1)
        if len(content) > limit:
            raise NotPlain(f"its {name} is larger than {limit} bytes")
        return content

    def _storage(self, identity: Any) -> _Storage | Opaque:
        if type(identity) is not tuple or len(identity) != 5:
            raise NotPlain("it refers to what is no storage")
        kind, storage, key, _location, count = identity
        if isinstance(storage, Opaque):
            return storage
        if kind != "storage" or not isinstance(storage, Function) or storage.name not in STORAGES:
            raise NotPlain("it refers to what is no storage")
        if type(key) is not str or type(count) is not int:
            raise NotPlain("a storage without a name or a size")
        entry = self._archive.getinfo(f"{self._folder}data/{key}")
        dtype = STORAGES[storage.name]
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.flag_bits & 1
            or entry.file_size != count * dtype.itemsize
        ):
            raise NotPlain(f"storage {key[:20]} is compressed or has another size than is said of it")
        return _Storage(dtype, member_start(self._file, entry), count)

    def _rebuild(
        self, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, _metadata: Any = None
    ) -> Place:
        if not isinstance(storage, _Storage) or type(offset) is not int:
            raise NotPlain("a tensor of what is no storage")
        shape, strides = _sizes(shape), _sizes(strides)
        if len(shape) != len(strides) or offset < 0 or math.prod(max(size, 1) for size in shape) >= 2**63:
            raise NotPlain("a tensor whose shape and strides do not fit")
        strides = tuple(1 if size <= 1 else stride for size, stride in zip(shape, strides, strict=True))
        place = Place(storage.dtype, shape, strides, storage.start + offset * storage.dtype.itemsize, self._swapped)
        if offset * storage.dtype.itemsize + place.span > storage.count * storage.dtype.itemsize:
            raise NotPlain("a tensor that is larger than its storage")
        return place


def member_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed member of a zip archive begin."""
    # the name and the extra field may have other lengths here than in the archive's directory
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise NotPlain(f"{entry.filename[:40]} is not where the directory says")
    name, extra = struct.unpack("<HH", header[26:30])
    return int(entry.header_offset + 30 + name + extra)


def _sizes(found: Any) -> tuple[int, ...]:
    if type(found) is not tuple or any(type(size) is not int or size < 0 for size in found) or len(found) > _DIMENSIONS:
        raise NotPlain("a shape or strides that are no tuple of numbers from 0 on")
    return found


def _not_called(*arguments: Any) -> Any:
    raise NotPlain("a call of a type of storage")


def _only_places(value: Any) -> Any:
    if not isinstance(value, Place):
        raise NotPlain(f"it holds a {value.name if isinstance(value, Function) else type(value).__name__}")
    return value
