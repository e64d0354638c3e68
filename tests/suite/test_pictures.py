"""Photos of every kind to 8-bit RGB: the picture stays, or one line says why not."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from bayesq.suite.datasets.pictures import as_rgb, decoded

GREY = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
DEEP = GREY.astype(np.uint16) * 257  # the same in 16 bits
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], 2)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return io.BytesIO(buffer.getvalue())


def pixels_of(file: io.BytesIO) -> np.ndarray:
    image = decoded(file.getvalue())
    assert image.mode == "RGB"
    return np.asarray(image)


def png16(samples: np.ndarray, kind: int) -> io.BytesIO:
    """A PNG of 16 bits; kind 2: RGB, 4: grey and alpha, 6: RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, kind, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + content)


def tiff(bits: int, photometric: int, content: bytes, width: int, sample_format: int = 1) -> io.BytesIO:
    """One row of grey levels."""
    short, long = 3, 4
    tags = [(256, short, width), (257, short, 1), (258, short, bits), (259, short, 1), (262, short, photometric)]
    tags += [(273, long, 0), (277, short, 1), (278, short, 1), (279, long, len(content)), (339, short, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in tags)
    return io.BytesIO(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + content)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_the_picture_of_8_bits(kind: str) -> None:
    found = pixels_of(encoded(DEEP, kind))
    assert np.array_equal(found, np.repeat(GREY[..., None], 3, 2))


def test_16_bits_of_the_other_byte_order() -> None:
    file = encoded(DEEP.astype(">u2"), "TIFF")
    assert Image.open(file).mode == "I;16B"
    assert np.array_equal(pixels_of(file)[..., 1], GREY)


def test_16_bits_as_older_pillow_gives_them() -> None:
    for kind in ("PNG", "PPM"):
        image = Image.fromarray(DEEP.astype(np.int32))
        image.format = kind
        assert image.mode == "I" and np.array_equal(np.asarray(as_rgb(image))[..., 2], GREY)


def test_levels_between_those_of_8_bits_are_rounded_down() -> None:
    levels = np.array([[0, 1, 255, 256, 300, 32767, 32768, 65534, 65535]], dtype=np.uint16)
    assert pixels_of(encoded(levels, "PNG"))[0, :, 0].tolist() == [0, 0, 0, 1, 1, 127, 128, 255, 255]


def test_16_bit_grey_and_16_bit_colour_agree() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    grey = pixels_of(encoded(deep, "PNG"))
    assert np.array_equal(grey, pixels_of(png16(np.stack([deep] * 3, 2), 2)))
    assert np.array_equal(grey, pixels_of(png16(np.stack([deep, deep], 2), 4)))
    assert np.array_equal(grey, pixels_of(png16(np.stack([deep] * 4, 2), 6)))


def test_12_bits_reach_from_black_to_white() -> None:
    levels = [0, 1000, 2048, 4095]
    packed = int("".join(f"{level:012b}" for level in levels), 2).to_bytes(6, "big")
    assert pixels_of(tiff(12, 1, packed, 4))[0, :, 0].tolist() == [0, 62, 128, 255]
    grey = pixels_of(io.BytesIO(b"P5 4 1 4095\n" + np.array(levels, ">u2").tobytes()))
    assert grey[0, :, 0].tolist() == [0, 62, 128, 255]


def test_white_may_be_zero() -> None:
    levels = np.array([0, 256 * 10, 65535], "<u2").tobytes()
    assert pixels_of(tiff(16, 0, levels, 3))[0, :, 0].tolist() == [255, 245, 0]
    assert pixels_of(tiff(8, 0, bytes([0, 10, 255]), 3))[0, :, 0].tolist() == [255, 245, 0]


@pytest.mark.parametrize(
    "file",
    [
        encoded(DEEP.astype(np.int32), "TIFF"),
        encoded(GREY.astype(np.float32) / 255, "TIFF"),
        encoded(GREY.astype(np.float32), "PPM"),
        tiff(16, 1, bytes(8), 4, sample_format=2),
    ],
    ids=["int32", "float TIFF", "float PFM", "signed"],
)
def test_numbers_without_a_white_are_refused(file: io.BytesIO) -> None:
    with pytest.raises(ValueError, match="which of its grey levels is white"):
        decoded(file.getvalue())


@pytest.mark.parametrize("mode", ["LA", "1", "L", "CMYK", "RGBA", "P", "YCbCr", "PA", "LAB"])
def test_other_modes_keep_the_picture(mode: str) -> None:
    source = Image.fromarray(COLOUR).convert(mode)
    found = pixels_of(encoded(source, "TIFF"))
    apart = np.abs(found.astype(int) - np.asarray(source.convert("RGB"))).max()
    assert apart <= (3 if mode == "YCbCr" else 0)
    assert found.std() > 15


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["one", "each"])
@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparency_is_ignored_without_a_word(mode: str, transparency: int | bytes) -> None:
    source = Image.fromarray(COLOUR).convert(mode)
    if mode != "P" and isinstance(transparency, bytes):
        transparency = 7
    value = (1, 254, 0) if mode == "RGB" else transparency
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels_of(encoded(source, "PNG", transparency=value))
    assert np.array_equal(found, np.asarray(source.convert("RGB")))


def test_an_invisible_photo_keeps_its_colours() -> None:
    assert np.array_equal(pixels_of(encoded(np.dstack([COLOUR, 0 * GREY]), "PNG")), COLOUR)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_not_applied(kind: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    turned, plain = (encoded(COLOUR, kind, quality=95, **extra) for extra in ({"exif": tags}, {}))
    assert Image.open(turned).getexif()[0x0112] == orientation
    assert np.array_equal(pixels_of(turned), pixels_of(plain))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", encoded(COLOUR, "JPEG").getvalue()[:400]])
def test_what_is_no_photo_is_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        decoded(content)
    assert str(caught.value) and " at 0x" not in str(caught.value)
