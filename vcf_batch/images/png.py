"""Bounds of PNG files: the number of their chunks."""

import struct

from vcf_batch.errors import RowError
from vcf_batch.images.limits import MAX_PIECES, MAX_PNG_COMPRESSED

PNG_START = b"\x89PNG\r\n\x1a\n"

_COMPRESSED = frozenset({b"zTXt", b"iTXt", b"iCCP"})
"""Chunks of texts and profiles: Pillow expands each to a megabyte at most, whatever their number."""


def check_png(data: bytes) -> None:
    """Count the chunks of a file up to its end chunk.

    Raises:
        RowError: there are more than any encoder writes.
    """
    position, chunks, compressed = len(PNG_START), 0, 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        chunks += 1
        if chunks > MAX_PIECES:
            raise RowError(f"the image is a PNG of more than {MAX_PIECES} chunks; save it anew")
        compressed += kind in _COMPRESSED
        if compressed > MAX_PNG_COMPRESSED:
            raise RowError(
                f"the image is a PNG of more than {MAX_PNG_COMPRESSED} compressed texts and profiles; save it anew "
                "without its metadata"
            )
        position += 12 + length
