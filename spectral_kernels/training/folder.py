"""Class folders of image files (ImageNet's layout), decoded once into a file of pixels that is mapped into memory.

Training then reads the rows of a batch and nothing else: no JPEG is decoded twice, and the set may be larger than memory.
An image is scaled so that its shorter side is `size`, and its middle is kept; crops are taken from that.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.training.data import require

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
CORRUPT = ("refuse", "skip")
IMAGENET100 = Path(__file__).with_name("imagenet100.txt")


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
        classes: take these folders only, all of which must be there; None: every folder that holds an image.

    Raises:
        FileNotFoundError: no such root, a missing class, or no image at all.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    if classes is None:
        classes = sorted(
            folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")
        )
    missing = [name for name in classes if not (root / name).is_dir()]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise FileNotFoundError(f"{root} lacks {len(missing)} of {len(classes)} class folders: {shown}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(f"{root} holds no image in class folders ({', '.join(SUFFIXES)})")
    return files, labels, tuple(classes)


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
        size: pixels of either side, from 8 on.
        classes: see `list_files`.
        corrupt: of a file that cannot be decoded: `"refuse"` it by name, or `"skip"` it and say so.
        workers: threads that decode (Pillow works outside of Python's lock); None: one for each core.

    Raises:
        FileNotFoundError: see `list_files`. ValueError: an image that cannot be decoded (up to five are named), or size
            or corrupt out of range. ModuleNotFoundError: Pillow is missing.
    """
    checks.integer(size, "size", 8)
    checks.one_of(corrupt, "corrupt", CORRUPT)
    root = Path(root)
    files, labels, names = list_files(root, classes)
    stem = Path(cache) / _digest(root, files, size, corrupt)
    index = stem.with_suffix(".json")
    if not index.is_file():
        _decode_all(root, files, labels, stem, size, corrupt, workers)
    content = json.loads(index.read_text(encoding="utf-8"))
    kept, shape = content["files"], (len(content["files"]), 3, size, size)
    images = torch.from_file(
        str(stem.with_suffix(".pixels")), shared=False, size=3 * size * size * len(kept), dtype=torch.uint8
    )
    return FolderImages(images.reshape(shape), torch.tensor(content["labels"]), tuple(kept), names)


def _digest(root: Path, files: Sequence[Path], size: int, corrupt: str) -> str:
    found = hashlib.sha256(f"{size} {corrupt}".encode())
    for path in files:
        status = path.stat()
        found.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def _decode_all(
    root: Path, files: Sequence[Path], labels: Sequence[int], stem: Path, size: int, corrupt: str, workers: int | None
) -> None:
    require("PIL.Image", "decoding images", "Pillow")
    stem.parent.mkdir(parents=True, exist_ok=True)
    began, temporary = time.monotonic(), stem.with_name(f".{stem.name}.{os.getpid()}.tmp")
    bad: list[tuple[Path, str]] = []
    kept: list[int] = []
    try:
        with temporary.open("wb") as out, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            # in slices, so that what is decoded and not yet written stays small
            for first in range(0, len(files), 1024):
                part = files[first : first + 1024]
                for place, (pixels, reason) in enumerate(pool.map(lambda path: _decode(path, size), part)):
                    if pixels is None:
                        bad.append((part[place], reason))
                    else:
                        kept.append(first + place)
                        out.write(pixels)
        if bad:
            named = "; ".join(f"{path} ({reason})" for path, reason in bad[:5]) + ("; …" if len(bad) > 5 else "")
            if corrupt == "refuse" or not kept:
                raise ValueError(
                    f"{len(bad)} of {len(files)} images cannot be decoded: {named}. data.corrupt=skip skips them"
                )
            print(f"Skipped {len(bad)} of {len(files)} images that cannot be decoded: {named}", flush=True)
        os.replace(temporary, stem.with_suffix(".pixels"))
    finally:
        temporary.unlink(missing_ok=True)
    seconds = max(time.monotonic() - began, 1e-9)
    print(f"Decoded {len(kept)} images of {root} in {seconds:.1f} s ({len(kept) / seconds:.0f} a second)", flush=True)
    content = {"files": [str(files[i].relative_to(root)) for i in kept], "labels": [labels[i] for i in kept]}
    index = stem.with_name(f".{stem.name}.json.tmp")
    index.write_text(json.dumps(content), encoding="utf-8")
    os.replace(index, stem.with_suffix(".json"))  # last: it says that the pixels are whole


def _decode(path: Path, size: int) -> tuple[bytes | None, str]:
    """Pixels (3, size, size) as bytes, or why there are none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (size, size))  # a JPEG is scaled as it is decoded, never below `size`
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return None, str(error).split(" '", maxsplit=1)[0] or type(error).__name__
    width, height = picture.size
    scale = size / min(width, height)
    resized = picture.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    cropped = resized.crop((left, top, left + size, top + size))
    return b"".join(band.tobytes() for band in cropped.split()), ""
