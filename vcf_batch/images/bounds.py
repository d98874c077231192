"""The bounds of image files: what a file makes its decoder do, read from its bytes before a decoder sees them.

The size in a header is not all that a file costs. A tile may be larger than the picture it belongs to, strips may all
lie over the same bytes, and a frame may be larger than its canvas. Each of these is bounded here by the same number of
pixels as the picture. A file may also consist of millions of empty pieces, which are counted.

With these bounds no file is known that costs much more than a large picture of its format does, so images are decoded
in the worker's own process. What a zlib, LZMA or Zstandard stream expands to needs no bound here, because it is read up
to the end of its picture or strip, and a dictionary of gigabytes that an LZMA stream names is reserved and not filled.
"""

import struct

from vcf_batch.errors import RowError
from vcf_batch.images.avif import check_avif
from vcf_batch.images.jpeg import check_jpeg
from vcf_batch.images.limits import LARGE_PIXELS, MAX_PIECES, check_size
from vcf_batch.images.png import PNG_START, check_png
from vcf_batch.images.tiff import TIFF_STARTS, check_tiff

_BMP_RUN_LENGTHS = {1, 2}
"""Compressions of BMP that Pillow expands run by run in Python."""


def check(data: bytes, max_pixels: int) -> None:
    """Compare with ``max_pixels`` what the bytes of a file make its decoder decode. Nothing is decoded.

    Files of unknown formats pass.

    Raises:
        RowError: the file goes over the limit, or consists of more pieces than any encoder writes.
        ValueError: the file is damaged where its bounds stand.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            check_jpeg(data)
        elif data.startswith(PNG_START):
            check_png(data)
        elif data.startswith(b"BM"):
            _check_bmp(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            check_size(_webp_size(data), max_pixels)
            _check_webp(data)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            check_size(_gif_size(data), max_pixels)
        elif data[:4] in (*TIFF_STARTS, b"MM\0+"):
            check_tiff(data, max_pixels)
        elif data[4:8] == b"ftyp":
            check_avif(data, max_pixels)
    except (struct.error, IndexError) as error:
        raise ValueError("its header is cut off") from error


def _check_bmp(data: bytes) -> None:
    """Compare with the picture the runs that a file has room for, if it consists of runs.

    A pixel takes two bytes at most, and so does the end of a row.
    """
    (header,) = struct.unpack_from("<I", data, 14)
    if header < 40:
        return
    width, height, _, _, compression = struct.unpack_from("<IiHHI", data, 18)
    if compression not in _BMP_RUN_LENGTHS:
        return
    pixels = width * abs(height)
    if pixels > LARGE_PIXELS:
        raise RowError(
            f"the image is a BMP of run lengths with {width} x {abs(height)} = {pixels} pixels, over the limit of "
            f"{LARGE_PIXELS}; save it as a PNG"
        )
    limit = 2 * (pixels + abs(height)) + MAX_PIECES
    if len(data) > limit:
        raise RowError(
            f"the image is a BMP of run lengths with {len(data)} bytes, over the limit of {limit} for {pixels} pixels; "
            "save it as a PNG"
        )


def _check_webp(data: bytes) -> None:
    """Count the chunks of a WebP: libwebp keeps 48 bytes for each."""
    position, chunks = 12, 0
    while position + 8 <= len(data):
        chunks += 1
        if chunks > MAX_PIECES:
            raise RowError(f"the image is a WebP of more than {MAX_PIECES} chunks; save it anew")
        (size,) = struct.unpack_from("<I", data, position + 4)
        position += 8 + size + (size & 1)


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
