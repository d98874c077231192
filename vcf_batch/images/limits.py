"""Limits of what an image file may make its decoder do, whatever its format."""

from vcf_batch.errors import RowError

MAX_JPEG_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten. A scan of 100 bytes can cover the whole picture."""

MAX_PIECES = 65_536
"""Most strips or tiles of a TIFF, parts of an AVIF, and blocks of a GIF before its first picture. Each costs time,
however small it is."""

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
