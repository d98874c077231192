"""Decoding within bounds, ranges and deterministic encoding."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image, ImageFile

from support.pictures import animation, file, noise, palette, png_header, rgba, to_bytes
from vcf_batch import images
from vcf_batch.errors import RowError

LIMIT = 1_000_000


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_every_format_decodes(image_format: str) -> None:
    image = images.decode(file(image_format), LIMIT)
    assert (image.mode, image.size, type(image)) == ("RGB", (40, 24), Image.Image)
    assert not image.info


COLOURS = {
    "cmyk-jpeg": (to_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "grey": (to_bytes(Image.new("L", (8, 8), 77), "PNG"), (77, 77, 77)),
    "bilevel": (to_bytes(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
    "grey-16-bit": (to_bytes(Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)), "PNG"), (200, 200, 200)),
    "grey-16-bit-rounds": (
        to_bytes(Image.fromarray(np.full((8, 8), 200 * 257 - 100, np.uint16)), "PNG"),
        (200,) * 3,
    ),
    "grey-alpha": (to_bytes(Image.new("LA", (8, 8), (0, 0)), "PNG"), (255, 255, 255)),
    "palette": (palette(), (0, 128, 0)),
    "palette-transparent": (palette(transparency=1), (255, 255, 255)),
    "palette-transparency-elsewhere": (palette(transparency=0), (0, 128, 0)),
    "rgb-transparent-colour": (
        to_bytes(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "alpha-none": (to_bytes(rgba((10, 20, 30, 0)), "PNG"), (255, 255, 255)),
    "alpha-half": (to_bytes(rgba((255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "alpha-full": (to_bytes(rgba((10, 20, 30, 255)), "PNG"), (10, 20, 30)),
    "alpha-webp": (to_bytes(rgba((255, 0, 0, 128)), "WEBP", lossless=True), (255, 127, 127)),
    "animated-gif": (animation("GIF"), (255, 0, 0)),
    "animated-webp": (animation("WEBP"), (255, 0, 0)),
    "animated-png": (animation("PNG"), (255, 0, 0)),
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
    for data in (png_header(30_000, 30_000), file("JPEG")[:-200]):
        with pytest.raises(RowError):
            images.decode(data, 10**9)
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
    unit = images.to_unit(Image.fromarray(array))
    assert unit.dtype == np.float32
    assert np.array_equal(images.from_unit(unit), array)


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


# Perceptual hash


def test_a_perceptual_hash_is_that_of_the_imagehash_package() -> None:
    """So that duplicates are found with other tools too: recorded with ImageHash 4.3.2."""
    assert images.perceptual_hash(_waves()) == "fa32facd05cc05cc"


def test_similar_images_share_most_bits_of_their_hash() -> None:
    first, second = _waves(), np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    darker = np.asarray(Image.fromarray((first * 0.7).astype(np.uint8)).resize((80, 60)))
    hashes = [int(images.perceptual_hash(image), 16) for image in (first, darker, second)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 6
    assert (hashes[0] ^ hashes[2]).bit_count() >= 16
    plain = np.full((64, 64, 3), 90, np.uint8)
    assert images.perceptual_hash(plain) == "8000000000000000", "rounding errors do not show"


def _waves() -> NDArray[np.uint8]:
    x, y = np.meshgrid(np.linspace(0, 9, 64), np.linspace(0, 7, 48))
    return np.stack([128 + 100 * np.sin(x + c) * np.cos(y - x / (2 + c)) for c in range(3)], axis=2).astype(np.uint8)
