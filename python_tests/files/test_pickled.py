"""Pickles read as data: what torch and numpy write comes back, and nothing else gets anywhere, however it is wrapped."""

import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Reduced

from spectral_kernels.files import pickled
from spectral_kernels.files.pickled import NotPlain, as_tree, read_pickled
from spectral_kernels.files.reading import FileError
from spectral_kernels.files.torch_files import read_tensors
from spectral_kernels.training import cifar

VALUES = [
    None, True, False, 0, -1, 255, 65536, 2**31, -(2**63), 2**63 - 1, 0.5, float("inf"), "", "ä" * 300, b"", b"\xff" * 70_000,
    bytearray(b"ab"), [], (), {}, [1, [2, (3, 4, 5, 6), {"a": None, b"b": [], 3: ()}]], ((1,), (1, 2), (1, 2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back(protocol: int) -> None:
    for value in [*VALUES, VALUES]:
        known = {"_codecs.encode": lambda text, code: text.encode(code), "__builtin__.bytes": bytes}
        known["builtins.bytearray"] = known["__builtin__.bytearray"] = bytearray
        found = read_pickled(pickle.dumps(value, protocol), known)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("labels", [list, np.array, lambda x: np.array(x, ">i2"), lambda x: [np.int64(i) for i in x]])
def test_cifar_batches_of_every_protocol(protocol: int, labels: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(protocol)
    data, wanted = rng.integers(0, 256, (7, 3072), dtype=np.uint8), [3, 1, 4, 1, 5, 9, 2]
    content = {b"data": data, b"labels": labels(wanted), b"filenames": [b"x.png"] * 7, b"batch_label": b"1 of 5"}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
    images, found = cifar.read_batches(tmp_path, ("test_batch",))
    assert np.array_equal(images.numpy().reshape(7, -1), data) and found.tolist() == wanted


# the rest of the state of a dtype that has no fields
UNKNOWN = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def python2(count: int) -> bytes:
    """What Python 2 wrote: text as bytes, numpy by its old names. Made by hand, after the distributed files."""
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R("
    kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + UNKNOWN
    pixels = bytes(i % 251 for i in range(count * 3072))
    shape = b"M" + struct.pack("<H", count) + b"M\x00\x0c\x86"
    state = b"K\x01" + shape + kind + b"\x89T" + struct.pack("<I", len(pixels)) + pixels
    labels = b"](" + b"".join(b"K" + bytes([i % 10]) for i in range(count)) + b"e"
    return b"\x80\x02}q\x01(" + text(b"data") + array + state + b"tb" + text(b"labels") + labels + b"u."


def test_a_cifar_batch_of_python_2(tmp_path: Path) -> None:
    content = python2(300)
    assert pickle.loads(content, encoding="bytes")[b"data"].shape == (300, 3072)
    (tmp_path / "test_batch").write_bytes(content)
    images, labels = cifar.read_batches(tmp_path, ("test_batch",))
    assert images[0].flatten()[:3].tolist() == [0, 1, 2] and labels.tolist() == [i % 10 for i in range(300)]


def text_of(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(name: str, argument: str, *, stack: bool = False) -> bytes:
    """Instructions that call `name` ("module name") with a text."""
    module, function = name.split(" ")
    named = f"c{module}\n{function}\n".encode()
    if stack:
        named = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, function)) + b"\x93"
    return named + b"(" + text_of(argument) + b"tR"


def object_of_bytes(mark: str) -> bytes:
    """The gadget that was found: a numpy scalar of dtype object whose flags a BUILD has cleared takes bytes for an address."""
    kind = b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tR(K\x03X\x01\x00\x00\x00|" + UNKNOWN
    scalar = b"\x80\x02cnumpy.core.multiarray\nscalar\n(" + kind + b"C\x08" + struct.pack("<Q", id(os.system))
    return scalar + b"tR(" + text_of(mark) + b"tR."


NAMES = (
    "os system", "posix system", "nt system", "os popen", "builtins eval", "builtins exec", "__builtin__ eval",
    "subprocess getoutput", "numpy.testing runstring", "timeit timeit", "pdb run", "cProfile run", "runpy run_path",
    "torch.serialization load", "numpy load", "pickle loads", "_pickle loads", "builtins getattr", "builtins __import__",
    "importlib import_module", "webbrowser open", "ctypes CDLL", "numpy.core.multiarray fromfile", "torch.hub load",
    "asyncio.unix_events _UnixSubprocessTransport._start", "builtins breakpoint", "shutil rmtree",
    "torch.utils.cpp_extension load", "torch._utils _rebuild_tensor_v2.__globals__",
)  # fmt: skip


def gadgets(mark: str) -> dict[str, bytes]:
    """Pickles that would write the file `mark` if they were run."""
    shell = f"touch {mark}"
    python = f"open({mark!r}, 'w')"
    found = {}
    for name in NAMES:
        argument = shell if "system" in name or "popen" in name else python
        for stack in (False, True):
            found[f"{name} {stack}"] = b"\x80\x04" + call(name, argument, stack=stack) + b"."
    found["dotted"] = b"\x80\x04" + call("collections OrderedDict.__init__.__globals__", python, stack=True) + b"."
    found["old class"] = b"\x80\x02(" + text_of(shell) + b"ios\nsystem\n."
    found["obj"] = b"\x80\x02(cos\nsystem\n" + text_of(shell) + b"o."
    found["extension"] = b"\x80\x02\x82\x01."
    found["newobj"] = b"\x80\x04cio\nFileIO\n(" + text_of(mark) + text_of("w") + b"t\x81."
    found["state"] = pickle.dumps(Reduced(list, (), {"a": 1}), 4)
    found["object array"] = pickle.dumps(np.array([Reduced(os.system, (shell,))], dtype=object), 4)
    found["bytes as an object"] = object_of_bytes(shell)
    found["partial"] = pickle.dumps(Reduced(__import__("functools").partial, (os.system, shell)), 4)
    return found


@pytest.mark.parametrize("name", gadgets("mark"))
def test_gadgets_do_nothing(name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "test_batch"
    gadget = gadgets(str(mark))[name]
    body = gadget[2:-1]
    array = pickle.dumps(np.zeros((1, 3072), np.uint8), 2)[2:-1]
    inside = b"\x80\x04}(C\x04data" + array + b"C\x06labels](" + body + b"eu."
    for content in (gadget, inside, b"\x80\x04" + body + b"0" + inside[2:]):
        path.write_bytes(content)
        with pytest.raises(FileError):
            cifar.read_batches(tmp_path, ("test_batch",))
        write_archive(path, content)
        with pytest.raises(FileError):
            read_tensors(path)
    assert not mark.exists()


def write_archive(path: Path, data: bytes) -> None:
    """A file of torch.save with another pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", sys.byteorder)
        archive.writestr("archive/data/0", bytes(8))


def test_nothing_is_imported_for_a_name(tmp_path: Path) -> None:
    """Looking a name up would import its module."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    (tmp_path / "test_batch").write_bytes(b"\x80\x04" + call("evil_module f", "x") + b".")
    code = "from spectral_kernels.training import cifar; from pathlib import Path; cifar.read_batches(Path(), ('test_batch',))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "it asks for evil_module.f" in done.stderr and "imported" not in done.stderr


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no pickle"),
        (b"\x80\x04", "no pickle"),
        (b"\x80\x04.", "no pickle"),
        (b"\x80\x04R.", "without its values"),
        (b"\x80\x04NNR.", "a call of what is no function"),
        (b"\x80\x04e.", "no pickle"),
        (b"\x80\x04(e.", "no pickle"),
        (b"\x80\x04N(Ne.", "values for what is no list"),
        (b"\x80\x04}(Nu.", "no pickle|an instruction"),
        (b"\x80\x04})Ns.", "a key that is a tuple"),
        (b"\x80\x04}" + b")" * 3 + b"\x87Ns.", "a key that is a tuple"),
        (b"\x80\x04h\x05.", "no pickle"),
        (b"\x80\x04NNb.", "a state of what has none"),
        (b"\x80\x04NQ.", "BINPERSID"),
        (b"\x80\x04\x8b" + struct.pack("<I", 100) + b"\x01" * 100 + b".", "more than 64 bits"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "no pickle"),
        (b"\x80\x04I1\n.", "an instruction INT"),
        (b"\x80\x04\xff.", "no pickle"),
    ],
)
def test_what_is_no_pickle_of_plain_data(content: bytes, message: str) -> None:
    with pytest.raises(NotPlain, match=message):
        read_pickled(content, {})


def test_size_and_depth_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotPlain, match="at most"):
        read_pickled(bytes(pickled.LIMIT + 1), {})
    deep = read_pickled(b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".", {})
    with pytest.raises(NotPlain, match="nested too deep"):
        as_tree(deep, lambda value: value)
    itself = read_pickled(b"\x80\x04]\x94h\x00a.", {})
    assert itself[0] is itself
    with pytest.raises(NotPlain, match="nested too deep"):
        as_tree(itself, lambda value: value)
    # each list holds the one before ten times
    lists = b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"e\x94" for i in range(20))
    laughs = read_pickled(b"\x80\x04]\x94" + lists + b".", {})
    monkeypatch.setattr(pickled, "MOST", 1000)
    with pytest.raises(NotPlain, match="more than 1000 values"):
        as_tree(laughs, lambda value: value)
    with pytest.raises(NotPlain, match="more than 1000 instructions"):
        read_pickled(b"\x80\x04" + b"N" * 1001 + b".", {})


def test_instructions_are_those_of_the_standard_library() -> None:
    """Of all of them, these are what plain data, torch and numpy use."""
    names = {opcode.name for opcode in pickletools.opcodes}
    source = Path(pickled.__file__).read_text(encoding="utf-8")
    used = {word for word in names if f'"{word}"' in source}
    assert len(used) > 40 and not used & {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "PERSID"}
