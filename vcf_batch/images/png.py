"""Bounds of PNG files, the number of their chunks; and files whose metadata Pillow refuses, without it."""

import struct
import zlib

from vcf_batch.errors import RowError
from vcf_batch.images.colours import MAX_PROFILE_BYTES
from vcf_batch.images.limits import MAX_PIECES, MAX_PNG_COMPRESSED

PNG_START = b"\x89PNG\r\n\x1a\n"

_COMPRESSED = frozenset({b"zTXt", b"iTXt", b"iCCP"})
"""Chunks of texts and profiles: Pillow expands each to a megabyte at most, whatever their number."""

_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_MAX_TEXT = 2**20
"""Most bytes of a text that Pillow expands."""
_MAX_TEXTS = 2**25
"""Most bytes of all texts; Pillow reads twice as many."""


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


def without_metadata(data: bytes) -> tuple[bytes, bytes | None]:
    """A file as it was without its profile, its long texts and whatever follows its last whole chunk; and the profile.

    Pillow refuses texts and profiles of more than a megabyte, and profiles of unknown compressions.

    Returns:
        The file, and its profile: empty if it cannot be read, None if there is none.
    """
    at, texts, packed = len(PNG_START), 0, None
    parts = [PNG_START]
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        stop = at + 12 + length
        if kind == b"IEND" or stop > len(data):
            break
        keep = kind != b"iCCP"
        if kind == b"iCCP":
            packed = data[at + 8 : stop - 4].partition(b"\0")[2]
        elif kind in (b"tEXt", *_COMPRESSED):
            texts += length
            keep = texts <= _MAX_TEXTS and (kind == b"tEXt" or _is_short(kind, data[at + 8 : stop - 4]))
        if keep:
            parts.append(data[at:stop])
        at = stop
    if packed is not None:  # the last one, as Pillow takes it; each may expand to megabytes
        packed = _expanded(packed[1:], MAX_PROFILE_BYTES) if packed[:1] == b"\0" else b""
    return b"".join([*parts, _END]), packed


def _is_short(kind: bytes, body: bytes) -> bool:
    """Whether Pillow expands a text: of a keyword, flags, for iTXt a language and a translation, and the text."""
    rest = body.partition(b"\0")[2]
    if kind == b"iTXt":
        if rest[:1] != b"\1":
            return True
        rest = rest[1:].partition(b"\0")[2].partition(b"\0")[2]
        return bool(_expanded(rest, _MAX_TEXT)) or not rest
    return bool(_expanded(rest[1:], _MAX_TEXT)) or not rest[1:]


def _expanded(data: bytes, limit: int) -> bytes:
    """What a zlib stream expands to; empty if it is damaged or longer than ``limit``."""
    stream = zlib.decompressobj()
    try:
        expanded = stream.decompress(data, limit)
    except zlib.error:
        return b""
    return b"" if stream.unconsumed_tail else expanded
