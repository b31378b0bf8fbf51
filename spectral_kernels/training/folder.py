"""Class folders of image files (ImageNet's layout), decoded once into a file of pixels that is mapped into memory.

Training then reads the rows of a batch and nothing else: no JPEG is decoded twice, and the set may be larger than memory.
Of an image the middle square is scaled to `size`; crops are taken from that.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.files import lock
from spectral_kernels.files.reading import FileError, opened, read_json, shown
from spectral_kernels.files.writing import replacing, sweep, write_json
from spectral_kernels.optional import require
from spectral_kernels.training import pictures

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
CORRUPT = ("refuse", "skip")
IMAGENET100 = Path(__file__).with_name("imagenet100.txt")
# of the pixels: another one where they are made in another way
FORMAT = 2
INDEX = 2**26  # bytes of the longest index of a cache


def imagenet100_classes() -> tuple[str, ...]:
    """The 100 synsets of ImageNet-100 (Tian, Krishnan & Isola 2020), sorted."""
    return tuple(IMAGENET100.read_text(encoding="ascii").split())


@dataclass(frozen=True)
class FolderImages:
    """images: (N, 3, size, size) uint8, mapped from the cache; labels: (N,) int64; files: relative to the root."""

    images: Tensor
    labels: Tensor
    files: tuple[str, ...]
    classes: tuple[str, ...]


def list_files(root: Path, classes: Sequence[str] | None = None) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Image files by class folder, sorted; labels; names of the classes.

    Args:
        classes: take these folders only, all of which must be there and hold an image; None: every folder that holds one.

    Raises:
        FileNotFoundError: no such root, a missing class, one without images, or no image at all.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{shown(root)} is no folder")
    names = classes
    if names is None:
        names = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    _all_there(root, names, [name for name in names if not (root / name).is_dir()], "lacks")
    found = {name: _images(root / name) for name in names}
    empty = [name for name in names if not found[name]]
    if classes is not None:
        _all_there(root, names, empty, "has no image in")
    names = [name for name in names if found[name]]  # a folder without images is no class
    if not names:
        raise FileNotFoundError(f"{shown(root)} holds no image in class folders ({', '.join(SUFFIXES)})")
    labels = [label for label, name in enumerate(names) for _ in found[name]]
    return [path for name in names for path in found[name]], labels, tuple(names)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())


def _all_there(root: Path, names: Sequence[str], missing: Sequence[str], what: str) -> None:
    if missing:
        listed = ", ".join(map(shown, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise FileNotFoundError(f"{shown(root)} {what} {len(missing)} of {len(names)} class folders: {listed}")


def read_folder(
    root: str | Path,
    cache: str | Path,
    *,
    size: int,
    classes: Sequence[str] | None = None,
    corrupt: str = "refuse",
    workers: int | None = None,
) -> FolderImages:
    """The images of a tree of class folders; decoded into `cache` at the first call, read from there afterwards.

    Args:
        root: holds a folder for each class.
        cache: folder of the decoded pixels, N·3·size² bytes; another tree, size or change of a file gets a file of its own.
            One process decodes at a time, others wait for it.
        size: pixels of either side, from 8 on.
        classes: see `list_files`.
        corrupt: of a file that cannot be decoded: `"refuse"` it by name, or `"skip"` it and say so.
        workers: threads that decode (Pillow works outside of Python's lock); None: one for each core.

    Raises:
        FileNotFoundError: see `list_files`. ValueError: an image that cannot be decoded (up to five are named), size or
            corrupt out of range; FileError: a cache that is damaged. ModuleNotFoundError: Pillow is missing. OSError: the
            cache cannot be written.
    """
    checks.integer(size, "size", 8)
    checks.one_of(corrupt, "corrupt", CORRUPT)
    root = Path(root)
    files, labels, names = list_files(root, classes)
    stem = Path(cache) / _digest(root, files, size, corrupt)
    if not stem.with_suffix(".json").is_file():
        held = lock.hold(stem.parent, wait=True)
        sweep(stem.parent)
        if not stem.with_suffix(".json").is_file():
            _decode_all(root, files, stem, size, corrupt, workers)
        del held
    kept = _kept(stem, len(files))
    images = _pixels(stem.with_suffix(".pixels"), len(kept), size)
    relative = tuple(str(files[place].relative_to(root)) for place in kept)
    return FolderImages(images, torch.tensor([labels[place] for place in kept]), relative, names)


def _kept(stem: Path, count: int) -> list[int]:
    """Which of the files are in the cache."""
    index = stem.with_suffix(".json")
    content = read_json(index, INDEX)
    skipped = content.get("skipped") if isinstance(content, dict) else None
    if not isinstance(skipped, list) or any(type(place) is not int or not 0 <= place < count for place in skipped):
        raise FileError(index, f"is no index of a cache: remove it and {stem.with_suffix('.pixels').name}")
    return sorted(set(range(count)) - set(skipped))


def _pixels(path: Path, count: int, size: int) -> Tensor:
    wanted = 3 * size * size * count
    try:
        with opened(path) as file:
            there = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise FileError(path, "is missing: remove its .json too, and it is made again") from error
    if there != wanted:
        raise FileError(path, f"holds {there} bytes where {wanted} are expected: remove it and its .json")
    return torch.from_file(str(path), shared=False, size=wanted, dtype=torch.uint8).reshape(count, 3, size, size)


def _digest(root: Path, files: Sequence[Path], size: int, corrupt: str) -> str:
    """Of what the pixels are made from; labels and classes are never read from a cache."""
    found = hashlib.sha256(repr((FORMAT, size, corrupt)).encode())
    for path in files:
        try:
            status = path.stat()
            version = status.st_size, status.st_mtime_ns
        except OSError:  # a link to nowhere; decoding says so
            version = 0, 0
        found.update(repr((os.fsencode(path.relative_to(root)), version)).encode())
    return found.hexdigest()[:16]


def _decode_all(root: Path, files: Sequence[Path], stem: Path, size: int, corrupt: str, workers: int | None) -> None:
    require("PIL.Image", "decoding images", "Pillow")
    began, count = time.monotonic(), 0
    bad: dict[int, str] = {}
    with replacing(stem.with_suffix(".pixels")) as out:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            # in slices, so that what is decoded and not yet written stays small
            for first in range(0, len(files), 1024):
                part = files[first : first + 1024]
                decoded = pool.map(lambda path: pictures.try_decode(path, size), part)
                for place, (pixels, reason) in enumerate(decoded, first):
                    if pixels is None:
                        bad[place] = reason
                    else:
                        out.write(pixels)
        count = len(files) - len(bad)
        if bad:
            some = list(bad.items())[:5]
            named = "; ".join(f"{shown(files[place])} ({reason})" for place, reason in some)
            named += "; …" if len(bad) > 5 else ""
            if corrupt == "refuse" or not count:
                raise ValueError(
                    f"{len(bad)} of {len(files)} images cannot be decoded: {named}. data.corrupt=skip skips them"
                )
            print(f"Skipped {len(bad)} of {len(files)} images that cannot be decoded: {named}", flush=True)
    seconds = max(time.monotonic() - began, 1e-9)
    print(f"Decoded {count} images of {shown(root)} in {seconds:.1f} s ({count / seconds:.0f} a second)", flush=True)
    write_json(stem.with_suffix(".json"), {"skipped": list(bad)})  # last: it says that the pixels are whole
