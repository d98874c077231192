"""Decoding within bounds, ranges and deterministic encoding."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFile

from vcf_batch import images
from vcf_batch.errors import RowError

LIMIT = 1_000_000


def noise(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def to_bytes(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def file(image_format: str, **options: object) -> bytes:
    return to_bytes(Image.fromarray(noise()), image_format, **options)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to no pixels: what a decompression bomb looks like from outside."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    """A WebP of one of its three chunk kinds that declares a size and holds no pixels."""
    body = {
        b"VP8X": b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little") + b"\0" * 5,
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + width.to_bytes(2, "little") + height.to_bytes(2, "little"),
    }[kind]
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    data = to_bytes(Image.new("L", (8, 8), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


HTML = b"<!DOCTYPE html><html><body>404</body></html>"
SVG = b'\n<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"

REFUSED = {
    "empty": (b"", "empty"),
    "garbage": (bytes(range(1, 200)), "not an image"),
    "html": (HTML, "web page"),
    "svg": (SVG, "SVG"),
    "git-lfs": (LFS, "git lfs pull"),
    "eps": (EPS, "not an image"),
    "jpeg-truncated": (file("JPEG")[:-200], "truncated JPEG"),
    "jpeg-header-only": (file("JPEG")[:20], "truncated JPEG"),
    "png-truncated": (file("PNG")[:-200], "truncated PNG"),
    "png-header-only": (file("PNG")[:12], "truncated PNG"),
    "webp-truncated": (file("WEBP", lossless=True)[:-200], "truncated WebP"),
    "webp-header-only": (file("WEBP")[:14], "truncated WebP"),
    "gif-truncated": (file("GIF")[:-200], "truncated GIF"),
    "avif-truncated": (file("AVIF")[:-200], "truncated AVIF"),
    "tiff-truncated": (file("TIFF")[:200], "truncated TIFF"),
    "bmp-truncated": (file("BMP")[:-200], "truncated BMP"),
    "png-over-limit": (png_header(1001, 1000), "1001 x 1000 = 1001000 pixels, over the limit of 1000000"),
    "png-bomb": (png_header(30_000, 30_000), "larger than Pillow decodes"),
    "webp-vp8x-bomb": (webp_header(16_000, 16_000, b"VP8X"), "over the limit"),
    "webp-vp8l-bomb": (webp_header(16_000, 16_000, b"VP8L"), "over the limit"),
    "webp-vp8-bomb": (webp_header(16_000, 16_000, b"VP8 "), "over the limit"),
    "jpeg-scans": (jpeg_scans(images.MAX_JPEG_SCANS), "JPEG of more than 100 scans"),
    "tiff-float": (to_bytes(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32-bit floating-point"),
    "tiff-int32": (to_bytes(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), "32-bit integer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_whole_image_fails_its_row(name: str) -> None:
    """One bad row never costs another one: whatever the bytes are, the only exception is the row's own."""
    data, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(RowError, match=message) as caught:
            images.decode(data, LIMIT)
    assert "object at 0x" not in str(caught.value), "it is published, and must be the same every time"


def test_many_scans_are_fine() -> None:
    assert images.decode(jpeg_scans(80), LIMIT).size == (8, 8)


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_every_format_decodes(image_format: str) -> None:
    image = images.decode(file(image_format), LIMIT)
    assert (image.mode, image.size, type(image)) == ("RGB", (40, 24), Image.Image)
    assert not image.info


@pytest.mark.parametrize("image_format", images.FORMATS)
@given(cut=st.floats(0, 1), flip=st.floats(0, 1))
def test_damage_never_raises_anything_else(image_format: str, cut: float, flip: float) -> None:
    """One bad row never costs another one: random cuts and flipped bytes decode or raise RowError."""
    data = bytearray(file(image_format))
    data[int(flip * (len(data) - 1))] ^= 0xFF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with contextlib.suppress(RowError):
            assert images.decode(bytes(data[: int(cut * len(data)) + 1]), LIMIT).mode == "RGB"


def _rgba(colour: tuple[int, int, int, int]) -> Image.Image:
    return Image.new("RGBA", (8, 8), colour)


def _animation(image_format: str) -> bytes:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    return to_bytes(first, image_format, save_all=True, append_images=[second], lossless=True)


def _palette(**options: object) -> bytes:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 128, 0])
    return to_bytes(palette, "PNG", **options)


COLOURS = {
    "cmyk-jpeg": (to_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "grey": (to_bytes(Image.new("L", (8, 8), 77), "PNG"), (77, 77, 77)),
    "bilevel": (to_bytes(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
    "grey-16-bit": (to_bytes(Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)), "PNG"), (200, 200, 200)),
    "grey-16-bit-rounds": (to_bytes(Image.fromarray(np.full((8, 8), 200 * 257 - 100, np.uint16)), "PNG"), (200,) * 3),
    "grey-alpha": (to_bytes(Image.new("LA", (8, 8), (0, 0)), "PNG"), (255, 255, 255)),
    "palette": (_palette(), (0, 128, 0)),
    "palette-transparent": (_palette(transparency=1), (255, 255, 255)),
    "palette-transparency-elsewhere": (_palette(transparency=0), (0, 128, 0)),
    "rgb-transparent-colour": (
        to_bytes(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "alpha-none": (to_bytes(_rgba((10, 20, 30, 0)), "PNG"), (255, 255, 255)),
    "alpha-half": (to_bytes(_rgba((255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "alpha-full": (to_bytes(_rgba((10, 20, 30, 255)), "PNG"), (10, 20, 30)),
    "alpha-webp": (to_bytes(_rgba((255, 0, 0, 128)), "WEBP", lossless=True), (255, 127, 127)),
    "animated-gif": (_animation("GIF"), (255, 0, 0)),
    "animated-webp": (_animation("WEBP"), (255, 0, 0)),
    "animated-png": (_animation("PNG"), (255, 0, 0)),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name: str) -> None:
    data, expected = COLOURS[name]
    image = images.decode(data, LIMIT)
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    assert images.decode(to_bytes(Image.new("RGB", size), "PNG"), LIMIT).size == size


def test_limit_is_inclusive() -> None:
    data = file("PNG")
    assert images.decode(data, 24 * 40).size == (40, 24)
    with pytest.raises(RowError, match="--max-pixels"):
        images.decode(data, 24 * 40 - 1)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(image_format: str, orientation: int) -> None:
    """The upright picture is red above blue and dark on its left, whichever way its pixels are stored."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :, 0] = upright[8:, :, 2] = 255
    upright[:, :16] //= 2
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Each encoder ignores the other's options.
    best = {"quality": 100, "subsampling": 0, "lossless": True} if image_format in ("JPEG", "WEBP") else {}
    data = to_bytes(Image.fromarray(np.ascontiguousarray(stored)), image_format, exif=exif, **best)
    image = images.decode(data, LIMIT)
    assert image.size == (32, 16)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_picture() -> None:
    assert images.decode(file("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), LIMIT).size == (40, 24)


def test_pillow_stays_as_it_was() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    images.decode(file("PNG"), LIMIT)
    for name in ("png-bomb", "jpeg-truncated"):
        with pytest.raises(RowError):
            images.decode(REFUSED[name][0], 10**9)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_pillows_warning_as_an_error_is_the_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(RowError, match="larger than Pillow decodes"):
            images.decode(png_header(10_000, 10_000), 10**9)


@pytest.mark.parametrize("image_format", ["png", "webp"])
@given(array=hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))))
def test_lossless_round_trip(image_format: str, array: np.ndarray) -> None:
    data = images.encode(array, image_format)
    assert np.array_equal(np.asarray(images.decode(data, LIMIT)), array)
    assert data == images.encode(array.copy(), image_format)


def test_jpg_is_close_and_deterministic() -> None:
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    data = images.encode(smooth, "jpg")
    assert data == images.encode(smooth, "jpg")
    assert np.abs(np.asarray(images.decode(data, LIMIT)).astype(int) - smooth).max() <= 4


@given(array=hnp.arrays(np.uint8, (3, 4, 3)))
def test_ranges_round_trip(array: np.ndarray) -> None:
    unit, signed = images.to_unit(array), images.to_signed(Image.fromarray(array))
    assert unit.dtype == signed.dtype == np.float32
    assert np.array_equal(images.from_unit(unit), array)
    assert np.allclose(signed, array / 127.5 - 1, atol=1e-6)
    assert np.abs(signed).max() <= 1


def test_from_unit_clips_and_rounds() -> None:
    array = np.array([[[-0.5, 0.0, 0.4999 / 255]], [[0.5001 / 255, 1.0, 7.0]]], np.float32)
    assert images.from_unit(array).tolist() == [[[0, 0, 0]], [[1, 255, 255]]]


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), noise()[..., :2]])
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    for function in (images.to_unit, lambda a: images.encode(a, "png")):
        with pytest.raises(ValueError, match="uint8"):
            function(array)


def test_resize_squashes_the_whole_image() -> None:
    image = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 30, axis=0)[:, :, None].repeat(3, 2))
    small = np.asarray(images.resize(image, 4, 2))
    assert small.shape == (2, 4, 3)
    assert small[0].max() < 40
    assert small[1].min() > 215
    assert images.resize(image, *image.size) is image
