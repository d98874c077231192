"""How the bytes of the page that are left for pictures are shared among them."""

from collections.abc import Mapping
from types import MappingProxyType

PICTURE_WEIGHTS: Mapping[str, int] = MappingProxyType({"output": 4, "reference": 2, "content": 2, "style": 1})
"""Share of a picture in the bytes, by what it shows. The style image is the reference in another size."""

DOT_BYTES = 1300
"""Most bytes of the picture of a dot that is no shown sample."""
DOT_EDGE = 72
"""Longest edge of that picture in pixels."""

DATA_PREFIX = "data:image/webp;base64,"
_AROUND = len(DATA_PREFIX) + len('["",9999999,9999999],')
_DOTS_SHARE = 1 / 4


def file_bytes(embedded: float) -> int:
    """Largest size of a picture that takes at most ``embedded`` bytes in the page, with its size and as base64."""
    return max(int(embedded) - _AROUND, 0) // 4 * 3


def shares(most: int, dots: int, pictures: Mapping[str, int]) -> dict[str, int]:
    """Most bytes of a picture, by what it shows, and of a ``dot``.

    Together the pictures take at most ``most`` bytes in the page, and all of one kind have the same share. Dots have a
    quarter at most.

    Args:
        most: bytes of the page that are left for pictures.
        dots: number of pictures of dots.
        pictures: number of other pictures, by the names in :data:`PICTURE_WEIGHTS`.
    """
    dot = min(DOT_BYTES, file_bytes(most * _DOTS_SHARE / max(dots, 1)))
    left = most - dots * embedded_bytes(dot)
    weights = sum(PICTURE_WEIGHTS[name] * count for name, count in pictures.items())
    return {
        "dot": dot,
        **{name: file_bytes(left * weight / max(weights, 1)) for name, weight in PICTURE_WEIGHTS.items()},
    }


def embedded_bytes(size: int) -> int:
    """Most bytes that a picture of ``size`` bytes takes in the page."""
    return -(-size // 3) * 4 + _AROUND
