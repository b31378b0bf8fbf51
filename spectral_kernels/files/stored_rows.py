"""Rows of numbers in a file, read where they are wanted: not mapped, since a mapped file that is cut ends the process."""

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.files.reading import PIECE, FileError, opened

LONGEST = 2**30  # bytes of one read, of which the system takes no more than 2 GB


@dataclass(frozen=True)
class Place:
    """Where the numbers of an array begin in a file, and in which order they lie.

    Attributes:
        strides: in elements. swapped: whether its bytes are in the other order than this machine's.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    swapped: bool = False

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last one."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def overlaps(self) -> bool:
        """Whether there are more elements than places for them: a small file may then claim any size."""
        return math.prod(self.shape) * self.dtype.itemsize > self.span


class FileRows(ABC):
    """(N, d) floating numbers in files, indexed as a tensor is, by a slice or by row numbers (k,) int64.

    Attributes:
        shape, dtype: as of a tensor.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        kind = str(dtype).removeprefix("torch.")
        if dtype not in checks.FLOATING:
            raise FileError(path, f"must hold float64, float32, bfloat16 or float16, got {kind}")
        if len(shape) != 2:
            raise FileError(path, f"must have 2 dimensions, (N, d), got {shape}")
        if 0 in shape:
            raise FileError(path, f"holds no numbers: its shape is {shape}")
        self.path, self.shape, self.dtype = path, torch.Size(shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"rows of a file are read in order, got a step of {step}")
            return self._read([(start, max(stop, start))])
        return self._read([(row, row + 1) for row in rows.tolist()])

    @abstractmethod
    def _read(self, parts: list[tuple[int, int]]) -> Tensor:
        """Rows first to last of each part."""


class StoredRows(FileRows):
    """Those of an array that lies in one file.

    Raises:
        FileError: as it is made, not (N, d) floating numbers, or less of them in the file; while it is read, a file that was
            changed or cut since.
    """

    def __init__(self, path: Path, place: Place) -> None:
        super().__init__(path, place.shape, place.dtype)
        if len(place.shape) != len(place.strides) or min(place.strides) < 0:
            raise FileError(path, f"has the shape {place.shape} and the strides {place.strides}")
        if place.overlaps:
            raise FileError(path, f"holds an expanded tensor {place.shape}, whose elements share memory")
        self._place = place
        with opened(path) as file:
            self._version = version(file)
            if place.start + place.span > self._version[2]:
                raise FileError(
                    path, f"is truncated: {place.start + place.span} bytes are expected, it has {self._version[2]}"
                )

    def _read(self, parts: list[tuple[int, int]]) -> Tensor:
        out = torch.empty(sum(last - first for first, last in parts), self.shape[1], dtype=self.dtype)
        stride, step = self._place.strides
        fill = self._fill if (stride, step) == (self.shape[1], 1) else self._fill_from_wider
        with opened(self.path) as file:
            if version(file) != self._version:
                raise FileError(self.path, "was changed while it was read")
            fill(file.fileno(), parts, out)
        return out

    def _fill(self, handle: int, parts: list[tuple[int, int]], out: Tensor) -> None:
        """Rows that lie one after the other, straight to where they belong."""
        width, done = self.shape[1] * self.dtype.itemsize, 0
        numbers = out.view(torch.uint8).reshape(-1)
        view = memoryview(numbers.numpy())  # type: ignore[arg-type]
        for first, last in parts:
            size = (last - first) * width
            self._bytes(handle, self._place.start + first * width, view[done : done + size])
            done += size
        if self._place.swapped:
            numbers.copy_(swapped(numbers, self.dtype))

    def _fill_from_wider(self, handle: int, parts: list[tuple[int, int]], out: Tensor) -> None:
        """Rows with others between them; where columns lie one after the other each part takes most of the file."""
        (stride, step), size, done = self._place.strides, self.dtype.itemsize, 0
        most = max(1, PIECE // max(1, stride * size)) if step == 1 else len(self)
        for first, last in parts:
            for start in range(first, last, most):
                rows = min(most, last - start)
                part = Place(self.dtype, (rows, self.shape[1]), self._place.strides, 0)
                content = torch.empty(part.span, dtype=torch.uint8)
                self._bytes(handle, self._place.start + start * stride * size, memoryview(content.numpy()))  # type: ignore[arg-type]
                if self._place.swapped:
                    content = swapped(content, self.dtype)
                out[done : done + rows] = content.view(self.dtype).as_strided(part.shape, part.strides)
                done += rows

    def _bytes(self, handle: int, start: int, view: memoryview) -> None:
        while view:
            count = os.preadv(handle, [view[:LONGEST]], start)
            if not count:
                raise FileError(self.path, "was cut while it was read")
            view, start = view[count:], start + count


def swapped(content: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (n,) uint8 of numbers, with the bytes of each in the other order."""
    return content.reshape(-1, dtype.itemsize).flip(1).reshape(-1)


def version(file: BinaryIO) -> tuple[int, int, int, int]:
    """What changes when a file is cut, replaced or written to."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
