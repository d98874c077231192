"""Images: decode within bounds, orient, resize, convert ranges, encode.

Pixels have three ranges in this project, and only this module converts them: ``uint8`` (files, PIL), ``[0, 1]`` (the
pipeline's output) and ``[-1, 1]`` (the perceptual distance). All arrays are ``[H, W, 3]``, sRGB as stored; ICC profiles
are not applied.
"""

import contextlib
import io
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vcf_batch.errors import RowError
from vcf_batch.images import bounds, limits
from vcf_batch.images.limits import LARGE_PIXELS
from vcf_batch.images.signatures import LFS_POINTER, READ, SVG, XML, kind_of

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""File formats of references. The list is closed because Pillow also reads EPS, and EPS starts Ghostscript."""

_LARGE = threading.Semaphore(2)

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


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file to plain RGB.

    EXIF orientation is applied, transparency is composed over white, 16-bit greys are rounded to 8 bits, CMYK and
    palettes are converted, and the first frame of an animation is taken. Pixels are counted from the header, before
    anything is decoded. Pillow's own limit, ``2 * PIL.Image.MAX_IMAGE_PIXELS`` (179 million), holds even if
    ``max_pixels`` is larger.

    Args:
        data: the whole file, in one of :data:`FORMATS`.
        max_pixels: largest width times height.

    Returns:
        An ``RGB`` image that owns its pixels and carries no metadata.

    Raises:
        RowError: the file is empty, damaged, truncated, too large, or not an image.
    """
    if not data:
        raise RowError("the image file is empty (0 bytes)")
    try:
        bounds.check(data, max_pixels)
    except ValueError as error:
        raise RowError(_not_readable(data, error)) from error
    # A damaged file makes Pillow raise nearly any exception. All but MemoryError are the file's fault.
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(f"the image is larger than Pillow decodes: {error}; shrink it") from error
    except Exception as error:
        raise RowError(_not_readable(data, error)) from error
    limits.check_size(image.size, max_pixels)
    try:
        with image, _LARGE if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext():
            image.load()
            return _to_rgb(_oriented(image))
    except (MemoryError, RowError):
        raise
    except Exception as error:
        raise RowError(_not_readable(data, error)) from error


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole image squashed to ``width`` x ``height``: bilinear with antialiasing, no crop."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_unit(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert uint8 ``[H, W, 3]`` or an RGB image to float32 ``[H, W, 3]`` in [0, 1]."""
    return _pixels(image).astype(np.float32) / np.float32(255)


def to_signed(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert uint8 ``[H, W, 3]`` or an RGB image to float32 ``[H, W, 3]`` in [-1, 1]."""
    return to_unit(image) * np.float32(2) - np.float32(1)


def from_unit(array: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Convert finite floats ``[H, W, 3]`` in [0, 1] to the nearest uint8; values outside are clipped."""
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


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


def _oriented(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:
        return image
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise RowError(
            f"the image has 32-bit {'integer' if image.mode == 'I' else 'floating-point'} pixels, whose range is "
            "unknown; convert it to 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        rgb = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        rgb = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    else:
        # An RGB image is copied, too, so that the caller's image has no open file behind it.
        rgb = image.convert("RGB") if image.mode != "RGB" else image.copy()
    rgb.info.clear()
    return rgb


def _not_readable(data: bytes, error: Exception) -> str:
    # For an unknown file Pillow's message contains a memory address, and so differs every time.
    reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
    kind = kind_of(data)
    if kind in READ:
        return f"the image is a damaged or truncated {kind} file of {len(data)} bytes{reason}; replace it"
    if kind == LFS_POINTER:
        return "the file is a Git LFS pointer, not the image it stands for; fetch it with 'git lfs pull'"
    if kind in (SVG, XML):
        what = "an SVG drawing" if kind == SVG else "a web page or XML text"
        return f"the file is {what}, not an image in one of {', '.join(FORMATS)}"
    return f"the file of {len(data)} bytes is not an image in one of {', '.join(FORMATS)}"
