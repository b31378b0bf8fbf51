"""CIFAR-10 from its python batches (Krizhevsky 2009), which are pickles: read as data, nothing in them is run."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spectral_kernels.files.pickled import LIMIT, Built, NotPlain, from_latin1, read_pickled
from spectral_kernels.files.reading import FileError, read_bytes

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILES = ("test_batch",)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHAPE = (3, 32, 32)
_INTEGERS = {f"{sign}{size}": (size, sign == "i") for sign in "iu" for size in (1, 2, 4, 8)}


class _Type(Built):
    """A numpy dtype, by its code; what else is said of it is the order of bytes."""

    order: Literal["little", "big"]

    def __init__(self, code: Any, _align: Any = False, _copy: Any = True) -> None:
        if type(code) not in (bytes, str) or len(code) > 8:
            raise NotPlain("numbers of an unknown type")
        # Python 2 wrote text as bytes
        self.code, self.order = (code.decode("latin-1") if isinstance(code, bytes) else code), "little"

    def build(self, state: Any) -> None:
        if type(state) is tuple and len(state) > 1 and state[1] in (">", b">"):
            self.order = "big"


class _Array(Built):
    """A numpy array: what its pickle says of it."""

    shape: Any = ()
    kind: Any = None
    content: Any = b""

    def build(self, state: Any) -> None:
        _version, self.shape, self.kind, by_column, self.content = state
        if by_column:
            raise NotPlain("an array that lies column by column")

    @classmethod
    def of_buffer(cls, content: Any, kind: Any, shape: Any, order: Any) -> "_Array":
        found = cls()
        found.build((1, shape, kind, order != "C", content))
        return found

    def numbers(self, code: str) -> bytes:
        """The bytes, if they are what code and shape say."""
        size = int(code[1:])
        if type(self.shape) is not tuple or len(self.shape) > 2:
            raise NotPlain("an array whose shape is no tuple of one or two numbers")
        for count in self.shape:
            if type(count) is not int or count < 0:
                raise NotPlain("an array whose shape is no tuple of numbers")
            size *= count
        if type(self.content) not in (bytes, bytearray) or len(self.content) != size:
            raise NotPlain(f"an array {self.shape} of {code} that holds another number of bytes")
        return bytes(self.content)


def _whole(kind: Any, content: Any) -> int:
    """A numpy scalar."""
    size, signed = _integer(kind)
    if type(content) is not bytes or len(content) != size:
        raise NotPlain("a scalar that is no whole number")
    return int.from_bytes(content, kind.order, signed=signed)


def _integer(kind: Any) -> tuple[int, bool]:
    if not isinstance(kind, _Type) or type(kind.code) is not str or kind.code not in _INTEGERS:
        raise NotPlain("numbers that are not whole")
    return _INTEGERS[kind.code]


def _array_type() -> None:
    raise NotPlain("a call of numpy.ndarray")


# what pickles of arrays are made of, by numpy's old and new names
_KNOWN: dict[str, Any] = {"_codecs.encode": from_latin1, "numpy.dtype": _Type, "numpy.ndarray": _array_type}
for _module in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_module}.multiarray._reconstruct"] = lambda _kind, _shape, _code: _Array()
    _KNOWN[f"{_module}.multiarray.scalar"] = _whole
    _KNOWN[f"{_module}.numeric._frombuffer"] = _Array.of_buffer


def cifar_folder(root: Path) -> Path | None:
    """`root` itself or its `cifar-10-batches-py`, where the batches are; None: neither."""
    return next((folder for folder in (root, root / FOLDER) if (folder / TEST_FILES[0]).is_file()), None)


def read_batches(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of some batch files.

    Raises:
        FileError: a file that is truncated, no batch, or holds more than arrays; it is named.
        FileNotFoundError: one is missing.
    """
    images, labels = zip(*(_read_batch(folder / name) for name in names), strict=True)
    return torch.cat(images), torch.cat(labels)


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    content = read_bytes(path, LIMIT)
    try:
        batch = read_pickled(content, _KNOWN)
        if type(batch) is not dict or not {b"data", b"labels"} <= batch.keys():
            raise NotPlain("it has no data and labels")
        pixels, labels = _pixels(batch[b"data"]), _labels(batch[b"labels"])
    except NotPlain as error:
        raise FileError(path, f"cannot be read as a CIFAR-10 batch: {error}") from error
    if len(pixels) != len(labels):
        raise FileError(path, f"is no CIFAR-10 batch: {len(pixels)} images and {len(labels)} labels")
    return pixels, labels


def _pixels(data: Any) -> Tensor:
    if not isinstance(data, _Array) or not isinstance(data.kind, _Type) or data.kind.code != "u1":
        raise NotPlain("its data are no array of bytes")
    numbers = bytearray(data.numbers("u1"))
    if len(data.shape) != 2 or data.shape[0] == 0 or data.shape[1] != 3 * 32 * 32:
        raise NotPlain(f"its data have the shape {data.shape}, (N, 3072) is expected")
    return torch.frombuffer(numbers, dtype=torch.uint8).reshape(-1, *_SHAPE)


def _labels(found: Any) -> Tensor:
    if isinstance(found, _Array):
        size, signed = _integer(found.kind)
        numbers = found.numbers(found.kind.code)
        order = found.kind.order
        found = [int.from_bytes(numbers[i : i + size], order, signed=signed) for i in range(0, len(numbers), size)]
    if type(found) is not list or any(type(label) is not int or not 0 <= label <= 9 for label in found):
        raise NotPlain("its labels are no list of numbers from 0 to 9")
    return torch.tensor(found, dtype=torch.int64)
