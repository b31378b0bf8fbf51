"""Damaged and invented files for every reader: a value that is what it says it is, or one FileError; never anything else.

Inputs are made with each format's structure in mind: what lies within an archive, behind a length or under a checksum is
changed as well, and wrapped again. `corpus/` keeps inputs that once came through, as READER-what; they are tried first.
"""

import gzip
import io
import re
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import saved, signed
from safetensors.torch import save
from test_pickled import python2
from torch import Tensor

from spectral_kernels.files.embeddings import open_embeddings
from spectral_kernels.files.idx import read_idx
from spectral_kernels.files.reading import FileError, read_csv
from spectral_kernels.files.torch_files import read_tensors
from spectral_kernels.monitor.log import COLUMNS, Log
from spectral_kernels.training import checkpoint, cifar
from spectral_kernels.training.config import Config
from spectral_kernels.training.folder import _kept
from spectral_kernels.training.settings import read_config

pytestmark = pytest.mark.filterwarnings("ignore")
CORPUS = Path(__file__).with_name("corpus")
SECONDS = 3.0  # more than any input may take
Change = Callable[[bytes, np.random.Generator], bytes]
NUMBERS = (0, 1, 2, 3, 5, 127, 128, *(2**power - less for power in (8, 15, 16, 31, 32, 62, 63, 64) for less in (0, 1)))


def numpy_saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, a=ROWS.numpy())
    return buffer.getvalue()


def idx(shape: tuple[int, ...]) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(int(np.prod(shape)))


ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
STATE = {
    "format": checkpoint.FORMAT, "step": 3, "config": {"a": {"b": [1, 2.5, None, True, "x"]}}, "data": "x",
    "model": torch.nn.Linear(3, 2).state_dict(), "groups": [{"params": [0, 1], "betas": (0.9, 0.99), "lr": 0.1}],
}  # fmt: skip


# --- changes of bytes, of text, and of what is wrapped


def anything(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits, numbers of every width, parts that are cut, doubled, moved or zeroed."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        size = len(data)
        near = size if rng.random() < 0.4 else min(size, 160)
        place = int(rng.integers(near)) if near else 0
        if rng.random() < 0.2:
            place = max(0, size - 1 - place)  # archives have their directory at the end
        length = int(rng.integers(1, 40))
        match int(rng.integers(8)):
            case 0 if size:
                data[place] ^= 1 << int(rng.integers(8))
            case 1 if size:
                data[place] = int(rng.integers(256))
            case 2:
                width, order = int(rng.choice([1, 2, 4, 8])), str(rng.choice(["little", "big"]))
                number = NUMBERS[int(rng.integers(len(NUMBERS)))] % 256**width
                data[place : place + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[int(rng.integers(size + 1)) :][:length]
            case 5:
                data[place : place + length] = bytes(length)
            case 6:
                del data[place:]
            case _:
                data[place:place] = rng.bytes(length)
    return bytes(data)


WORDS = (
    "0", "-1", "1", "9223372036854775808", "1e999", "NaN", "null", "true", "[]", "{}", "()", '""', "'", '"', "[" * 50, "{",
    "}", ",", ":", "\n", "\0", "*a", "&a ", "<<", "!!python/name:os.system ", "- ", "? ", "|O", "<f8", ">f4", "F64", "'shape'",
    "9" * 5000, "é", "\xed\xa0\x80", "%", "#", "1.5", "2020-01-01", "0x7f", "1_0", ".inf", "~", "\\u0000",
)  # fmt: skip


def words(content: bytes, rng: np.random.Generator) -> bytes:
    """Text: words replaced, doubled, dropped or swapped."""
    parts = re.findall(r"\w+|\s+|[^\w\s]", content.decode("latin-1"))
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(len(parts) + 1))
        match int(rng.integers(4)):
            case 0:
                parts[place : place + 1] = [WORDS[int(rng.integers(len(WORDS)))]]
            case 1:
                parts.insert(place, WORDS[int(rng.integers(len(WORDS)))])
            case 2:
                del parts[place : place + int(rng.integers(1, 4))]
            case _:
                parts[place:place] = parts[int(rng.integers(len(parts) + 1)) :][: int(rng.integers(1, 9))]
    return "".join(parts).encode("latin-1", "replace")


def header(change: Change, width: int) -> Change:
    """A header of text behind its length, which is made to fit."""

    def changed(content: bytes, rng: np.random.Generator) -> bytes:
        start = 8 if width == 2 else 0
        size = int.from_bytes(content[start : start + width], "little")
        begin, end = start + width, start + width + size
        text = change(content[begin:end], rng)
        return content[:start] + (len(text) % 256**width).to_bytes(width, "little") + text + content[end:]

    return changed


def member(change: Change, ending: str) -> Change:
    """A member of a zip archive, with a checksum that fits."""

    def changed(content: bytes, rng: np.random.Generator) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                new.writestr(entry, change(data, rng) if entry.filename.endswith(ending) else data)
        return out.getvalue()

    return changed


def zipped(change: Change) -> Change:
    return lambda content, rng: gzip.compress(change(gzip.decompress(content), rng), 1)


def with_digest(change: Change) -> Change:
    return lambda content, rng: signed(change(content[: -checkpoint.TRAILER], rng))


# --- readers


@dataclass(frozen=True)
class Reader:
    """A name that a file may have, what reads it, whole files, and what is done to them; `anything` is done to all."""

    name: str
    read: Callable[[Path], Any]
    whole: tuple[bytes, ...]
    changes: tuple[Change, ...] = ()


def rows_of(path: Path) -> None:
    found = open_embeddings(path)
    assert len(found) > 0 and found.shape[1] > 0
    first, last = found[0 : min(3, len(found))], found[torch.tensor([len(found) - 1])]
    assert first.shape[1] == last.shape[1] == found.shape[1] and first.dtype == found.dtype
    assert isinstance(first, Tensor) and len(last) == 1


def batch_of(path: Path) -> None:
    images, labels = cifar.read_batches(path.parent, (path.name,))
    assert images.shape == (len(labels), 3, 32, 32) and images.dtype == torch.uint8
    assert len(labels) > 0 and int(labels.min()) >= 0 and int(labels.max()) <= 9


def tree_of(path: Path) -> None:
    plain(read_tensors(path))


def state_of(path: Path) -> None:
    state = checkpoint.load(path, {"step": int, "config": dict, "model": dict})
    assert type(state["step"]) is int
    plain(state)


def plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(type(key) in (str, bytes, int) for key in value)
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            plain(item)
    else:
        assert value is None or type(value) in (str, bytes, int, float, bool, Tensor)


def bytes_of(path: Path) -> None:
    found = read_idx(path, 3)
    assert found.dtype == torch.uint8 and found.ndim == 3 and found.numel() > 0


def settings_of(path: Path) -> None:
    assert isinstance(read_config(path), Config)


def log_of(path: Path) -> None:
    log = Log(path)
    log.open(1000)
    lines = read_csv(path)
    assert lines[0] == list(COLUMNS) and all(len(line) == len(COLUMNS) for line in lines)


SETTINGS = b"""data: {name: digits, long_tail: 1.5}
train: {steps: 20, batch_size: 64, temperature: 0.2, amp: null}
optimizer: {lr: 1e-3, name: sgd}
compare: {strategies: [random, greedy-8], seeds: [0, 1]}
"""
LINES = (
    ",".join(COLUMNS) + "\n" + "\n".join(",".join([str(step)] + ["1.5"] * (len(COLUMNS) - 2) + [""]) for step in (0, 5))
)
READERS = [
    Reader("z.npy", rows_of, (numpy_saved(ROWS.numpy()), numpy_saved(np.asfortranarray(ROWS.numpy()))), (header(words, 2),)),
    Reader("z.npz", rows_of, (npz(True), npz(False)), (member(header(words, 2), ".npy"), member(anything, ".npy"))),
    Reader("z.pt", rows_of, (saved(ROWS), saved({"a": ROWS.T, "b": 1})), (member(anything, "data.pkl"), member(words, ".pkl"))),
    Reader("z.safetensors", rows_of, (save({"a": ROWS}), save({"a": ROWS.half()})), (header(words, 8), header(anything, 8))),
    Reader("a.idx", bytes_of, (idx((2, 3, 4)), idx((1, 1, 1)))),
    Reader("a.gz", bytes_of, (gzip.compress(idx((2, 3, 4))),), (zipped(anything),)),
    Reader("test_batch", batch_of, (python2(1),)),
    Reader("tree.pt", tree_of, (saved(STATE), saved([ROWS.bool(), (ROWS.long(),)])), (member(anything, "data.pkl"),)),
    Reader("last.ckpt", state_of, (signed(saved(STATE)),), (with_digest(anything), with_digest(member(anything, ".pkl")))),
    Reader("a.yaml", settings_of, (SETTINGS,), (words, words, words)),
    Reader("monitor.csv", log_of, (LINES.encode(),), (words,)),
    Reader("index.json", lambda path: _kept(path, 9), (b'{"skipped": [1, 2, 8]}',), (words, words)),
]  # fmt: skip


def attempt(reader: Reader, path: Path, content: bytes) -> bool:
    """Whether a reader takes it; what is neither a value nor a FileError fails."""
    path.write_bytes(content)
    began, refused = time.monotonic(), None
    try:
        reader.read(path)
    except FileError as error:
        refused = str(path) in str(error)
    except ValueError as error:  # of settings, whose key is named
        refused = reader.read is settings_of and len(str(error)) < 10_000
    assert refused in (None, True)
    assert time.monotonic() - began < SECONDS
    return refused is None


def run(reader: Reader, count: int, seed: int, folder: Path) -> int:
    """Inputs that were taken, of `count`; one that comes through is kept in a file that the failure names."""
    rng, path, taken = np.random.default_rng(seed), folder / reader.name, 0
    for turn in range(count):
        changes = (anything, *reader.changes)
        content = reader.whole[turn % len(reader.whole)]
        content = changes[turn // len(reader.whole) % len(changes)](content, rng)
        try:
            taken += attempt(reader, path, content)
        except BaseException:
            kept = folder / f"{reader.name}-{seed}-{turn}"
            kept.write_bytes(content)
            print(f"kept as {kept}")
            raise
    return taken


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_whole_files_are_read(reader: Reader, tmp_path: Path) -> None:
    for content in reader.whole:
        assert attempt(reader, tmp_path / reader.name, content)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_corpus(path: Path, tmp_path: Path) -> None:
    name = path.name.partition("-")[0]
    (reader,) = (reader for reader in READERS if reader.name == name)
    attempt(reader, tmp_path / name, path.read_bytes())


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_some_inputs(reader: Reader, tmp_path: Path) -> None:
    run(reader, 60, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_many_inputs(reader: Reader, tmp_path: Path) -> None:
    """4,000 for each reader, 48,000 in all, others every day."""
    seed = int(time.time()) // 86400
    print(f"seed {seed}")
    run(reader, 4000, seed, tmp_path)
