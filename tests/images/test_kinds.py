"""What is whole is read, what is cut is not, and what is of another kind is told as what it is, with a remedy."""

import struct

import numpy as np
import pytest
from PIL import Image

from support.pictures import file, noise, tiff, to_bytes
from vcf_batch import images
from vcf_batch.errors import RowError
from vcf_batch.images.kinds import START_BYTES, kind_of

LIMIT = 1_000_000


def waves() -> Image.Image:
    y, x = np.mgrid[:90, :121]
    channels = [128 + 100 * np.sin(x / 9), 128 + 90 * np.cos(y / 7 + x / 30), (x + y) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


JPEGS: dict[str, dict[str, object]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "fine": {"quality": 100, "subsampling": 0},
    "restarts": {"restart_marker_blocks": 1},
    "restarts-of-rows": {"restart_marker_rows": 1},
}
ENDINGS = {"nothing": b"", "half-an-end": b"\xff", "zeros": bytes(4_000)}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_its_end_is_read_if_its_pixels_are_there(name: str, ending: str) -> None:
    """The end marker alone is lost: the picture is the same as with it."""
    data = to_bytes(waves(), "JPEG", **JPEGS[name])
    decoded = images.decode(data[:-2] + ENDINGS[ending], LIMIT)
    assert np.array_equal(np.asarray(decoded), np.asarray(images.decode(data, LIMIT)))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_is_cut_is_never_half_a_picture(name: str, ending: str) -> None:
    """However little of its pixels is missing, the row fails. Pillow takes reserved zeros for pixels, grey ones."""
    data = to_bytes(waves(), "JPEG", **JPEGS[name])[:-2]
    begin = data.index(b"\xff\xda") + 14
    for stop in [*range(begin, len(data) - 40, 97), *range(len(data) - 40, len(data))]:
        with pytest.raises(RowError, match=r"damaged or truncated JPEG|cannot be read"):
            images.decode(data[:stop] + ENDINGS[ending], LIMIT)


def test_a_jpeg_with_a_cut_picture_behind_it_is_read() -> None:
    """Cameras put previews behind a picture."""
    data = file("JPEG")
    assert images.decode(data + data[:-300], LIMIT).tobytes() == images.decode(data, LIMIT).tobytes()


@pytest.mark.parametrize(("image_format", "end"), [("PNG", 12), ("PNG", 5), ("GIF", 1)])
def test_other_files_without_their_end_are_read(image_format: str, end: int) -> None:
    data = file(image_format)
    assert images.decode(data[:-end], LIMIT).tobytes() == images.decode(data, LIMIT).tobytes()


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_a_file_whose_pixels_are_cut_fails_its_row(image_format: str) -> None:
    """No format gives half a picture."""
    data = file(image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    for part in (0.5, 0.9):
        with pytest.raises(RowError, match="damaged or truncated"):
            images.decode(data[: int(len(data) * part)], LIMIT)


def tiff_of(bits: int, form: int, samples: int = 3, compression: int = 1) -> bytes:
    size = 16 * 16 * samples * bits // 8
    fields: dict[int, int | list[int]] = {258: [bits] * samples, 259: compression, 262: 2 if samples == 3 else 1}
    return tiff(fields | {273: 16, 277: samples, 278: 16, 279: size, 339: [form] * samples}, bytes(size))


UNSUPPORTED = {
    "tiff-float": (
        tiff_of(32, 3),
        "a TIFF of 3 samples a pixel, which are floating-point numbers of 32 bits; convert it",
    ),
    "tiff-half": (tiff_of(16, 3), "a TIFF of 3 samples a pixel, which are floating-point numbers of 16 bits"),
    "tiff-double": (tiff_of(64, 3, 1), "a TIFF of 1 sample a pixel, which are floating-point numbers of 64 bits"),
    "tiff-32-bit": (tiff_of(32, 1), "a TIFF of 3 samples a pixel, which are unsigned integers of 32 bits"),
    "tiff-jpeg-2000": (tiff_of(8, 1, 3, 34712), "a TIFF of JPEG 2000 compression; convert it with 'magick IN"),
    "tiff-other": (tiff_of(8, 1, 3, 40_000), "a TIFF of number 40000 compression"),
    "grey-float": (
        to_bytes(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
        "it has 32-bit floating-point pixels, whose range is unknown; convert it to 8 or 16 bits",
    ),
    "jpeg-12-bit": (
        file("JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "a JPEG of an unusual kind (cannot handle 12-bit layers); convert it",
    ),
    "jpeg-ls": (b"\xff\xd8\xff\xf7" + bytes(100), "a JPEG-LS picture"),
    "bmp-of-a-png": (b"BM" + struct.pack("<IHHI", 200, 0, 0, 54) + struct.pack("<IiiHHI20x", 40, 8, 8, 1, 0, 5), "BMP"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "a HEIC picture; convert it with 'heif-convert"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100), "a HEIC picture"),
    "mp4": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(100), "a film (MP4 or QuickTime); take a frame"),
    "jpeg-xl": (b"\xff\x0a" + bytes(100), "a JPEG XL picture"),
    "jpeg-2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "a JPEG 2000 picture"),
    "photoshop": (b"8BPS\0\1" + bytes(100), "a Photoshop document"),
    "pdf": (b"%PDF-1.7\n" + bytes(100), "a PDF document"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "it is compressed with gzip; unpack it with 'gunzip'"),
    "ppm": (b"P6\n8 8\n255\n" + bytes(192), "a PNM picture"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_not_called_damaged(name: str) -> None:
    """The message says what the file is and how to convert it, whatever its name is."""
    data, expected = UNSUPPORTED[name]
    with pytest.raises(RowError, match="cannot be read because") as caught:
        images.decode(data, LIMIT)
    assert expected in str(caught.value)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_every_format_of_references_is_known_by_its_first_bytes(image_format: str) -> None:
    """The formats that are read, and these alone, need no remedy."""
    kind = kind_of(file(image_format)[:START_BYTES])
    assert kind and kind.name.upper() == image_format and not kind.remedy


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI", "a PNG in the form of iOS apps"),
        (b"BMW, and other words with these two letters", None),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "an SVG drawing"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", None),
        (b"", None),
    ],
)
def test_what_begins_otherwise_is_not_taken_for_an_image(start: bytes, name: str | None) -> None:
    """Texts and the companions of files on macOS are none; formats that are not read have their names."""
    kind = kind_of(start)
    assert (kind and kind.name) == name


def test_a_picture_is_not_taken_for_another_kind() -> None:
    """Signatures that are not at the beginning decide nothing about a file that has one there."""
    stored = Image.fromarray(noise())
    for image_format in ("BMP", "TIFF", "GIF"):
        data = bytearray(to_bytes(stored, image_format))
        if image_format == "BMP":
            data[128:132] = b"DICM"
        assert images.decode(bytes(data), LIMIT).size == (40, 24)


def test_no_offset_of_a_file_leaves_the_row() -> None:
    """A TIFF may name places beyond the range of numbers that Python's own functions take."""
    with pytest.raises(RowError, match="damaged or truncated TIFF"):
        images.decode(b"II+\0\x08\0\0\0" + b"\xff" * 8, LIMIT)
