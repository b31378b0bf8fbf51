"""One picture of any kind to RGB pixels of one size, in bounded memory, or the reason why not."""

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from spectral_kernels.files.reading import PIECE, one_line, opened, printable, shown

# by their content, whatever the file's name: others of Pillow's readers start programs, or are hardly used
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
PIXELS = 2**26  # of the largest picture, some 0.8 GB while it is decoded
LARGE = 2**22  # pictures from here on are decoded one at a time
# decoders that Pillow has in Python: a second for a million pixels
SLOW, SLOW_PIXELS = ("bmp_rle", "ppm", "ppm_plain"), 2**22
SCANS = 100
STRIP = 2**20
# photographs and drawings as Pillow names their modes; of others (LAB, F, …) it is not known what white is
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_one_at_a_time = threading.Lock()


def try_decode(path: Path, size: int) -> tuple[bytes | None, str]:
    """Pixels (3, size, size) as bytes, or why there are none; `decode` with every error as its reason."""
    try:
        return decode(path, size), ""
    except Exception as error:  # what a damaged picture leads to may be anything, lack of memory too
        return None, printable(one_line(error)).removeprefix(f"{shown(path)} ")


def decode(path: Path, size: int) -> bytes:
    """Pixels (3, size, size) uint8 of the middle square, scaled by a bicubic filter.

    Transparency is left out, of several pictures in a file the first is taken, and 16 bits are rounded down to 8. Tags that
    turn a picture are not followed, as in ImageNet's usual pipelines.

    Raises:
        ValueError: no picture, a damaged or too large one, or one whose values have no known range. OSError and others:
            what Pillow raises.
    """
    from PIL import Image

    with opened(path) as file, _open(file) as picture:
        pixels = max([picture.width * picture.height, *_tiles(picture)])
        decoder = picture.tile[0][0] if picture.tile else ""
        limit = SLOW_PIXELS if decoder in SLOW else PIXELS
        if pixels > limit:
            raise ValueError(f"has {picture.width} × {picture.height} pixels, at most {limit} are decoded")
        if picture.info.get("progressive") and _scans(file) > SCANS:
            raise ValueError(f"is a progressive JPEG of more than {SCANS} scans")
        with _one_at_a_time if pixels > LARGE else nullcontext():
            picture.draft("RGB", (size, size))  # a JPEG is scaled as it is decoded, never below `size`
            readable = _readable(picture)
            side = min(readable.size)
            left, top = (readable.width - side) / 2, (readable.height - side) / 2
            # the square alone: what a narrow picture would be scaled to on its long side has no bound
            box = (left, top, left + side, top + side)
            square = readable.resize((size, size), Image.Resampling.BICUBIC, box).convert("RGB")
    return b"".join(band.tobytes() for band in square.split())


def _open(file: BinaryIO) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"is no picture of {', '.join(FORMATS)}") from error


def _tiles(picture: Any) -> list[int]:
    """Pixels of a tile of a TIFF, which may be larger than the picture."""
    if picture.format != "TIFF" or 322 not in picture.tag_v2 or 323 not in picture.tag_v2:
        return []
    return [int(picture.tag_v2[322]) * int(picture.tag_v2[323])]


def _scans(file: BinaryIO) -> int:
    """Of a JPEG: each goes over the whole picture, be it empty. Within their data the marker does not occur."""
    place = file.tell()
    file.seek(0)
    count, last = 0, b""
    while piece := file.read(PIECE):
        count += (last + piece).count(b"\xff\xda")
        last = piece[-1:]
    file.seek(place)
    return count


def _readable(picture: Any) -> Any:
    """As RGB, or as grey of 8 bits."""
    from PIL import Image

    if picture.mode in ("1", "L"):
        return picture.convert("L")
    if picture.mode in MODES:
        return picture.convert("RGB")
    bits = _bits(picture)
    if bits is None:
        raise ValueError(f"is {picture.format} of mode {picture.mode}, of which it is not known what white is")
    import numpy

    grey = Image.new("L", picture.size)
    rows = max(1, STRIP // picture.width)  # at a time: the numbers take eight times the room
    for top in range(0, picture.height, rows):
        levels = numpy.asarray(picture.crop((0, top, picture.width, min(top + rows, picture.height))), numpy.int64)
        grey.paste(Image.fromarray((levels >> (bits - 8)).clip(0, 255).astype(numpy.uint8)), (0, top))
    return grey


def _bits(picture: Any) -> int | None:
    """Of a grey level in a picture with more than 8 of them."""
    if picture.format == "TIFF" and picture.mode.startswith("I;16"):
        # 262: whether 0 is black
        depth, black = picture.tag_v2.get(258, (16,)), picture.tag_v2.get(262, 1) == 1
        return int(depth[0]) if black else None
    wide = {"PNG": ("I;16", "I;16B", "I"), "PPM": ("I", "I;16", "I;16B")}
    return 16 if picture.mode in wide.get(picture.format, ()) else None
