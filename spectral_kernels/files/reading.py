"""Bytes, text, JSON and CSV of a file: of a regular one, up to a limit."""

import csv
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
PIECE = 2**24
CSV_LIMIT, LINES = 2**26, 2**21  # bytes and lines


class FileError(ValueError):
    """A file that cannot be read, or is not what its name says.

    Args:
        path: of the file; the message begins with it.
        reason: the rest of the message.
    """

    def __init__(self, path: str | Path, reason: str = "") -> None:
        super().__init__(f"{shown(path)} {printable(reason)}".rstrip())


def shown(path: str | Path) -> str:
    """A path as text for people: bytes that are no UTF-8, and characters that a terminal would obey, as escapes."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def printable(text: str) -> str:
    """Text with escapes for what is no character to print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """What an error of a library says, in at most 200 characters of one line."""
    text = " ".join(str(error).split())
    return (text[:200] + "…" if len(text) > 200 else text) or type(error).__name__


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file for reading, its size in reach by `os.fstat`. An OSError of the block is a FileError too.

    Raises:
        FileNotFoundError: no such file. FileError: a folder, pipe, socket or device, or a file that may not be read.
    """
    if "\0" in os.fspath(path):
        raise FileError(path, "is no name of a file: it holds a null character")
    try:
        # before it is opened: opening a pipe waits, and a device may do anything
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            raise FileError(path, f"is {KINDS.get(kind, 'something else')}, not a file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(path)} does not exist") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or one_line(error)}") from error


def read_bytes(path: str | Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes."""
    with opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FileError(path, f"is larger than the {limit} bytes that are read of a file of its kind")
    return content


def read_text(path: str | Path, limit: int, errors: str = "strict") -> str:
    """All of a UTF-8 file, without its byte order mark."""
    content = read_bytes(path, limit)
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise FileError(path, f"is no UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(path: str | Path, limit: int) -> Any:
    """The value in a JSON file; a key that stands twice, NaN and Infinity are refused."""
    text = read_text(path, limit)
    try:
        return from_json(text)
    except ValueError as error:
        raise FileError(path, f"is no JSON: {one_line(error)}") from error


def from_json(text: str) -> Any:
    """The value of JSON text; ValueError for a key that stands twice, NaN, Infinity, or too deep a nesting."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_csv(path: str | Path) -> list[list[str]]:
    """The lines of a CSV file that are not empty, as lists of fields; damaged text is left for whoever reads a field."""
    text, lines = read_text(path, CSV_LIMIT, "replace"), []
    try:
        for number, line in enumerate(csv.reader(io.StringIO(text, newline=""))):
            if number > LINES:
                raise FileError(path, f"has more than {LINES} lines")
            if line:
                lines.append(line)
    except csv.Error as error:
        raise FileError(path, f"is no CSV: {one_line(error)}") from error
    return lines


def read_exactly(path: str | Path, file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, read in pieces: what a header claims is not set aside before it is there."""
    pieces, left = [], size
    while left:
        piece = file.read(min(left, PIECE))
        if not piece:
            raise FileError(path, f"is truncated: {size - left} bytes where {size} are expected")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
