"""CIFAR-10 batches and class folders: tiny trees in the true format, and what is wrong with a file."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Reduced
from PIL import Image

from spectral_kernels.files.reading import FileError
from spectral_kernels.training import cifar, folder
from spectral_kernels.training.data import DataNotFound, load


def write_cifar(root: Path, count: int = 4) -> dict[str, np.ndarray]:
    """The layout of cifar-10-python.tar.gz, with few images."""
    target = root / "cifar-10-batches-py"
    target.mkdir(parents=True)
    rng, wanted = np.random.default_rng(0), {}
    for name in (*cifar.TRAIN_FILES, *cifar.TEST_FILES):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(count)]
        content = {b"batch_label": b"x", b"labels": labels, b"data": data, b"filenames": [b"a.png"]}
        (target / name).write_bytes(pickle.dumps(content, protocol=2))
        wanted[name] = data
    return wanted


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = write_cifar(tmp_path)
    data = load("cifar10", tmp_path)
    assert data.train_images.shape == (20, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert np.array_equal(data.train_images[4].numpy().reshape(-1), wanted["data_batch_2"][0])
    assert data.test_labels.tolist() == [0, 1, 2, 3] and data.classes[3] == "cat"
    assert load("cifar10", tmp_path / "cifar-10-batches-py").train_labels.tolist() == data.train_labels.tolist()
    monkeypatch.setenv("SPECTRAL_KERNELS_DATA", str(tmp_path))
    assert len(load("cifar10").train_images) == 20
    with pytest.raises(DataNotFound, match=r"no CIFAR-10 in .*: unpack cifar-10-python\.tar\.gz"):
        load("cifar10", tmp_path / "elsewhere")


def test_bad_cifar_batches(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-40], "data_batch_3 cannot be read as a CIFAR-10 batch"),
        (b"", "data_batch_3 cannot be read"),
        (
            pickle.dumps({b"data": Reduced(os.system, ("true",))}),
            "cannot be read as a CIFAR-10 batch: it asks for posix.system",
        ),
        (pickle.dumps([1]), "data_batch_3 cannot be read as a CIFAR-10 batch: it has no data and labels"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 images and 1 labels"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "numbers from 0 to 9"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.int8), b"labels": [1]}), "no array of bytes"),
        (pickle.dumps({b"data": np.zeros((1, 1024), np.uint8), b"labels": [1]}), r"shape \(1, 1024\), \(N, 3072\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3 does not exist"):
        load("cifar10", tmp_path)


def write_tree(root: Path, classes: tuple[str, ...], count: int = 3, size: tuple[int, int] = (40, 30)) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{number}.JPEG", quality=95)


def test_imagenet100_is_a_subset_of_a_full_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = folder.imagenet100_classes()
    assert len(set(classes)) == 100 and all(len(name) == 9 and name[0] == "n" for name in classes)
    assert {"n02869837", "n01749939", "n02090622"} <= set(classes)
    write_tree(tmp_path, (*classes, "n01440764", "n01443537"), count=1)
    data = load("imagenet100", tmp_path, size=16)
    assert data.train_images.shape == (100, 3, 16, 16) and data.classes == tuple(sorted(classes))
    assert data.train_labels.tolist() == data.test_labels.tolist() == list(range(100))
    assert "Decoded 100 images" in capsys.readouterr().out
    assert torch.equal(load("imagenet100", tmp_path, size=16).train_images, data.train_images)
    assert "Decoded" not in capsys.readouterr().out  # from the cache
    for path in (tmp_path / "train" / classes[5]).iterdir():
        path.unlink()
    (tmp_path / "train" / classes[5]).rmdir()
    with pytest.raises(DataNotFound, match=f"lacks 1 of 100 class folders: {classes[5]}"):
        load("imagenet100", tmp_path, size=16)


def test_pixels_are_the_scaled_middle(tmp_path: Path) -> None:
    """Left half red, right half blue, wider than high: the middle is red to the left and blue to the right."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        picture = Image.new("RGB", (200, 100), (255, 0, 0))
        picture.paste((0, 0, 255), (100, 0, 200, 100))
        picture.save(tmp_path / split / "a" / "1.png")
        Image.new("L", (50, 90), 77).save(tmp_path / split / "a" / "2.png")  # grey, higher than wide
    data = load("folder", tmp_path, size=32)
    first, second = data.train_images
    assert first[:, 16, 4].tolist() == [255, 0, 0] and first[:, 16, 28].tolist() == [0, 0, 255]
    assert torch.equal(second, torch.full((3, 32, 32), 77, dtype=torch.uint8))


def test_a_changed_file_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "data", ("a", "b"))
    monkeypatch.setenv("SPECTRAL_KERNELS_CACHE", str(tmp_path / "cache"))
    before = load("folder", tmp_path / "data", size=8).train_images.clone()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "data" / "train" / "b" / "b_2.JPEG")
    after = load("folder", tmp_path / "data", size=8).train_images
    assert torch.equal(after[:5], before[:5]) and not torch.equal(after[5], before[5])
    assert not (tmp_path / "data" / ".spectral_kernels").exists()


def test_files_that_cannot_be_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, ("a", "b"), size=(200, 200))
    truncated = tmp_path / "train" / "a" / "a_1.JPEG"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    (tmp_path / "train" / "b" / "b_0.JPEG").write_bytes(b"no image")
    message = r"2 of 6 images cannot be decoded: .*a_1\.JPEG \(.*\); .*b_0\.JPEG \(.*data\.corrupt=skip"
    with pytest.raises(ValueError, match=message):
        load("folder", tmp_path, size=16)
    assert not list((tmp_path / ".spectral_kernels").glob("*.json"))
    data = load("folder", tmp_path, size=16, corrupt="skip")
    assert data.train_labels.tolist() == [0, 0, 1, 1] and len(data.test_labels) == 6
    assert "Skipped 2 of 6 images that cannot be decoded: " in capsys.readouterr().out


def test_bad_trees(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.name = folder needs data\.root"):
        load("folder")
    with pytest.raises(DataNotFound, match="train is no folder"):
        load("folder", tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataNotFound, match="holds no image in class folders"):
        load("folder", tmp_path)
    write_tree(tmp_path / "t", ("a",))
    with pytest.raises(ValueError, match="size must be at least 8, got 4"):
        load("folder", tmp_path / "t", size=4)


def test_classes_without_images_shift_no_label(tmp_path: Path) -> None:
    write_tree(tmp_path, ("b", "d"))
    for name in ("a", "c", "e"):
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / name / "notes.txt").write_text("no image")
    data = load("folder", tmp_path, size=8)
    assert data.classes == ("b", "d") and data.train_labels.tolist() == data.test_labels.tolist() == [0] * 3 + [1] * 3
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "b" / "more.png")
    (tmp_path / "val" / "f").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "f" / "more.png")
    with pytest.raises(ValueError, match="val holds classes that train has not: f"):
        load("folder", tmp_path, size=8)


def test_a_cache_belongs_to_its_classes(tmp_path: Path) -> None:
    """The same files under other classes, or under the same names in another order, are other data."""
    write_tree(tmp_path, ("a", "b", "c"))
    root, cache = tmp_path / "train", tmp_path / "cache"
    first = folder.read_folder(root, cache, size=8)
    assert first.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    some = folder.read_folder(root, cache, size=8, classes=("c", "a"))
    assert some.labels.tolist() == [0] * 3 + [1] * 3 and some.classes == ("c", "a")
    assert torch.equal(some.images, first.images[[6, 7, 8, 0, 1, 2]])
    for path in (root / "a").iterdir():
        path.unlink()
    left = folder.read_folder(root, cache, size=8)
    assert left.classes == ("b", "c") and left.labels.tolist() == [0] * 3 + [1] * 3
    with pytest.raises(FileNotFoundError, match="train has no image in 1 of 3 class folders: a"):
        folder.read_folder(root, cache, size=8, classes=("a", "b", "c"))


def test_damaged_caches(tmp_path: Path) -> None:
    write_tree(tmp_path, ("a", "b"))
    (tmp_path / "train" / "a" / "a_1.JPEG").write_bytes(b"no image")
    cache = tmp_path / "cache"

    def read() -> torch.Tensor:
        return folder.read_folder(tmp_path / "train", cache, size=8, corrupt="skip").images

    before = read().clone()
    (index,), (pixels,) = cache.glob("*.json"), cache.glob("*.pixels")
    whole = index.read_text(encoding="utf-8")
    bad = ["[9]", "[-1]", "[true]", "1"]
    for text in ("", "{}", "[1]", "[" * 9999, *(f'{{"skipped": {value}}}' for value in bad)):
        index.write_text(text)
        with pytest.raises(FileError, match=f"{index} is no"):
            read()
    for text in ('{"skipped": []}', '{"skipped": [0, 1]}'):  # of other pixels
        index.write_text(text)
        with pytest.raises(FileError, match=rf"{pixels} holds 960 bytes where \d+ are expected: remove it"):
            read()
    index.write_text(whole)
    content = pixels.read_bytes()
    for damaged in (content[:-1], content + b"x", b""):
        pixels.write_bytes(damaged)
        with pytest.raises(FileError, match=f"{pixels} holds {len(damaged)} bytes where 960 are expected"):
            read()
    pixels.unlink()
    with pytest.raises(FileError, match=rf"{pixels} is missing: remove its \.json too"):
        read()
    os.mkfifo(pixels)
    with pytest.raises(FileError, match="is a pipe"):
        read()
    pixels.unlink()
    index.unlink()
    (cache / f".{pixels.name}.99-0123abcd.tmp").write_bytes(b"left by a process that was killed")
    assert torch.equal(read(), before) and not list(cache.glob(".*.tmp"))


def test_odd_names_and_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = os.fsencode(tmp_path / "train")
    for name in (b"a", b"b\xff"):
        os.makedirs(os.path.join(root, name))
        with open(os.path.join(root, name, b"1\xfe\x1b[31m.png"), "wb") as file:
            Image.new("RGB", (9, 9), (5, 6, 7)).save(file, "PNG")
    (tmp_path / "train" / "a" / "folder.png").mkdir()
    (tmp_path / "train" / "a" / "link.png").symlink_to(tmp_path / "train" / "a")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    (tmp_path / "train" / "a" / "nowhere.png").symlink_to("nowhere")
    message = r"2 of 4 images cannot be decoded: .*nowhere\.png \(does not exist\).*\(is a pipe"
    with pytest.raises(ValueError, match=message):
        folder.read_folder(tmp_path / "train", tmp_path / "cache", size=8)
    found = folder.read_folder(tmp_path / "train", tmp_path / "cache", size=8, corrupt="skip")
    assert found.labels.tolist() == [0, 1] and found.images[:, :, 0, 0].tolist() == [[5, 6, 7]] * 2
    assert "\x1b" not in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    write_tree(tmp_path, ("a",))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="cache"):
        folder.read_folder(tmp_path / "train", tmp_path / "cache", size=8)
