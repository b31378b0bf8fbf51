"""Rows that a library decodes, a chunk after another: parquet, data sets that `datasets` saved, FAISS indexes."""

import glob
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from spectral_kernels.files.reading import FileError, one_line, opened, read_json, shown
from spectral_kernels.files.stored_rows import FileRows, Place, version
from spectral_kernels.optional import require

CHUNK = 2**20  # bytes of rows decoded at a time
# a file that claims more rows than this times its size is refused
RATIO = 100
_TYPES = {"double": torch.float64, "float": torch.float32, "halffloat": torch.float16}


class ChunkedRows(FileRows):
    """Rows in groups, each of which can be begun at; those of one group are read in order.

    Args:
        sizes: rows of each group.

    Raises:
        FileError: as it is made, not (N, d) floating numbers; while it is read, a file that is damaged or was changed since.
    """

    def __init__(self, path: Path, sizes: list[int], d: int, dtype: torch.dtype) -> None:
        super().__init__(path, (sum(sizes), d), dtype)
        self._starts = [0, *accumulate(sizes)]
        self._at: tuple[int, int, Tensor, Iterator[Tensor]] | None = None

    @abstractmethod
    def _chunks(self, group: int) -> Iterator[Tensor]:
        """Rows of a group, from its first to its last."""

    def _read(self, parts: list[tuple[int, int]]) -> Tensor:
        out, done = torch.empty(sum(last - first for first, last in parts), self.shape[1], dtype=self.dtype), 0
        for first, last in parts:
            while first < last:
                start, chunk = self._chunk_with(first)
                rows = chunk[first - start : last - start]
                out[done : done + len(rows)] = rows
                first, done = first + len(rows), done + len(rows)
        return out

    def _chunk_with(self, row: int) -> tuple[int, Tensor]:
        """The chunk that holds a row, and its first row; the last one is kept, and the next ones are those after it."""
        group = bisect_right(self._starts, row) - 1
        if self._at is None or self._at[0] != group or row < self._at[1]:
            self._at = group, self._starts[group], torch.empty(0), self._chunks(group)
        _, start, chunk, rest = self._at
        while row >= start + len(chunk):
            start += len(chunk)
            chunk = next(rest, torch.empty(0))
            if not len(chunk) or start + len(chunk) > self._starts[group + 1]:
                self._at = None
                raise FileError(self.path, f"does not hold the {self._starts[group + 1]} rows that it says it has")
            self._at = group, start, chunk, rest
        return start, chunk


@contextmanager
def decoded(path: Path, kind: str) -> Iterator[BinaryIO]:
    """A file for a library to read, whose errors of any kind are FileErrors."""
    with opened(path) as file:
        try:
            yield file
        except (FileError, ModuleNotFoundError):
            raise
        except Exception as error:
            raise FileError(path, f"cannot be read as {kind}: {one_line(error)}") from error


def _arrow(what: str, module: str = "pyarrow") -> Any:
    return require(module, what, install="pyarrow")


class _ColumnRows(ChunkedRows):
    """A column of lists, over files and the groups in each.

    Args:
        groups: (file, group of the file, rows) each.
        versions: of the files, as they were when the groups were found.
    """

    def __init__(
        self,
        path: Path,
        groups: list[tuple[Path, int, int]],
        versions: dict[Path, Any],
        key: str,
        d: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(path, [rows for *_, rows in groups], d, dtype)
        self._groups, self._versions, self._key = groups, versions, key

    def _chunks(self, group: int) -> Iterator[Tensor]:
        path, number, _ = self._groups[group]
        with decoded(path, self._kind) as file:
            if version(file) != self._versions[path]:
                raise FileError(path, "was changed while it was read")
            for batch in self._batches(file, number):
                yield from self._rows(path, batch.column(self._key))

    def _rows(self, path: Path, column: Any) -> Iterator[Tensor]:
        """Of a column of a record batch."""
        most = max(1, CHUNK // (self.shape[1] * self.dtype.itemsize))
        for first in range(0, len(column), most):
            part = column[first : first + most]
            values, lengths = part.flatten(), part.value_lengths().drop_null()
            if part.null_count or values.null_count or not set(lengths.unique().to_pylist()) <= {self.shape[1]}:
                raise FileError(
                    path, f"has rows in {self._key!r} without value, or of other lengths than {self.shape[1]}"
                )
            # a copy: the array is the library's, and not to be written to
            numbers = numpy.array(values.to_numpy(zero_copy_only=False)).reshape(len(part), self.shape[1])
            yield torch.from_numpy(numbers)

    _kind: str

    @abstractmethod
    def _batches(self, file: BinaryIO, group: int) -> Iterator[Any]:
        """Record batches of a group."""


class _ParquetRows(_ColumnRows):
    _kind = "parquet"

    def _batches(self, file: BinaryIO, group: int) -> Iterator[Any]:
        size = max(1, CHUNK // (self.shape[1] * self.dtype.itemsize))
        with _parquet(file) as table:
            yield from table.iter_batches(size, row_groups=[group], columns=[self._key], use_threads=False)


def _parquet(file: BinaryIO) -> Any:
    # buffered: else a column of a row group is read as a whole
    return _arrow("reading parquet", "pyarrow.parquet").ParquetFile(file, buffer_size=2**20, pre_buffer=False)


def open_parquet(path: Path, paths: list[Path], key: str | None) -> FileRows:
    """The lists of a column, over files that are one table; no row is read yet.

    Args:
        path: for messages about all of the files.
        key: which column; None: the only one of lists of floating numbers.
    """
    _arrow("reading parquet", "pyarrow.parquet")
    found, groups, versions = None, [], {}
    for one in paths:
        with decoded(one, "parquet") as file, _parquet(file) as table:
            versions[one], own, rows, meta = version(file), None, 0, table.metadata
            name, dtype, d = _column(one, table.schema_arrow, key)
            for number in range(meta.num_row_groups):
                group = meta.row_group(number)
                columns = [group.column(i) for i in range(group.num_columns)]
                values = [c.num_values for c in columns if c.path_in_schema.startswith(f"{name}.")]
                if not group.num_rows:
                    continue
                width = (values[0] if len(values) == 1 else 0) / group.num_rows
                if width != (own or d or width) or width < 1 or width % 1:
                    raise FileError(one, f"has rows of unequal lengths in {name!r}")
                own = int(width)
                rows += group.num_rows
                groups.append((one, number, group.num_rows))
            if own is not None:
                _plausible(one, rows * own * dtype.itemsize, versions[one][2])
                found = _same(one, found, (name, dtype, own))
    if found is None:
        raise FileError(path, "holds no rows")
    return _ParquetRows(path, groups, versions, found[0], found[2], found[1])


def _column(path: Path, schema: Any, key: str | None) -> tuple[str, torch.dtype, int | None]:
    """Name, dtype and, where the type says it, length of a column of lists."""
    fits = {}
    for field in schema:
        kind = field.type
        if (
            (inner := getattr(kind, "value_type", None)) is not None
            and str(inner) in _TYPES
            and hasattr(kind, "value_field")
        ):
            fits[field.name] = _TYPES[str(inner)], getattr(kind, "list_size", None)
    name = pick(path, list(fits), key, "columns of lists of floating numbers")
    return name, *fits[name]


_Column = tuple[str, torch.dtype, int]


def _same(path: Path, before: _Column | None, own: _Column) -> _Column:
    if before is not None and own != before:
        raise FileError(path, f"has {own}, but the files before it {before}: column, dtype and length")
    return own


def _plausible(path: Path, claimed: int, size: int) -> None:
    if claimed > RATIO * max(size, 2**20):
        raise FileError(path, f"is compressed by more than {RATIO}: {size} to {claimed} bytes")


class _DatasetRows(_ColumnRows):
    _kind = "an Arrow file of datasets"

    def _batches(self, file: BinaryIO, group: int) -> Iterator[Any]:
        with _arrow("reading a saved data set", "pyarrow.ipc").open_stream(file) as stream:
            yield from stream


def _open_dataset(folder: Path, key: str | None) -> FileRows:
    """Of a folder that `datasets.Dataset.save_to_disk` wrote. Its files are read once: they do not say their number of rows."""
    ipc = _arrow("reading a saved data set", "pyarrow.ipc")
    state = read_json(folder / "state.json", 2**24)
    try:
        paths = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise FileError(folder / "state.json", "is not what datasets writes") from error
    if any(path.parent != folder or path.name == ".." for path in paths):
        raise FileError(folder / "state.json", "names files outside of its folder")
    found, groups, versions = None, [], {}
    for path in paths:
        with decoded(path, _DatasetRows._kind) as file, ipc.open_stream(file) as stream:
            versions[path], rows = version(file), 0
            name, dtype, d = _column(path, stream.schema, key)
            for batch in stream:
                rows += len(batch)
                if d is None and len(batch):
                    d = batch.column(name).value_lengths()[0].as_py()
            if rows:
                found = _same(path, found, (name, dtype, d or 0))
                _plausible(path, rows * (d or 0) * dtype.itemsize, versions[path][2])
                groups.append((path, 0, rows))
    if found is None:
        raise FileError(folder, "holds no rows")
    return _DatasetRows(folder, groups, versions, found[0], found[2], found[1])


def open_folder(path: Path, key: str | None) -> FileRows:
    """Of a folder, or of the files that a pattern with * names."""
    if not path.is_dir():
        paths = [Path(name) for name in sorted(glob.glob(os.fspath(path), recursive=True))]
        return open_parquet(path, paths, key)
    if (path / "state.json").exists():
        return _open_dataset(path, key)
    if (path / "dataset_dict.json").exists():
        raise FileError(path, "holds several data sets: name the folder of one of them")
    paths = sorted(path.rglob("*.parquet"))
    if not paths:
        raise FileError(path, "is a folder without *.parquet and without a data set that datasets saved")
    return open_parquet(path, paths, key)


class _IndexRows(ChunkedRows):
    """Of a FAISS index that is in memory."""

    def __init__(self, path: Path, index: Any) -> None:
        self._index, self._step = index, max(1, CHUNK // (4 * max(1, index.d)))
        whole, rest = divmod(index.ntotal, self._step)
        super().__init__(path, [self._step] * whole + [rest] * (rest > 0), index.d, torch.float32)

    def _chunks(self, group: int) -> Iterator[Tensor]:
        first = self._starts[group]
        try:
            yield torch.from_numpy(self._index.reconstruct_n(first, self._starts[group + 1] - first))
        except RuntimeError as error:
            raise FileError(self.path, f"is an index whose rows cannot be had back: {one_line(error)}") from error


def open_index(path: Path, key: str | None) -> Place | FileRows:
    """A flat index's rows are found in the file, without FAISS; another kind is read into memory by FAISS, which decodes it."""
    if key is not None:
        raise FileError(path, f"holds one index, no key {key!r}")
    with opened(path) as file:
        head, size = file.read(49), version(file)[2]
    if head[:4] in (b"IxF2", b"IxFI", b"IxFl") and len(head) >= 45:
        d, rows = (int.from_bytes(head[i:j], "little", signed=True) for i, j in ((4, 8), (8, 16)))
        start = 45 if int.from_bytes(head[33:37], "little") < 2 else 49  # other metrics have an argument
        if min(d, rows) < 0 or start + 4 * d * rows != size:
            raise FileError(path, f"is damaged: {size} bytes for an index of {rows} rows of {d}")
        return Place(torch.float32, (rows, d), (d, 1), start)
    faiss = require("faiss", "reading an index of FAISS that is not flat", install="faiss-cpu")
    with decoded(path, "an index of FAISS"):
        # what it names lies beside it, and is only read
        index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)
        rows_ = _IndexRows(path, index)
        rows_[:1]
    return rows_


def pick(path: Path, names: list[str], key: str | None, what: str = "tensors") -> str:
    """The one of the names that is meant."""
    listed = ", ".join(repr(name[:60]) for name in names[:20]) + (", …" if len(names) > 20 else "") if names else "none"
    if key is None and len(names) != 1:
        raise FileError(path, f"holds {len(names)} {what} ({listed}): say which one with --key")
    if key is not None and key not in names:
        raise FileError(path, f"has no {what.split()[0].removesuffix('s')} {shown(key)!r}; there are: {listed}")
    return names[0] if key is None else key
