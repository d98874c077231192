"""Bounds of JPEG files: the number of their scans and segments."""

import re

from vcf_batch.errors import RowError
from vcf_batch.images.limits import MAX_JPEG_EXIF, MAX_JPEG_FILLING, MAX_JPEG_SCANS, MAX_JPEG_SEGMENTS

_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
"""A marker, but for those that are part of a scan: stuffed bytes, filling and restarts."""
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1
_WITHOUT_LENGTH = frozenset({0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)})
"""Markers that Pillow reads no segment for: the start and end of a picture, and reserved ones."""


def check_jpeg(data: bytes) -> None:
    """Count the scans and segments of a file up to its end marker, as far as they cost time whatever their size.

    Raises:
        RowError: there are more than any encoder writes.
    """
    position, segments, scans, exif, filling = 2, 0, 0, 0, 0
    while True:
        marker = _MARKER.search(data, position)
        if not scans:
            filling += (marker.start() if marker else len(data)) - position
            if filling > MAX_JPEG_FILLING:
                raise RowError(
                    f"the image is a JPEG of more than {MAX_JPEG_FILLING} bytes between its segments; save it anew"
                )
        if not marker:
            return
        kind, position = marker[0][1], marker.end()
        if kind == _END and scans:
            return
        segments += 1
        if segments > MAX_JPEG_SEGMENTS:
            raise RowError(f"the image is a JPEG of more than {MAX_JPEG_SEGMENTS} segments; save it anew")
        scans += kind == _SCAN
        if scans > MAX_JPEG_SCANS:
            raise RowError(f"the image is a JPEG of more than {MAX_JPEG_SCANS} scans; save it anew")
        exif += kind == _EXIF and data.startswith(b"Exif\0\0", position + 2)
        if exif > MAX_JPEG_EXIF:
            raise RowError(
                f"the image is a JPEG of more than {MAX_JPEG_EXIF} Exif segments; save it anew without its metadata"
            )
        if kind not in _WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")
