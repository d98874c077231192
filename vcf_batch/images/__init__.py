"""Images: decode within bounds, orient, resize, convert ranges, encode.

Pixels are ``uint8`` (files, PIL) or in ``[0, 1]`` (the pipeline's output). All arrays are ``[H, W, 3]`` in sRGB: pixels
of a file with an ICC profile are converted, and those of any other file are taken as they are.
"""

import contextlib
import hashlib
import io
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from vcf_batch.errors import RowError, VcfBatchError
from vcf_batch.images import bounds, colours, jpeg, kinds, limits, png
from vcf_batch.images.kinds import FORMATS as FORMATS
from vcf_batch.images.limits import LARGE_PIXELS

_LARGE = threading.Semaphore(2)

_LONGEST_ASPECT = 8
"""Largest ratio of sides that :func:`trimmed` leaves. At width 224 a 1 x 30000 image has 1.5 G pixels."""

_GREYS = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")

_ORIENTATION_TAG = 0x0112

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ENCODERS: dict[str, dict[str, object]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


def decode(data: bytes, max_pixels: int, name: str = "an image") -> Image.Image:
    """Decode an image file to plain RGB.

    EXIF orientation is applied, an ICC profile is converted to sRGB, transparency is composed over white, 16-bit greys
    are rounded to 8 bits, CMYK and palettes are converted, and the first frame of an animation is taken. Pixels are
    counted from the header, before anything is decoded. Pillow's own limit, ``2 * PIL.Image.MAX_IMAGE_PIXELS`` (179
    million), holds even if ``max_pixels`` is larger.

    A file that is whole but for its end, or has longer metadata than Pillow reads, is decoded too.

    Args:
        data: the whole file, in one of :data:`FORMATS`.
        max_pixels: largest width times height.
        name: the file, for the log.

    Returns:
        An ``RGB`` image that owns its pixels and carries no metadata.

    Raises:
        RowError: the file is empty, damaged, truncated, too large, of a kind that is not read, or not an image.
        NodeError: the file has an ICC profile, and Pillow has no LittleCMS on this machine.
    """
    if not data:
        raise RowError("the image file is empty (0 bytes)")
    kinds.refuse_others(data)
    # A damaged file makes Pillow raise nearly any exception. All but MemoryError are the file's fault.
    try:
        bounds.check(data, max_pixels)
        if data.startswith(b"\xff\xd8") and jpeg.lacks_end(data):
            raise ValueError("it has no end, and not all of its pixels")
        return _decoded(data, max_pixels, name)
    except (MemoryError, VcfBatchError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(f"the image is larger than Pillow decodes: {error}; shrink it") from error
    except Exception as error:
        cause = error
    try:
        return _mended(data, max_pixels, name)
    except (MemoryError, VcfBatchError):
        raise
    except Exception:
        raise RowError(kinds.not_readable(data, cause)) from cause


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in memory as plain RGB, as :func:`decode` gives one of a file, but without orientation and profile.

    Raises:
        RowError: it has 32-bit pixels, whose range is unknown.
    """
    return _to_rgb(image, None, "an image")


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole image squashed to ``width`` x ``height``: bilinear with antialiasing, no crop."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_unit(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert uint8 ``[H, W, 3]`` or an RGB image to float32 ``[H, W, 3]`` in [0, 1]."""
    return _pixels(image).astype(np.float32) / np.float32(255)


def from_unit(array: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Convert finite floats ``[H, W, 3]`` in [0, 1] to the nearest uint8; values outside are clipped."""
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def trimmed(image: Image.Image) -> Image.Image:
    """The middle of a very long image, for a model that crops to the middle anyway; any other image unchanged."""
    limit = _LONGEST_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    left, top = ((side - limit) // 2 if side > limit else 0 for side in image.size)
    return image.crop((left, top, left + min(image.width, limit), top + min(image.height, limit)))


def perceptual_hash(image: NDArray[np.uint8]) -> str:
    """Perceptual hash: 64 bits in hex; similar images differ in few bits.

    It equals ``phash`` of the ImageHash package. The image becomes 32 x 32 greys, and the 8 x 8 lowest frequencies of
    their cosine transform (DCT-II) give one bit each: whether they exceed the median. Bits come row by row, the highest
    first.

    Args:
        image: uint8 ``[H, W, 3]``.
    """
    grey = Image.fromarray(_pixels(image)).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    waves = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))
    # Rounded, because in a plain image the bits would otherwise depend on rounding errors.
    frequencies = np.round(waves @ np.asarray(grey, np.float64) @ waves.T, 6)
    return np.packbits(frequencies > np.median(frequencies)).tobytes().hex()


def encode(image: NDArray[np.uint8], image_format: str, xmp: bytes | None = None) -> bytes:
    """Encode to a file's bytes: the same arguments always give the same bytes.

    Args:
        image: uint8 ``[H, W, 3]``.
        image_format: ``png`` (level 1), ``webp`` (lossless, method 0) or ``jpg`` (quality 95, 4:4:4).
        xmp: metadata as XMP in UTF-8; None writes none.
    """
    buffer = io.BytesIO()
    options = dict(_ENCODERS[image_format])
    if xmp is not None and image_format == "png":
        options["pnginfo"] = chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp is not None:
        options["xmp"] = xmp
    Image.fromarray(_pixels(image)).save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _pixels(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    return array


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    limits.check_size(image.size, max_pixels)
    return image


def _bounded(image: Image.Image) -> contextlib.AbstractContextManager[object]:
    return _LARGE if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext()


def _decoded(data: bytes, max_pixels: int, name: str, profile: bytes | None = None) -> Image.Image:
    """Decode a file, with its own profile if none is given."""
    image = _opened(data, max_pixels)
    with image, _bounded(image):
        image.load()
        own = image.info.get("icc_profile") if profile is None else profile
        return _to_rgb(_oriented(image), own, name)


def _mended(data: bytes, max_pixels: int, name: str) -> Image.Image:
    """Decode a file again without what Pillow stumbles over, if its pixels are all there.

    Raises:
        ValueError: the file is not of such a kind.
        Exception: the file is damaged.
    """
    if data.startswith(png.PNG_START):
        lean, profile = png.without_metadata(data)
        return _decoded(lean, max_pixels, name, profile)
    if data.startswith(b"\xff\xd8"):
        whole, *others = jpeg.with_end(data)
        pixels = _sum_of_pixels(whole, max_pixels)
        if all(_sum_of_pixels(other, max_pixels) == pixels for other in others):
            return _decoded(whole, max_pixels, name)
    raise ValueError("the file cannot be mended")


def _sum_of_pixels(data: bytes, max_pixels: int) -> bytes:
    image = _opened(data, max_pixels)
    with image, _bounded(image):
        return hashlib.sha256(image.tobytes()).digest()


def _oriented(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:
        return image
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


def _to_rgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise RowError(
            f"the image cannot be read because it has 32-bit {'integer' if image.mode == 'I' else 'floating-point'} "
            "pixels, whose range is unknown; convert it to 8 or 16 bits"
        )
    is_grey = image.mode in _GREYS
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile is not None:
        image = colours.to_srgb(image, profile, is_grey, name)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # An RGB image is copied, too, so that the caller's image has no open file behind it.
    rgb = image.convert("RGB") if image.mode != "RGB" else image.copy()
    rgb.info.clear()
    return rgb
