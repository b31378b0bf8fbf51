"""Embeddings of every kind of file, as the libraries that own the formats write them; bad ones refused by name."""

import argparse
import collections
import datetime
import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Reduced, saved
from safetensors.torch import save_file
from torch import Tensor

from spectral_kernels import cli
from spectral_kernels.files.embeddings import open_embeddings
from spectral_kernels.files.reading import FileError
from spectral_kernels.files.stored_rows import StoredRows
from spectral_kernels.inspection.diagnosis import diagnose


def embeddings(n: int = 20, d: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n))


FILES: dict[str, Any] = {
    "z.npy": lambda path, z: np.save(path, z.numpy()),
    "double.npy": lambda path, z: np.save(path, z.double().numpy()),
    "half.npy": lambda path, z: np.save(path, z.half().numpy()),
    "big_endian.npy": lambda path, z: np.save(path, z.numpy().astype(">f4")),
    "by_column.npy": lambda path, z: np.save(path, np.asfortranarray(z.numpy())),
    "version2.npy": lambda path, z: path.write_bytes(version2(z.numpy())),
    "z.npz": lambda path, z: np.savez(path, z=z.numpy()),
    "compressed.npz": lambda path, z: np.savez_compressed(path, z=z.numpy()),
    "big_endian.npz": lambda path, z: np.savez_compressed(path, z=z.numpy().astype(">f4")),
    "z.pt": lambda path, z: torch.save(z, path),
    "mapping.pt": lambda path, z: torch.save({"z": z, "n": 3, "name": "a", "more": [1, None, (2.0, True)]}, path),
    "module.pth": lambda path, z: torch.save(torch.nn.Embedding.from_pretrained(z).state_dict(), path),
    "beside others.pt": lambda path, z: torch.save({"z": z, **OTHERS}, path),
    "parameter.pt": lambda path, z: torch.save(torch.nn.Parameter(z), path),
    "bfloat16.pt": lambda path, z: torch.save(z.bfloat16(), path),
    "part.pt": lambda path, z: torch.save(torch.cat((z, z), 1)[:, : z.shape[1]], path),
    "by_column.pt": lambda path, z: torch.save(z.T.contiguous().T, path),
    "offset.pt": lambda path, z: torch.save(torch.cat((z, z))[len(z) :], path),
    "z.safetensors": lambda path, z: save_file({"z": z}, path, metadata={"by": "somebody"}),
    "bfloat16.safetensors": lambda path, z: save_file({"z": z.bfloat16()}, path),
    "z.faiss": lambda path, z: path.write_bytes(flat_index(z)),
    "metric.index": lambda path, z: path.write_bytes(flat_index(z, b"IxFl", 4)),
}


EVIL = Reduced(os.system, ("touch evil_was_run",))

# what people keep beside embeddings, and what nobody should
OTHERS: dict[Any, Any] = {
    "labels": np.arange(3), "scalar": np.float64(2), "device": torch.device("cpu"), "dtype": torch.float16, "set": {1, 2},
    "frozen": frozenset((1,)), "arguments": argparse.Namespace(a=1), "path": Path("x"), "when": datetime.datetime(2020, 1, 1),
    "complex": 1 + 2j, "counts": collections.Counter("abc"), "default": collections.defaultdict(list, a=[1]), (1, 2): 3, 1.5: 4,
    True: 5, None: 6, "large": 2**100, "float8": torch.ones(3).to(torch.float8_e4m3fn), "complex64": torch.ones(2) * 1j,
    "evil": EVIL, "model": torch.nn.Linear(2, 2), "ordered": collections.OrderedDict(a=1), "bytes": bytearray(b"x"),
    "dates": [datetime.date(2020, 1, 1), np.int64(3)], "sparse": torch.eye(3).to_sparse(), "range": range(3),
}  # fmt: skip


def flat_index(z: Tensor, kind: bytes = b"IxF2", metric: int = 1) -> bytes:
    """As FAISS writes one; python_tests/integrations/test_files.py has it from FAISS itself."""
    head = (
        kind + struct.pack("<iqqqbi", z.shape[1], len(z), 2**20, 2**20, 1, metric) + (b"" if metric < 2 else bytes(4))
    )
    return head + struct.pack("<q", z.numel()) + z.numpy().tobytes()


def version2(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(2, 0))
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(20, 5), (1, 1), (123, 129), (3, 1)])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    z = embeddings(*shape)
    FILES[name](tmp_path / name, z)
    wanted = {"double": z.double(), "half": z.half(), "bfloat16": z.bfloat16()}.get(name.partition(".")[0], z)
    found = open_embeddings(tmp_path / name)
    assert found.shape == z.shape and found.dtype == wanted.dtype and len(found) == len(z)
    assert torch.equal(found[:], wanted)
    assert torch.equal(found[len(z) // 3 : len(z) - 1], wanted[len(z) // 3 : len(z) - 1])
    assert torch.equal(found[5:2], wanted[:0])
    rows = torch.randint(len(z), (7,))
    assert torch.equal(found[rows], wanted[rows])
    assert not Path("evil_was_run").exists()


def test_one_of_several(tmp_path: Path) -> None:
    z = embeddings()
    np.savez(tmp_path / "two.npz", a=z.numpy(), b=z.numpy() + 1)
    torch.save({"a": z, "b": z + 1}, tmp_path / "two.pt")
    save_file({"a": z, "b": z + 1}, tmp_path / "two.safetensors")
    for suffix in ("npz", "pt", "safetensors"):
        assert torch.equal(open_embeddings(tmp_path / f"two.{suffix}", "b")[:], z + 1)
        with pytest.raises(FileError, match=r"two\.\w+ holds 2 tensors \('a', 'b'\): say which one with --key"):
            open_embeddings(tmp_path / f"two.{suffix}")
        with pytest.raises(FileError, match=r"two\.\w+ has no tensor 'c'; there are: 'a', 'b'"):
            open_embeddings(tmp_path / f"two.{suffix}", "c")


def test_diagnosis_is_that_of_the_tensor(tmp_path: Path) -> None:
    z = embeddings(700, 24)
    np.save(tmp_path / "z.npy", z.numpy())
    assert str(diagnose(open_embeddings(tmp_path / "z.npy"))) == str(diagnose(z))


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def safetensors(header: str, data: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def of_one(dtype: str, shape: str, end: int = 8) -> bytes:
    return safetensors(f'{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [0, {end}]}}}}')


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name + ".npy", content)
    return buffer.getvalue()


F4 = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"
KIND = "{'descr': %s, 'fortran_order': False, 'shape': (3, 2)}"
INTS = saved(torch.ones(3, 2, dtype=torch.int64))
BAD = [
    ("z.txt", b"", r"must be a folder, or one of \.npy"),
    ("cut.faiss", flat_index(torch.ones(3, 2))[:-4], "65 bytes for an index of 3 rows of 2"),
    ("minus.faiss", flat_index(torch.ones(3, 2)).replace(b"\x02\0\0\0", b"\xfe\xff\xff\xff", 1), "of 3 rows of -2"),
    ("none.faiss", flat_index(torch.ones(0, 2)), "holds no numbers"),
    ("empty.npy", b"", r"cannot be read as \.npy"),
    ("cut.npy", b"\x93NUMPY\x01\x00", r"cannot be read as \.npy"),
    ("text.npy", npy("not a header"), r"cannot be read as \.npy"),
    ("deep.npy", npy("(" * 5000), r"cannot be read as \.npy"),
    ("long.npy", npy(F4 % "(1, 1)" + " " * 20000), r"cannot be read as \.npy"),
    ("huge.npy", npy(F4 % "(9223372036854775808, 2)"), "its shape is"),
    ("digits.npy", npy(F4 % ("(0x" + "f" * 9000 + ", 2)")), "its shape is"),
    ("header.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31), "a header of 2147483648 bytes"),
    ("negative.npy", npy(F4 % "(-1, 2)"), "its shape is"),
    ("truth.npy", npy(F4 % "(True, 2)"), "its shape is"),
    ("short.npy", npy(F4 % "(3, 2)", bytes(20)), "is truncated"),
    ("rows.npy", npy(F4 % "(0, 2)"), "holds no numbers"),
    ("object.npy", npy(KIND % "'|O'"), "must be float64, float32 or float16"),
    ("ints.npy", npy(KIND % "'<i8'", bytes(48)), "float16, got int64"),
    ("record.npy", npy(KIND % "[('a', '<f4')]"), "must be float64"),
    ("flat.npy", npy(F4 % "(2,)", bytes(8)), "must have 2 dimensions"),
    ("really.npy", zipped(a=npy(F4 % "(1, 2)", bytes(8))), r"cannot be read as \.npy"),
    ("pickle.npy", b"\x80\x04N.", r"cannot be read as \.npy"),
    ("really.npz", npy(F4 % "(1, 2)", bytes(8)), r"cannot be read as \.npz"),
    ("bomb.npz", zipped(a=npy(F4 % "(25000000, 2)", bytes(200_000_000))), "is compressed by more than 100"),
    ("short.npz", zipped(a=npy(F4 % "(3, 2)", bytes(8))), "for an array"),
    ("list.pt", saved([torch.ones(2, 2)]), "must hold a tensor, got list"),
    ("ints.pt", INTS, "must hold float64, float32, bfloat16 or float16, got int64"),
    ("flat.pt", saved(torch.ones(3)), "must have 2 dimensions"),
    ("expanded.pt", saved(torch.ones(1, 2).expand(10**9, 2)), "expanded"),
    ("complex.pt", saved(torch.ones(3, 2, dtype=torch.complex64)), r"got what torch\.ComplexFloatStorage makes"),
    ("sparse.pt", saved(torch.eye(3).to_sparse()), r"got what torch\._utils\._rebuild_sparse_tensor makes"),
    ("module.pt", saved(torch.nn.Linear(2, 2)), r"got what torch\.nn\.modules\.linear\.Linear makes"),
    ("evil.pt", saved(EVIL), r"got what posix\.system makes"),
    ("evil2.pt", saved({"a": torch.ones(2, 2), Reduced: 1, "b": EVIL})[:-400], "cannot be read"),
    ("none.pt", saved({}), r"holds 0 tensors \(none\)"),
    ("cut.pt", saved(torch.ones(30, 20))[:900], "cannot be read"),
    ("zip.pt", zipped(a=b""), "it is no archive of torch.save"),
    ("old.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "cannot be read"),
    ("empty.safetensors", b"", "is truncated"),
    ("header.safetensors", struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808 bytes"),
    ("cut.safetensors", struct.pack("<Q", 100) + b"{}", "is truncated"),
    ("none.safetensors", safetensors("{}"), "holds 0 tensors"),
    ("list.safetensors", safetensors("[1]"), r"cannot be read as \.safetensors|holds 1 tensors"),
    ("deep.safetensors", safetensors("[" * 100_000), "nested too deep"),
    ("twice.safetensors", safetensors('{"a": 1, "a": 2}'), "a key stands twice"),
    ("nan.safetensors", safetensors('{"a": NaN}'), "NaN is no number"),
    ("ints.safetensors", of_one("I64", "[1, 1]"), "got I64"),
    ("short.safetensors", of_one("F32", "[3, 2]", 24), "is truncated"),
    ("lie.safetensors", of_one("F32", "[3, 2]"), "8 bytes for F32"),
    ("minus.safetensors", of_one("F32", "[-1, -2]"), "its shape"),
    ("digits.safetensors", of_one("F16", f"[1, {'9' * 4000}]"), "shape"),
    (
        "odd.safetensors",
        safetensors('{"a": {"dtype": [], "shape": [1, 2], "data_offsets": [0, 8]}}'),
        r"\.saf|must hold",
    ),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=[name for name, *_ in BAD])
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        open_embeddings(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["z.npy", "z.npz", "z.pt", "z.safetensors"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        open_embeddings(path)
    for make, unmake, message in (
        (os.mkfifo, Path.unlink, f"{name} is a pipe, not a file"),
        (Path.mkdir, Path.rmdir, f"{name} is a folder, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), Path.unlink, f"{name} is a device, not a file"),
        (lambda path: path.symlink_to(name), Path.unlink, f"{name} cannot be read: Too many levels"),
    ):
        make(path)
        with pytest.raises(FileError, match=message):
            open_embeddings(path)
        unmake(path)
    for other, message in ((f"a\0{name}", "null character"), ("a" * 300 + name, "name too long")):
        with pytest.raises(FileError, match=message):
            open_embeddings(other)


@pytest.mark.parametrize(
    "name, module, message",
    [
        ("z.parquet", "pyarrow", "reading parquet needs pyarrow, which is not installed: pip install pyarrow"),
        (
            "state.json",
            "pyarrow",
            "reading a saved data set needs pyarrow, which is not installed: pip install pyarrow",
        ),
        ("z.faiss", "faiss", "is not flat needs faiss, which is not installed: pip install faiss-cpu"),
    ],
)
def test_what_reads_it_is_missing(
    name: str,
    module: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for loaded in [one for one in sys.modules if one.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"PAR1")
    assert cli.main(["inspect", str(tmp_path if name == "state.json" else tmp_path / name)]) == 1
    assert message in capsys.readouterr().err


def test_folder_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"is a folder without \*\.parquet"):
        open_embeddings(tmp_path)
    (tmp_path / "dataset_dict.json").touch()
    with pytest.raises(FileError, match="holds several data sets: name the folder of one of them"):
        open_embeddings(tmp_path)
    with pytest.raises(FileError, match="must be a folder, or one of"):
        open_embeddings(tmp_path / "*.none")


def test_changed_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "z.npy"
    np.save(path, embeddings(1000).numpy())
    found = open_embeddings(path)
    assert isinstance(found, StoredRows)
    os.truncate(path, 2000)
    with pytest.raises(FileError, match=r"z\.npy was changed while it was read"):
        found[500:600]
    np.save(path, embeddings(1000).numpy())
    with pytest.raises(FileError, match=r"z\.npy was changed while it was read"):
        found[torch.tensor([3])]


def test_a_file_that_is_cut_under_the_command(tmp_path: Path) -> None:
    """It ends with an error, and not by SIGBUS, whenever that happens."""
    script = """
import os, sys
from spectral_kernels import cli
from spectral_kernels.files import stored_rows
original, calls = stored_rows.StoredRows._bytes, []
def cut(self, *where):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.truncate(sys.argv[1], 5000)
    return original(self, *where)
stored_rows.StoredRows._bytes = cut
sys.exit(cli.main(["inspect", sys.argv[1], "--out", os.path.dirname(sys.argv[1])]))
"""
    path = tmp_path / "z.npy"
    for call in (1, 2):
        np.save(path, embeddings(5000, 32).numpy())
        done = subprocess.run([sys.executable, "-c", script, str(path), str(call)], capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert "z.npy was c" in done.stderr and done.stderr.count("\n") == 1


def test_names_that_a_terminal_would_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (b"z\xff.npy", b"z\x1b[31m\n.npy"):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            np.save(file, embeddings(100).numpy())
        assert cli.main(["inspect", os.fsdecode(path), "--out", str(tmp_path)]) == 0
        assert cli.main(["inspect", os.fsdecode(path), "--key", "a"]) == 1
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and err.count("\n") == 1
        assert "z\\x" in out and "z\\x" in err


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e30, 3e38])
def test_rows_of_any_length(scale: float, tmp_path: Path) -> None:
    """Denormal ones too: the same directions, the same ranks as far as their digits go, or an error."""
    z = embeddings(300, 8).double()
    rows = (z * scale / 4).float()
    np.save(tmp_path / "z.npy", rows.numpy())
    found = diagnose(open_embeddings(tmp_path / "z.npy"))
    wide = rows.double()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)
    second = unit.T @ unit
    assert found.ranks["R2"] == pytest.approx(float(second.trace() ** 2 / second.square().sum()), rel=1e-4)
