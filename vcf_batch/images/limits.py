"""Limits of what an image file may make its decoder do, whatever its format."""

from vcf_batch.errors import RowError

MAX_JPEG_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten. A scan of 100 bytes can cover the whole picture."""

MAX_JPEG_SEGMENTS = 16_384
"""Most segments of a JPEG. The largest file that is read has a quarter of it in segments of full length."""

MAX_JPEG_EXIF = 256
"""Most Exif segments of a JPEG; cameras write one. Pillow joins them one by one, in the square of their number."""

MAX_JPEG_FILLING = 2**20
"""Most bytes between a JPEG's segments before its first scan. Encoders write few or none; Pillow steps over each."""

MAX_PNG_COMPRESSED = 256
"""Most compressed texts and profiles of a PNG; encoders write a few. A kilobyte of each expands to a megabyte."""

MAX_PIECES = 65_536
"""Most strips or tiles of a TIFF, parts of an AVIF, chunks of a PNG or WebP, and blocks of a GIF before its first
picture. Each costs time, however small it is. The largest file that is read has no more chunks of the
8 KiB that libpng writes."""

LARGE_PIXELS = 16_000_000
"""Number of pixels above which images are decoded two at a time: decoding takes up to 24 bytes a pixel, and a file of a
few kilobytes may declare many pixels. A tile of a smaller picture may have this number of pixels."""

PADDING = 4
"""Greatest ratio of the pixels that are decoded to those that are allowed: tiles that are no larger than their picture
cover less than four times as much."""


def check_size(size: tuple[int, int] | None, max_pixels: int, of: str = "the image has") -> None:
    """Compare a width and height with the limit; None passes.

    Raises:
        RowError: there are no pixels, or too many.
    """
    if size is None:
        return
    width, height = size
    if width * height == 0:
        raise RowError(f"the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise RowError(
            f"{of} {width} x {height} = {width * height} pixels, over the limit of {max_pixels}; "
            "shrink it or raise --max-pixels"
        )
