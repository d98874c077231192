"""The bounds of image files: what a file makes its decoder do, read from its bytes before a decoder sees them.

The size in a header is not all that a file costs. A tile may be larger than the picture it belongs to, strips may all
lie over the same bytes, and a frame may be larger than its canvas. Each of these is bounded here by the same number of
pixels as the picture.
"""

import re
import struct

from vcf_batch.errors import RowError
from vcf_batch.images.avif import check_avif
from vcf_batch.images.limits import MAX_JPEG_SCANS, MAX_PIECES, check_size
from vcf_batch.images.tiff import TIFF_STARTS, check_tiff

_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")


def check(data: bytes, max_pixels: int) -> None:
    """Compare with ``max_pixels`` what the bytes of a file make its decoder decode. Nothing is decoded.

    Files of unknown formats pass.

    Raises:
        RowError: the file goes over the limit, or consists of more pieces than any encoder writes.
        ValueError: the file is damaged where its bounds stand.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            _check_jpeg(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            check_size(_webp_size(data), max_pixels)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            check_size(_gif_size(data), max_pixels)
        elif data[:4] in (*TIFF_STARTS, b"MM\0+"):
            check_tiff(data, max_pixels)
        elif data[4:8] == b"ftyp":
            check_avif(data, max_pixels)
    except (struct.error, IndexError) as error:
        raise ValueError("its header is cut off") from error


def _check_jpeg(data: bytes) -> None:
    scans, position = 0, 2
    while (marker := _JPEG_MARKER.search(data, position)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_JPEG_SCANS:
            raise RowError(f"the image is a JPEG of more than {MAX_JPEG_SCANS} scans; save it anew")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas size from a WebP header (RFC 9649), because Pillow allocates the canvas when it opens the file."""
    if len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _gif_size(data: bytes) -> tuple[int, int]:
    """Size of a GIF's canvas, enlarged to hold its first frame, which Pillow may fill when it opens the file."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    within = False
    for _ in range(MAX_PIECES):
        if within:  # An extension: blocks up to an empty one.
            within = bool(data[position])
            position += 1 + data[position]
        elif data[position] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<4H", data, position + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        else:
            within = data[position] == 0x21
            position += 2 if within else 1
    raise RowError(f"the image is a GIF of more than {MAX_PIECES} blocks before its first picture; save it anew")
