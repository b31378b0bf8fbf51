"""IDX files, in which MNIST and its kin are distributed."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from spectral_kernels.files.reading import FileError, one_line, opened, read_exactly

LIMIT = 2**30  # bytes of the largest array
_BYTES = 0x08


def read_idx(path: str | Path, ndim: int) -> Tensor:
    """Read an IDX file of bytes, gzipped where its name ends in .gz.

    Returns:
        uint8 tensor of `ndim` dimensions.

    Raises:
        FileError: not gzip, not IDX, not bytes, wrong number of dimensions, truncated or too long; names the file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    with opened(path) as raw:
        if path.suffix != ".gz":
            return _read(path, raw, ndim)
        try:
            with gzip.open(raw) as file:
                return _read(path, file, ndim)  # type: ignore[arg-type]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise FileError(path, f"cannot be read as gzip: {one_line(error)}") from error


def _read(path: Path, file: IO[bytes], ndim: int) -> Tensor:
    start = read_exactly(path, file, 4 + 4 * ndim)
    zero, kind, dimensions = struct.unpack(">HBB", start[:4])
    if zero != 0 or kind != _BYTES:
        raise FileError(path, f"is not an IDX file of bytes: magic number 0x{start[:4].hex()}")
    if dimensions != ndim:
        raise FileError(path, f"holds {dimensions} dimensions, expected {ndim}")
    shape = struct.unpack(f">{ndim}I", start[4:])
    if not 0 < math.prod(shape) <= LIMIT:
        raise FileError(path, f"holds {shape} bytes by its header; 1 to {LIMIT} are read")
    content = read_exactly(path, file, math.prod(shape))
    if file.read(1):  # of a gzip file the checksum is compared here
        raise FileError(path, f"holds more bytes than its header says, {shape}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)
