"""A picture as a file of bounded size."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

LARGEST_EDGE = 1024
"""Longest edge in pixels that a picture of the page has. Larger ones are reduced."""

_EDGES = (
    *(1024, 896, 768, 640, 576, 512, 448, 416, 384, 352, 320, 288, 256, 224, 192, 160),
    *(128, 112, 96, 80, 72, 64, 56, 48, 40, 32, 24),
)
_LOSSLESS_EDGE = 160
_QUALITIES = (65, 40, 20, 1)


class FittedPicture(NamedTuple):
    """A picture as a WebP file, and the size that it was reduced from."""

    data: bytes
    width: int
    height: int


def fitted(image: Image.Image, most: int, edge: int = LARGEST_EDGE) -> FittedPicture | None:
    """The largest version of a picture that fits; None if none does.

    A picture of up to 160 pixels keeps its pixels as they are, if that fits. Others have the quality 65. Where 24
    pixels do not fit, the quality is lowered.

    Args:
        image: RGB, of any size.
        most: largest number of bytes.
        edge: longest edge in pixels.
    """
    size = image.size
    image = _reduced(image, edge)
    largest = max(image.size)
    versions = [(largest, _QUALITIES[0]), *((each, _QUALITIES[0]) for each in _EDGES if each < largest)]
    versions += [(min(_EDGES[-1], largest), quality) for quality in _QUALITIES[1:]]
    if largest <= _LOSSLESS_EDGE and len(data := _encoded(image, largest, {"lossless": True})) <= most:
        return FittedPicture(data, *size)
    files: dict[int, bytes] = {}
    # Files get smaller from each version to the next, nearly always: halve the list.
    low, high = 0, len(versions)
    while low < high:
        middle = (low + high) // 2
        at, quality = versions[middle]
        files[middle] = _encoded(image, at, {"quality": quality})
        low, high = (low, middle) if len(files[middle]) <= most else (middle + 1, high)
    return FittedPicture(files[low], *size) if low < len(versions) else None


def _encoded(image: Image.Image, edge: int, options: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    _reduced(image, edge).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def _reduced(image: Image.Image, edge: int) -> Image.Image:
    if max(image.size) <= edge:
        return image
    image = image.copy()
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image
