"""The perceptual hash of an image, by which near-duplicates are found.

It is pHash, the hash by a discrete cosine transform (C. Zauner, "Implementation and Benchmarking of Perceptual Image
Hash Functions", 2010, section 3.2.1), in the form of ``phash`` of the Python package ImageHash: brightness at 32 x 32
pixels, of its transform the 8 x 8 lowest frequencies, and of each whether it is above their median. Images that are
scaled, or compressed anew, have hashes that differ in few of their 64 bits. Colours do not count.

All sums are of integers, so a hash is the same on every machine that scales the image alike. It may differ from that of
ImageHash, whose sums are rounded, where a frequency is as good as the median: all images of one colour have the same
hash here.
"""

import numpy as np
from PIL import Image

BITS = 64
"""Number of bits of a hash."""

_EDGE = 32
_FREQUENCIES = 8
_SCALE_BITS = 20
"""Bits behind the point of a cosine. The largest sum, 32 * 32 * 255 * 2**40, is below 2**58."""


def _cosines() -> np.ndarray:
    """The lowest frequencies of the transform DCT-II, without its factor 2: ``[8, 32]`` int64, scaled."""
    frequency, place = np.arange(_FREQUENCIES)[:, None], np.arange(_EDGE)[None]
    return np.rint(np.cos(np.pi / (2 * _EDGE) * frequency * (2 * place + 1)) * (1 << _SCALE_BITS)).astype(np.int64)


_COSINES = _cosines()


def perceptual_hash(image: Image.Image) -> int:
    """The hash of an image, 0 to 2**64 - 1.

    The highest bit is that of the mean brightness; then follow the frequencies row by row, each row with one of the
    vertical ones.
    """
    grey = image.convert("L").resize((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    lowest = (_COSINES @ np.asarray(grey, np.int64) @ _COSINES.T).ravel()
    # The median of an even number of values is the mean of two. Both sides are doubled, to stay with integers.
    low, high = np.partition(lowest, (BITS // 2 - 1, BITS // 2))[BITS // 2 - 1 : BITS // 2 + 1]
    return int.from_bytes(np.packbits(2 * lowest > low + high).tobytes(), "big")
