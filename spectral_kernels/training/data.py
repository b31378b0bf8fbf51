"""Image data sets, in memory or mapped there: found on disk, downloaded where that is allowed, or one clear error."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.files.idx import read_idx
from spectral_kernels.files.reading import shown
from spectral_kernels.optional import import_torchvision, require
from spectral_kernels.training import cifar
from spectral_kernels.training.folder import imagenet100_classes, list_files, read_folder

NAMES = ("fashion_mnist", "digits", "cifar10", "imagenet100", "folder")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_PATH = "usr/share/datasets/fashion-mnist"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    train_images, test_images: (N, C, H, W) uint8; train_labels, test_labels: (N,) int64 in [0, len(classes)).
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str
    classes: tuple[str, ...]

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data with its tensors on `device`."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        train_images, train_labels, test_images, test_labels = (tensor.to(device) for tensor in tensors)
        return ImageData(train_images, train_labels, test_images, test_labels, self.name, self.classes)


class DataNotFound(FileNotFoundError):
    """A data set is nowhere to be found; the message says where it was looked for and how to get it."""


def load(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    fallback: str | None = None,
    size: int = 224,
    corrupt: str = "refuse",
    workers: int | None = None,
) -> ImageData:
    """Load a data set into memory, or map it there.

    Fashion-MNIST is looked for as IDX files (gzipped or not) in `root`, or, without a root, in
    $SPECTRAL_KERNELS_DATA, ./data/fashion-mnist, ./data/FashionMNIST/raw, an extracted Debian package
    under ./data, and where the installed Debian package `dataset-fashion-mnist` puts it; then, with
    `download` and without `root`, torchvision downloads it into ./data.

    Args:
        name: `"fashion_mnist"` (60,000 + 10,000 photographs, 1×28×28) or `"digits"` (scikit-learn's bundled
            1,797 scans of digits, 1×8×8: every fifth one is a test image), `"cifar10"` (the python batches in
            `root`, in $SPECTRAL_KERNELS_DATA or ./data; 50,000 + 10,000 photographs, 3×32×32), `"imagenet100"`
            (`root`/train and `root`/val with ImageNet's class folders, of which the 100 of the standard list are
            taken), `"folder"` (the same of any classes). Of the last two see `folder.read_folder`; pixels are kept in
            `root`/.spectral_kernels, or in $SPECTRAL_KERNELS_CACHE.
        root: the one folder to look in.
        download: whether torchvision may download.
        fallback: `"digits"`: without a root, use those, and say so in one line, where `name` cannot be had.
        size, corrupt, workers: of class folders, see `folder.read_folder`.

    Raises:
        ValueError: unknown name or fallback; FileError: a file that is not what its name says (it is named).
        DataNotFound: no data set; a FileNotFoundError.
        ModuleNotFoundError: `"digits"` without scikit-learn.
    """
    checks.one_of(name, "name", NAMES)
    if fallback is not None:
        checks.one_of(fallback, "fallback", ("digits",))
    if name == "digits":
        return _digits()
    if name == "cifar10":
        return _cifar10(root)
    if name in ("imagenet100", "folder"):
        return _class_folders(name, root, size, corrupt, workers)
    try:
        return _fashion_mnist(root, download)
    except DataNotFound as error:
        if fallback is None or root is not None:
            raise
        print(f"Fashion-MNIST cannot be had here; using scikit-learn's bundled digits instead. ({error})")
        return _digits()


def _digits() -> ImageData:
    bundle = require("sklearn.datasets", "the data set 'digits'", "scikit-learn").load_digits()
    images = torch.as_tensor(bundle.images, dtype=torch.float64)
    images = (images * (255 / 16)).round().to(torch.uint8).unsqueeze(1).contiguous()
    labels = torch.as_tensor(bundle.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 4
    classes = tuple(str(name) for name in bundle.target_names)
    return ImageData(images[~test], labels[~test], images[test], labels[test], "digits", classes)


# --- CIFAR-10 and class folders


def _cifar10(root: str | Path | None) -> ImageData:
    variable = os.environ.get("SPECTRAL_KERNELS_DATA")
    roots = [Path(root)] if root is not None else [*([Path(variable)] if variable else []), Path("data")]
    folder = next((found for place in roots if (found := cifar.cifar_folder(place)) is not None), None)
    if folder is None:
        raise DataNotFound(
            f"no CIFAR-10 in {', '.join(map(str, roots))}: unpack cifar-10-python.tar.gz "
            f"(https://www.cs.toronto.edu/~kriz/cifar.html) there, so that it holds {cifar.FOLDER}"
        )
    train, test = (cifar.read_batches(folder, names) for names in (cifar.TRAIN_FILES, cifar.TEST_FILES))
    return ImageData(*train, *test, "cifar10", cifar.CLASSES)


def _class_folders(name: str, root: str | Path | None, size: int, corrupt: str, workers: int | None) -> ImageData:
    if root is None:
        raise ValueError(f"data.name = {name} needs data.root, a folder that holds train and val")
    variable = os.environ.get("SPECTRAL_KERNELS_CACHE")
    cache = Path(variable) if variable else Path(root) / ".spectral_kernels"
    classes = imagenet100_classes() if name == "imagenet100" else None
    parts = []
    for split in ("train", "val"):
        try:
            parts.append(
                read_folder(Path(root) / split, cache, size=size, classes=classes, corrupt=corrupt, workers=workers)
            )
        except FileNotFoundError as error:
            raise DataNotFound(str(error)) from None
        if split == "train" and classes is None:
            classes = parts[0].classes  # a class is the same number in both
            _no_others(Path(root) / "val", classes)
    train, test = parts
    return ImageData(train.images, train.labels, test.images, test.labels, name, train.classes)


def _no_others(root: Path, classes: tuple[str, ...]) -> None:
    if root.is_dir():
        others = [name for name in list_files(root)[2] if name not in classes]
        if others:
            raise ValueError(f"{shown(root)} holds classes that train has not: {', '.join(map(shown, others[:5]))}")


# --- Fashion-MNIST


def fashion_folders(root: str | Path | None) -> list[Path]:
    """The folders in which Fashion-MNIST is looked for, in order."""
    if root is not None:
        return [Path(root)]
    variable = os.environ.get("SPECTRAL_KERNELS_DATA")
    named = [Path(variable), Path(variable) / "fashion-mnist"] if variable else []
    data = Path("data")
    installed = Path("/") / DEBIAN_PATH
    return [*named, data / "fashion-mnist", data / "FashionMNIST" / "raw", data / DEBIAN_PATH, installed]


def _fashion_mnist(root: str | Path | None, download: bool) -> ImageData:
    folders = fashion_folders(root)
    for folder in folders:
        if all(_idx_file(folder, stem) for stem in IDX_FILES.values()):
            return _read_fashion(folder)
    reason = "nothing is downloaded where a root is given" if root is not None else "data.download is false"
    if root is None and download:
        reason = _download_fashion(Path("data"))
        if not reason:
            return _read_fashion(Path("data") / "FashionMNIST" / "raw")
    raise DataNotFound(
        f"Fashion-MNIST was not found in {', '.join(map(str, folders))}, and {reason}. "
        f"Get it with 'apt-get install {DEBIAN_PACKAGE}', with data.download=true and torchvision "
        "(pip install 'spectral_kernels[vision]', network needed), or put its four IDX files into a folder "
        "and name that in SPECTRAL_KERNELS_DATA."
    )


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def _read_fashion(folder: Path) -> ImageData:
    parts = {}
    for key, stem in IDX_FILES.items():
        path = _idx_file(folder, stem)
        if path is None:
            raise DataNotFound(f"{folder} has no {stem} and no {stem}.gz")
        parts[key] = read_idx(path, ndim=3 if key.endswith("images") else 1)
    for split in ("train", "test"):
        images, labels = parts[f"{split}_images"], parts[f"{split}_labels"]
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} {split} images but {len(labels)} {split} labels")
        if int(labels.max()) >= len(FASHION_CLASSES):
            raise ValueError(f"{folder}: a {split} label is {int(labels.max())}, but there are 10 classes")
    return ImageData(
        parts["train_images"].unsqueeze(1),
        parts["train_labels"].long(),
        parts["test_images"].unsqueeze(1),
        parts["test_labels"].long(),
        "fashion_mnist",
        FASHION_CLASSES,
    )


def _download_fashion(folder: Path) -> str:
    """Download with torchvision into `folder`; an empty string, or why it did not work."""
    try:
        datasets = import_torchvision("datasets")
    except ImportError as error:
        return f"torchvision cannot download it ({error})"
    print(f"Downloading Fashion-MNIST with torchvision into {folder} …")
    try:
        for train in (True, False):
            datasets.FashionMNIST(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        return f"torchvision's download failed ({error})"
    return ""


# --- pools


def training_pool(
    data: ImageData, *, long_tail: float | None = None, duplicates: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The images that a run trains on; evaluation always uses the whole, clean data set.

    Args:
        long_tail: ratio ≥ 1 between the largest and the smallest class; sizes fall exponentially with the
            class number.
        duplicates: share in [0, 1) of the pool that is replaced by near-duplicates (grey levels jittered
            by a standard deviation of 4 out of 255) of the rest. Its size stays the same.
        seed: of the choice of rows and of the jitter.

    Returns:
        images (N, C, H, W) uint8, labels (N,) int64.

    Raises:
        ValueError: long_tail below 1, duplicates outside [0, 1).
    """
    images, labels = data.train_images, data.train_labels
    generator = torch.Generator().manual_seed(seed)
    if long_tail is not None:
        if not 1 <= long_tail < math.inf:
            raise ValueError(f"long_tail must be a finite ratio of at least 1, got {long_tail!r}")
        rows = _long_tail_rows(labels.cpu(), len(data.classes), long_tail, generator).to(labels.device)
        images, labels = images[rows], labels[rows]
    if not 0 <= duplicates < 1:
        raise ValueError(f"duplicates must be in [0, 1), got {duplicates!r}")
    if duplicates > 0:
        images, labels = _near_duplicates(images, labels, duplicates, generator)
    return images, labels


def _long_tail_rows(labels: Tensor, classes: int, ratio: float, generator: torch.Generator) -> Tensor:
    largest = int(labels.bincount(minlength=classes).max())
    kept = []
    for label in range(classes):
        rows = (labels == label).nonzero().squeeze(1)
        size = max(1, round(largest * ratio ** (-label / max(classes - 1, 1))))
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:size]])
    return torch.cat(kept).sort().values


def _near_duplicates(images: Tensor, labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count = len(images)
    originals = torch.randperm(count, generator=generator)[: max(1, round(count * (1 - share)))].sort().values
    copies = originals[torch.randint(len(originals), (count - len(originals),), generator=generator)]
    originals, copies = originals.to(images.device), copies.to(images.device)
    noise = 4 * torch.randn(copies.shape[0], *images.shape[1:], generator=generator).to(images.device)
    jittered = (images[copies] + noise).round_().clamp_(0, 255).to(torch.uint8)
    return torch.cat([images[originals], jittered]), torch.cat([labels[originals], labels[copies]])
