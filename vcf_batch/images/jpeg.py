"""Bounds of JPEG files, the number of their scans and segments; and files without an end marker, with one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vcf_batch.errors import RowError
from vcf_batch.images.limits import MAX_JPEG_EXIF, MAX_JPEG_FILLING, MAX_JPEG_SCANS, MAX_JPEG_SEGMENTS

_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
"""A marker, but for those that are part of a scan: stuffed bytes, filling and restarts."""
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1
_WITHOUT_LENGTH = frozenset({0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)})
"""Markers that Pillow reads no segment for: the start and end of a picture, and reserved ones."""

_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_RESTARTS = 0xDD
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_OTHER_BITS = tuple(bytes((i * factor + 91) % 255 for i in range(1, 65)) for factor in (37, 149))
"""Bits that may be put behind the pixels, in two versions. None is a marker."""


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


@dataclass
class _Scans:
    """What the segments of a file say about its scans."""

    progressive: bool = False
    size: tuple[int, int] = (0, 0)
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Horizontal and vertical sampling of each component."""
    restarts: int = 0
    """Number of blocks of pixels between restart markers; 0 for none."""
    bits_left: dict[int, list[int]] = field(default_factory=dict)
    """Number of bits of each coefficient of each component that are still to come; -1 before the first."""
    last: tuple[int, ...] = ()
    """Components of the last scan."""
    begin: int = 0
    """Place of the last scan's pixels."""

    def restart_markers(self) -> int:
        """Number of restart markers in the last scan."""
        if not self.restarts:
            return 0
        across, down = (max(sampling[axis] for sampling in self.sampling.values()) for axis in (0, 1))
        block = 8 * across, 8 * down
        width, height = self.size
        if len(self.last) == 1:
            own = self.sampling[self.last[0]]
            width, height = -(-width * own[0] // across), -(-height * own[1] // down)
            block = 8, 8
        blocks = -(-width // block[0]) * -(-height // block[1])
        return -(-blocks // self.restarts) - 1


def lacks_end(data: bytes) -> bool:
    """Whether a file has no end marker behind its pixels.

    Pillow takes zeros for pixels, so it reads a file whose rest was reserved and never written, half of it grey.
    """
    return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda") and _scans(data) is not None


def with_end(data: bytes) -> tuple[bytes, ...]:
    """A file that lacks its end marker, with one; then the same with other bits between the pixels and the marker.

    What is decoded of each is equal if and only if all pixels are there, but for a chance below 1 in 1,000 that one
    block of 8 x 8 pixels lacks its last bits. A decoder fills what is missing with the bits that follow.

    Returns:
        Empty if the file has an end marker, or lacks a scan.
    """
    scans = _scans(data)
    if scans is None or not scans.last:
        return ()
    if any(left for coefficients in scans.bits_left.values() for left in coefficients):
        return ()
    whole = data.rstrip(b"\0")
    if whole.endswith(b"\xff"):
        # It is half of an end marker, or the half of a stuffed byte whose other half was just cut off.
        whole = whole + b"\0" if len(whole) < len(data) else whole.rstrip(b"\xff")
    if len(_RESTART.findall(whole, scans.begin)) != scans.restart_markers():
        return ()
    return tuple(whole + bits + b"\xff\xd9" for bits in (b"", *_OTHER_BITS))


def _scans(data: bytes) -> _Scans | None:
    """The scans of a file; None if it has an end marker, or is of another kind."""
    scans, position = _Scans(), 2
    while marker := _MARKER.search(data, position):
        kind, position = marker[0][1], marker.end()
        if kind == _END and scans.last:
            return None
        if kind in _WITHOUT_LENGTH:
            continue
        body = data[position + 2 : position + int.from_bytes(data[position : position + 2], "big")]
        position += 2 + len(body)
        try:
            if kind in _FRAMES:
                _note_frame(scans, kind, body)
            elif kind == _RESTARTS:
                scans.restarts = int.from_bytes(body[:2], "big")
            elif kind == _SCAN:
                _note_scan(scans, body)
                scans.begin = position
        except (IndexError, KeyError):
            return None
    return scans


def _note_frame(scans: _Scans, kind: int, body: bytes) -> None:
    scans.progressive = kind in _PROGRESSIVE
    scans.size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
    for at in range(6, 6 + 3 * body[5], 3):
        scans.sampling[body[at]] = max(body[at + 1] >> 4, 1), max(body[at + 1] & 15, 1)
        scans.bits_left[body[at]] = [-1] * 64


def _note_scan(scans: _Scans, body: bytes) -> None:
    count = body[0]
    scans.last = tuple(body[1 : 1 + 2 * count : 2])
    first, last, bits = body[1 + 2 * count : 4 + 2 * count]
    coefficients: Sequence[int] = range(first, min(last, 63) + 1) if scans.progressive else range(64)
    for component in scans.last:
        for coefficient in coefficients:
            scans.bits_left[component][coefficient] = bits & 15 if scans.progressive else 0
