"""Archives of torch.save that nobody would save: tensors beyond their storage, storages that are nowhere, two of a thing."""

import io
import pickle
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Reduced, assert_same

from spectral_kernels.files.embeddings import open_embeddings
from spectral_kernels.files.reading import FileError
from spectral_kernels.files.torch_files import read_places, read_tensors


class Storage:
    """What a pickle of torch refers to by an identity."""

    def __init__(self, identity: Any) -> None:
        self.identity = identity


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Storage) else None


def identity(key: Any = "0", count: Any = 6, kind: Any = torch.FloatStorage, what: Any = "storage") -> Storage:
    return Storage((what, kind, key, "cpu", count))


def archive(value: Any, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    data, out = io.BytesIO(), io.BytesIO()
    Pickler(data, 2).dump(value)
    with zipfile.ZipFile(out, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        archive.writestr("a/data.pkl", data.getvalue())
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", sys.byteorder)
        archive.writestr("a/data/0", struct.pack("6f", *range(6)))
        archive.writestr("a/data/1", struct.pack("6f", *range(6, 12)))
        for name, content in (members or {}).items():
            archive.writestr(name, content)
    return out.getvalue()


def rebuilt(*arguments: Any) -> Reduced:
    return Reduced(torch._utils._rebuild_tensor_v2, arguments)


def tensor(
    storage: Any = None, offset: Any = 0, shape: Any = (3, 2), strides: Any = (2, 1), hooks: Any = None
) -> Reduced:
    return rebuilt(identity() if storage is None else storage, offset, shape, strides, False, hooks or OrderedDict())


def test_the_archive_of_these_tests_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive({"a": tensor(), "b": tensor(identity("1"), 2, (2, 2), (2, 1))}))
    wanted = torch.load(path, weights_only=True)
    found = read_tensors(path)
    assert torch.equal(found["a"], wanted["a"]) and torch.equal(found["b"], wanted["b"])
    assert found["b"].tolist() == [[8, 9], [10, 11]]
    assert not read_places(path)["a"].swapped


BAD = {
    "larger than its storage": tensor(shape=(4, 2)),
    "strides beyond its storage": tensor(strides=(3, 1)),
    "an offset beyond its storage": tensor(offset=1),
    "a negative offset": tensor(offset=-1),
    "a negative size": tensor(shape=(-3, 2)),
    "a negative stride": tensor(strides=(-2, 1)),
    "sizes and strides of other lengths": tensor(strides=(1,)),
    "65 dimensions": tensor(shape=(1,) * 65, strides=(1,) * 65),
    "a list for a shape": tensor(shape=[3, 2]),
    "a text for a size": tensor(shape=("3", 2)),
    "a truth for a size": tensor(shape=(True, 2)),
    "a fraction for a size": tensor(shape=(3.0, 2)),
    "a huge size": tensor(shape=(2**63, 2**63)),
    "a huge size of nothing": tensor(shape=(2**62, 2**62, 0), strides=(1, 1, 1), offset=2**40),
    "a text for an offset": tensor(offset="0"),
    "no storage": rebuilt("storage", 0, (3, 2), (2, 1), False, OrderedDict()),
    "a storage that is not there": tensor(identity("7")),
    "a storage of another size": tensor(identity(count=5)),
    "a storage of another type": tensor(identity(kind=torch.DoubleStorage)),
    "a storage of no type": tensor(identity(kind="FloatStorage")),
    "something else than a storage": tensor(identity(what="module")),
    "a path for a storage": tensor(identity("../data.pkl")),
    "a number for a storage": tensor(identity(0)),
    "a storage by itself": identity(),
    "a type by itself": torch.FloatStorage,
    "too few arguments": rebuilt(identity(), 0),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_cannot_be(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive({"a": BAD[name]}))
    for read in (read_places, read_tensors, open_embeddings):
        with pytest.raises(FileError, match=f"^{path} cannot be read"):
            read(path)


def test_elements_that_share_memory(tmp_path: Path) -> None:
    """4 bytes that claim to be 4 GB."""
    path = tmp_path / "a.pt"
    for strides, shape in (((0, 1), (10**9, 1)), ((0, 0), (10**9, 1)), ((1, 1), (5, 2))):
        path.write_bytes(archive(tensor(shape=shape, strides=strides)))
        for read in (read_tensors, open_embeddings):
            with pytest.raises(FileError, match="share memory"):
                read(path)


@pytest.mark.parametrize(
    "content",
    [
        archive(tensor(), {"b/data.pkl": b"\x80\x02N."}),
        archive(tensor(), {"a/data.pkl": b"\x80\x02N."}),
        archive(tensor(), {"a/data/0": bytes(24)}),
        archive(tensor(), compression=zipfile.ZIP_DEFLATED),
        archive(tensor()).replace(b"PK\x03\x04", b"PK\x03\x05"),
    ],
    ids=["two pickles", "a pickle twice", "a storage twice", "compressed", "other headers"],
)
def test_archives_that_say_two_things(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"^{path} cannot be read"):
        read_tensors(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                                   torch.int16, torch.int8, torch.uint8, torch.bool])  # fmt: skip
def test_tensors_of_every_kind_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    z = (10 * torch.randn(5, 7)).to(dtype)
    value = {
        "whole": z, "part": z[1:3, ::2], "turned": z.T, "one": z[0, 0], "none": z[:0], "again": z, "list": [z, (z, {"a": z})],
        "parameter": torch.nn.Parameter(z.double()), "generator": torch.Generator().get_state(), 3: b"bytes", "size": z.shape,
    }  # fmt: skip
    torch.save(value, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")

    assert_same(value, found)


def test_numbers_of_the_other_byte_order(tmp_path: Path) -> None:
    path, other = tmp_path / "a.pt", "big" if sys.byteorder == "little" else "little"
    torch.save(torch.arange(6.0).reshape(3, 2), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for entry in old.infolist():
            content = other.encode() if entry.filename.endswith("byteorder") else old.read(entry)
            swapped = b"".join(content[i : i + 4][::-1] for i in range(0, len(content), 4))
            new.writestr(entry.filename, swapped if "/data/" in entry.filename else content)
    wanted = torch.load(tmp_path / "b.pt", weights_only=True)
    assert wanted.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(read_tensors(tmp_path / "b.pt"), wanted) and torch.equal(
        open_embeddings(tmp_path / "b.pt")[:], wanted
    )
