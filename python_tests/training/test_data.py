"""Data sets: what is read, where it is looked for, and what a bad file is told."""

import gzip
import struct
from pathlib import Path

import pytest
import torch
from training_helpers import blobs

from spectral_kernels.optional import require
from spectral_kernels.training import data


def idx(array: torch.Tensor) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + bytes(array.flatten().tolist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fashion-MNIST's four files with 6 + 4 images."""
    generator = torch.Generator().manual_seed(1)
    for key, stem in data.IDX_FILES.items():
        count = 6 if key.startswith("train") else 4
        shape, high = ((count, 28, 28), 256) if key.endswith("images") else ((count,), 10)
        content = idx(torch.randint(0, high, shape, generator=generator))
        (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(content))
    return tmp_path


def test_reads_what_was_written(folder: Path) -> None:
    loaded = data.load("fashion_mnist", folder)
    expected = torch.randint(0, 256, (6, 28, 28), generator=torch.Generator().manual_seed(1))
    assert loaded.train_images.dtype == torch.uint8 and torch.equal(loaded.train_images[:, 0].long(), expected)
    assert loaded.test_labels.shape == (4,) and loaded.test_labels.dtype == torch.int64
    assert len(loaded.classes) == 10


def test_plain_files_do_as_well(folder: Path) -> None:
    zipped = data.load("fashion_mnist", folder)
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert torch.equal(data.load("fashion_mnist", folder).test_images, zipped.test_images)


def test_places_in_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("SPECTRAL_KERNELS_DATA", str(folder))
    assert len(data.load("fashion_mnist", download=False).train_labels) == 6
    monkeypatch.delenv("SPECTRAL_KERNELS_DATA")
    extracted = elsewhere / "data" / data.DEBIAN_PATH
    extracted.parent.mkdir(parents=True)
    extracted.symlink_to(folder)
    assert len(data.load("fashion_mnist", download=False).train_labels) == 6


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("train_images", lambda b: gzip.compress(b)[:-40], "cannot be read as gzip"),
        ("train_images", lambda b: b"not gzip at all", "cannot be read as gzip"),
        ("train_images", lambda b: gzip.compress(b[:-1]), "is truncated: 4703 bytes where 4704 are"),
        ("train_images", lambda b: gzip.compress(b + b"x"), "holds more bytes than its header says"),
        ("train_images", lambda b: gzip.compress(b[:9]), "truncated: 9 bytes"),
        ("train_images", lambda b: gzip.compress(b"\x00\x00\x0d\x03" + b[4:]), "magic number 0x00000d03"),
        ("train_images", lambda b: gzip.compress(b"\x00\x00\x08\x01" + b[4:]), "1 dimensions, expected 3"),
        ("test_labels", lambda b: gzip.compress(idx(torch.tensor([1, 2, 3]))), "4 test images but 3 test labels"),
        ("test_labels", lambda b: gzip.compress(idx(torch.full((4,), 11))), "a test label is 11"),
    ],
)
def test_bad_files_are_named(folder: Path, key: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = folder / f"{data.IDX_FILES[key]}.gz"
    path.write_bytes(change(gzip.decompress(path.read_bytes())))
    with pytest.raises(ValueError, match=message) as caught:
        data.load("fashion_mnist", folder)
    assert path.name in str(caught.value) or str(folder) in str(caught.value)


@pytest.mark.parametrize("fallback", [None, "digits"])
def test_a_missing_data_set_says_where_and_how(fallback: str | None, tmp_path: Path) -> None:
    """A root that was named has no fallback."""
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist") as caught:
        data.load("fashion_mnist", tmp_path / "nowhere", fallback=fallback)
    assert str(tmp_path / "nowhere") in str(caught.value) and "\n" not in str(caught.value)


def test_fallback_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")

    def nothing(*_: object) -> None:
        raise data.DataNotFound("nothing here")

    monkeypatch.setattr(data, "_fashion_mnist", nothing)
    loaded = data.load("fashion_mnist", fallback="digits")
    assert loaded.name == "digits" and loaded.train_images.shape == (1438, 1, 8, 8) and len(loaded.test_labels) == 359
    assert int(loaded.train_images.max()) == 255
    out = capsys.readouterr().out
    assert "digits instead" in out and out.count("\n") == 1


def test_download_is_tried_last(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPECTRAL_KERNELS_DATA", raising=False)
    monkeypatch.setattr(data, "fashion_folders", lambda root: [tmp_path / "nowhere"])

    class Datasets:
        @staticmethod
        def FashionMNIST(root: str, train: bool, download: bool) -> None:
            raw = Path(root) / "FashionMNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.gz"):
                (raw / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(data, "import_torchvision", lambda part: Datasets)
    assert len(data.load("fashion_mnist", download=True).train_labels) == 6
    assert "Downloading" in capsys.readouterr().out

    def fails(part: str) -> None:
        raise ImportError("no torchvision here")

    monkeypatch.setattr(data, "import_torchvision", fails)
    with pytest.raises(FileNotFoundError, match="no torchvision here"):
        data.load("fashion_mnist", download=True)
    with pytest.raises(FileNotFoundError, match=r"data\.download is false"):
        data.load("fashion_mnist")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"name must be one of fashion_mnist, .*, got 'imagenet'"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="fallback must be one of digits, got 'noise'"):
        data.load("fashion_mnist", fallback="noise")


def test_missing_package_names_the_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"a test needs no_such, .*spectral_kernels\[train\]"):
        require("no_such.module", "a test")


def test_long_tail() -> None:
    source = blobs(count=400)
    images, labels = data.training_pool(source, long_tail=8, seed=3)
    assert labels.bincount().tolist() == [100, 50, 25, 12]
    assert len(images) == 187
    again, _ = data.training_pool(source, long_tail=8, seed=3)
    other, _ = data.training_pool(source, long_tail=8, seed=4)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    with pytest.raises(ValueError, match=r"long_tail must be a finite ratio of at least 1, got 0\.5"):
        data.training_pool(source, long_tail=0.5)


def test_duplicates_are_near_and_of_the_same_class() -> None:
    source = blobs(count=200)
    images, labels = data.training_pool(source, duplicates=0.5, seed=0)
    assert images.shape == source.train_images.shape
    kept, copies = images[:100].float().flatten(1), images[100:].float().flatten(1)
    distance, nearest = torch.cdist(copies, kept).min(1)
    assert float(distance.max()) < 8 * 8  # 64 pixels off by some 4 levels each
    assert torch.equal(labels[:100][nearest], labels[100:])
    with pytest.raises(ValueError, match=r"duplicates must be in \[0, 1\), got 1"):
        data.training_pool(source, duplicates=1)
