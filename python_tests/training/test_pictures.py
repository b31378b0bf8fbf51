"""Pictures of every mode, shape and format: the right pixels, or refused by name; and never more memory than is said."""

import io
import os
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import in_a_child, said_by
from PIL import Image, ImageDraw

from spectral_kernels.training import pictures
from spectral_kernels.training.pictures import decode, try_decode

SIZE = 16
GREY = np.linspace(0, 255, 32 * 32).reshape(32, 32)


def decoded(path: Path, size: int = SIZE) -> np.ndarray:
    return np.frombuffer(decode(path, size), np.uint8).reshape(3, size, size)


def expected(grey: np.ndarray = GREY) -> np.ndarray:
    picture = Image.fromarray(grey.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.broadcast_to(np.asarray(picture), (3, SIZE, SIZE))


def colours() -> Image.Image:
    picture = Image.new("RGB", (32, 32), (200, 30, 60))
    ImageDraw.Draw(picture).rectangle((0, 0, 15, 31), fill=(10, 220, 120))
    return picture


def sixteen_bits() -> Image.Image:
    return Image.fromarray((GREY * 257).astype(np.uint16))


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG by hand: kinds that Pillow does not write, and sizes that it would not."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def tiff(grey: np.ndarray, bits: int, kind: int, photometric: int, order: str = "<") -> bytes:
    """A TIFF by hand, of one strip; of packed bits, a row has fewer pixels than bytes."""
    height, width = grey.shape[0], grey.shape[1] * 8 * grey.itemsize // bits
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, grey.nbytes), (339, 3, kind)]
    return tiff_of(tags, grey.tobytes(), order)


def tiff_of(tags: list[tuple[int, int, int]], data: bytes, order: str = "<") -> bytes:
    entries = b"".join(
        struct.pack(order + "HHI", tag, form, 1) + struct.pack(order + ("H2x" if form == 3 else "I"), value)
        for tag, form, value in tags
    )
    start = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return start + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def wide(grey: np.ndarray) -> bytes:
    """Red, green and blue of 16 bits each."""
    return np.repeat((grey * 257).astype(">u2"), 3).tobytes()


GREYS = {
    "L.png": lambda path: Image.fromarray(GREY.astype(np.uint8)).save(path),
    "LA.png": lambda path: Image.fromarray(GREY.astype(np.uint8)).convert("LA").save(path),
    "P.png": lambda path: Image.fromarray(GREY.astype(np.uint8)).convert("P").save(path),
    "16.png": lambda path: sixteen_bits().save(path),
    "16.tif": lambda path: sixteen_bits().save(path),
    "16 by LZW.tif": lambda path: sixteen_bits().save(path, compression="tiff_lzw"),
    "16 big.tif": lambda path: path.write_bytes(tiff((GREY * 257).astype(">u2"), 16, 1, 1, ">")),
    "16 of colours.png": lambda path: path.write_bytes(png(32, 32, 16, 2, b"".join(b"\0" + wide(row) for row in GREY))),
    "16.ppm": lambda path: path.write_bytes(b"P5 32 32 65535\n" + (GREY * 257).astype(">u2").tobytes()),
    "16 of colours.ppm": lambda path: path.write_bytes(b"P6 32 32 65535\n" + wide(GREY)),
    "10.ppm": lambda path: path.write_bytes(b"P5 32 32 1020\n" + (GREY * 4).astype(">u2").tobytes()),
    "12.tif": lambda path: path.write_bytes(tiff(twelve_bits(), 12, 1, 1)),
    "L.bmp": lambda path: Image.fromarray(GREY.astype(np.uint8)).save(path),
    "called.jpg": lambda path: Image.fromarray(GREY.astype(np.uint8)).save(path, "PNG"),
    "L.jpeg": lambda path: Image.fromarray(GREY.astype(np.uint8)).save(path, quality=100),
    "white is 0.tif": lambda path: path.write_bytes(tiff(255 - GREY.astype(np.uint8), 8, 1, 0)),
}


def twelve_bits() -> np.ndarray:
    """Two of them in three bytes."""
    levels = (GREY * 4095 / 255).astype(int).reshape(-1, 2)
    first, second = levels[:, 0], levels[:, 1]
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, 1).astype(np.uint8).reshape(32, 48)


@pytest.mark.parametrize("name", GREYS)
def test_grey_levels_of_every_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    GREYS[name](path)
    assert np.abs(decoded(path).astype(int) - expected()).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "PA", "HSV", "RGBX"])
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp", "bmp", "ppm"])
def test_colours_of_every_mode(mode: str, suffix: str, tmp_path: Path) -> None:
    if (mode, suffix) == ("1", "jpg"):
        pytest.skip("dithering does not survive a JPEG that is scaled as it is decoded")
    path = tmp_path / f"a.{suffix}"
    try:
        picture = colours().convert("P").convert("PA") if mode == "PA" else colours().convert(mode)
        how = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
        picture.save(path, **how)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"Pillow does not write {mode} so")
    wanted = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = np.abs(decoded(path).astype(int) - wanted)
    assert difference.mean() <= (8 if suffix == "jpg" else 0.5) and np.median(difference) <= 2


REFUSED = {
    "float.tif": lambda path: Image.fromarray(GREY.astype(np.float32)).save(path),
    "32 bits.tif": lambda path: Image.fromarray(GREY.astype(np.int32)).save(path),
    "signed.tif": lambda path: path.write_bytes(tiff(GREY.astype("<i2"), 16, 2, 1)),
    "white is 0, 16.tif": lambda path: path.write_bytes(tiff((GREY * 257).astype("<u2"), 16, 1, 0)),
    "lab.tif": lambda path: Image.new("LAB", (20, 20)).save(path),
    "float.ppm": lambda path: path.write_bytes(b"Pf 4 4 -1.0\n" + bytes(64)),
    "script.png": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
    "moving.jpg": lambda path: Image.new("RGB", (9, 9)).save(path, "GIF"),
    "empty.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_bytes(b"no picture"),
    "cut.png": lambda path: path.write_bytes(png(9, 9, 8, 0, os.urandom(90))[:60]),
    "short.png": lambda path: path.write_bytes(png(90, 90, 8, 0, bytes(90))),
    "no pixels.png": lambda path: path.write_bytes(png(0, 9, 8, 0, bytes(9))),
    "pipe.png": os.mkfifo,
    "folder.png": lambda path: path.mkdir(),
    "zero.png": lambda path: path.symlink_to("/dev/zero"),
    "nowhere.png": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    REFUSED[name](path)
    pixels, reason = try_decode(path, SIZE)
    assert pixels is None and 0 < len(reason) <= 201 and str(path) not in reason


def test_the_middle_square_of_any_shape(tmp_path: Path) -> None:
    for width, height in ((1, 1), (1, 60000), (60000, 1), (3, 5), (123, 129), (1000, 17)):
        path = tmp_path / f"{width}x{height}.png"
        Image.new("RGB", (width, height), (9, 99, 199)).save(path)
        found = decoded(path, 224)
        assert np.array_equal(found, np.broadcast_to(np.array([9, 99, 199], np.uint8)[:, None, None], (3, 224, 224)))
    # as scaling the shorter side and cropping does, where both sides scale to whole pixels
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    picture.save(tmp_path / "wide.png")
    usual = picture.resize((64, 32), Image.Resampling.BICUBIC).crop((16, 0, 48, 32))
    found = decoded(tmp_path / "wide.png", 32).transpose(1, 2, 0)
    assert np.abs(found.astype(int) - np.asarray(usual)).max() <= 1


BOMBS = {
    # 312 bytes that asked for 11 GiB
    "narrow.png": png(1, 60000, 8, 2, bytes(4 * 60000)),
    "large.png": png(60000, 60000, 1, 0, bytes(1000)),
    "largest.png": png(2**31 - 1, 2**31 - 1, 8, 6, bytes(1000)),
    "grey.png": png(8192, 8192, 8, 0, bytes(8193 * 8192)),
    "colours.png": png(8192, 8192, 8, 6, bytes((4 * 8192 + 1) * 8192)),
    "deep.png": png(8192, 8192, 16, 6, bytes((8 * 8192 + 1) * 8192)),
    "grey of 16 bits.png": png(8192, 8192, 16, 0, bytes((2 * 8192 + 1) * 8192)),
    "grey of 16 bits.ppm": b"P5 8192 8192 65535\n" + bytes(2 * 8192 * 8192),
    "grey of 16 bits.tif": tiff(np.zeros((8192, 8192), np.uint16), 16, 1, 1),
    "slow.ppm": b"P6 8192 8192 254\n" + bytes(3 * 8192 * 8192),
    "large.ppm": b"P6 999999999 999999999 255\n",
    "large.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 1, 1, 0, 0),
    "large.tif": tiff(np.zeros((4, 4), np.uint8), 8, 1, 1).replace(
        struct.pack("<HHII", 256, 4, 1, 4), struct.pack("<HHII", 256, 4, 1, 2**31)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded(name: str, tmp_path: Path) -> None:
    """In a child, which may take 1.2 GB beside what it begins with."""
    (tmp_path / name).write_bytes(BOMBS[name])

    def work() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pixels, reason = try_decode(tmp_path / name, 224)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(1, f"{(after - before) * 1024} {len(pixels or b'')} {reason}".encode())

    grown, length, reason = said_by(*in_a_child(work)).split(" ", 2)
    assert int(grown) < 1.2e9
    assert int(length) == 3 * 224 * 224 or reason


def test_progressive_jpegs_are_held_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their coefficients are kept whole, however small they are scaled."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (300, 200)).save(path, progressive=True)
    monkeypatch.setattr(pictures, "PIXELS", 300 * 200 - 1)
    assert try_decode(path, 8) == (None, "has 300 × 200 pixels, at most 59999 are decoded")


def test_a_tile_larger_than_its_picture(tmp_path: Path) -> None:
    """A TIFF of 16 × 16 pixels in one tile of 640 million; it would be decoded whole."""
    data = zlib.compress(bytes(32000 * 20000 // 100), 9)
    tags = [
        (256, 4, 16),
        (257, 4, 16),
        (258, 3, 8),
        (259, 3, 8),
        (262, 3, 1),
        (277, 3, 1),
        (322, 4, 32000),
        (323, 4, 20000),
    ]
    (tmp_path / "a.tif").write_bytes(tiff_of([*tags, (324, 4, 8), (325, 4, len(data))], data))
    assert try_decode(tmp_path / "a.tif", 8) == (None, "has 16 × 16 pixels, at most 67108864 are decoded")


def test_a_jpeg_of_many_scans(tmp_path: Path) -> None:
    """Each empty one costs a pass over the picture."""
    buffer = io.BytesIO()
    colours().save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    scan = bytes.fromhex("ffda00080101001f3f00") + b"\x00"
    for count, refused in ((20, False), (200, True)):
        (tmp_path / "a.jpg").write_bytes(content[:-2] + scan * count + b"\xff\xd9")
        _, reason = try_decode(tmp_path / "a.jpg", 8)
        assert (reason == "is a progressive JPEG of more than 100 scans") is refused


def test_a_compressed_bmp_is_held_to_what_python_decodes(tmp_path: Path) -> None:
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    for side, refused in ((64, False), (4096, True)):
        rows = b"".join(bytes((63, i % 256, 1, 9, 0, 0)) for i in range(side)) + b"\0\1"
        start = 54 + len(palette)
        header = struct.pack(
            "<2sIHHIIiiHHIIiiII", b"BM", start + len(rows), 0, 0, start, 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0
        )
        (tmp_path / "a.bmp").write_bytes(header + palette + rows)
        pixels, reason = try_decode(tmp_path / "a.bmp", 8)
        assert (pixels is None) is refused and ("at most 4194304 are decoded" in reason) is refused


def test_lack_of_memory_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")

    def none(picture: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(pictures, "_readable", none)
    assert try_decode(tmp_path / "a.png", 8) == (None, "MemoryError")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_never_raise(tmp_path: Path) -> None:
    """Cut and overwritten, most often in the header: pixels, or a reason."""
    rng = np.random.default_rng(0)
    whole = []
    for suffix in ("jpg", "png", "webp", "bmp", "ppm", "tif"):
        buffer = io.BytesIO()
        colours().save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        whole.append(buffer.getvalue())
    path = tmp_path / "a.png"
    for turn in range(600):
        content = bytearray(whole[turn % len(whole)])
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(content)) if rng.random() < 0.4 else rng.integers(min(64, len(content))))
            content[place] = rng.integers(256)
        if rng.random() < 0.3:
            del content[int(rng.integers(len(content))) :]
        path.write_bytes(content)
        pixels, reason = try_decode(path, SIZE)
        assert (pixels is not None and len(pixels) == 3 * SIZE * SIZE and reason == "") or (pixels is None and reason)
