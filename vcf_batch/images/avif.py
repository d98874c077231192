"""Bounds of AVIF files: the sizes that their items and AV1 streams declare."""

import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vcf_batch.errors import RowError
from vcf_batch.images.limits import MAX_PIECES, PADDING, check_size

_Box = tuple[bytes, int, int]

_AVIF_FOLDERS = {
    b"meta": 4,
    b"iinf": 6,
    **dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"iprp", b"ipco"), 0),
}
"""Boxes that hold others, and the number of bytes before these (2 more in a later version of ``iinf``)."""
_AV1_SEQUENCE, _AV1_FRAMES = 1, {3, 6}
"""Types of OBU, the pieces of AV1 data: a sequence header, and the headers of frames."""
_AVIF_DEPTH = 8


def check_avif(data: bytes, max_pixels: int) -> None:
    """Compare the parts and frames of a file with ``max_pixels``.

    Raises:
        RowError: the file goes over the limit, or is of a kind that is not read.
        ValueError, struct.error, IndexError: the file is damaged.
    """
    total = 0
    for part in _avif_parts(data):
        check_size(part.size, max_pixels, "a part of the image has")
        # A frame may have a size of its own, up to what its number of bits can say.
        check_size(part.largest, PADDING * max_pixels, "a frame of the image may have")
        total += part.size[0] * part.size[1] * part.frames
    if total > PADDING * max_pixels:
        raise RowError(
            f"the frames and parts of the image have {total} pixels, over {PADDING} times the limit of {max_pixels}; "
            "shrink it or raise --max-pixels"
        )


@dataclass(frozen=True, slots=True)
class _AvifPart:
    """A picture in an AVIF: the image, its transparency, a tile of a grid, a thumbnail."""

    size: tuple[int, int]
    """Width and height in pixels."""
    largest: tuple[int, int]
    """Greatest width and height that a frame in it may give itself."""
    frames: int
    """Number of frames that are decoded to show it; 0 for a size that the file's boxes state."""


def _avif_parts(data: bytes) -> Iterator[_AvifPart]:
    """Yield every part of an AVIF: each picture, and the first picture of each track.

    The AV1 data is asked, because the sizes in the file's own boxes may be smaller.

    Raises:
        ValueError, struct.error, IndexError: the file is damaged, or has more than :data:`MAX_PIECES` boxes.
    """
    boxes = list(itertools.islice(_boxes(data, 0, len(data), 0), MAX_PIECES + 1))
    left = MAX_PIECES - len(boxes)
    empty = True
    for kind, start, _ in boxes:
        if kind == b"ispe":
            yield _AvifPart(size := struct.unpack_from(">II", data, start + 4), size, 0)
    for stream in _av1_streams(data, boxes):
        found = list(itertools.islice(_av1_pieces(stream), max(left, 0)))
        left -= 1 + len(found)
        if left < 0:
            raise ValueError(f"it has more than {MAX_PIECES} boxes and parts")
        sequences = {_av1_sizes(body) for kind, body in found if kind == _AV1_SEQUENCE}
        if not sequences:
            raise ValueError("a part of it does not say its size")
        for size, largest in sequences:
            yield _AvifPart(size, largest, sum(kind in _AV1_FRAMES for kind, _ in found))
        empty = False
    if empty:
        raise ValueError("it holds no AV1 picture")


def _boxes(data: bytes, start: int, stop: int, depth: int) -> Iterator[_Box]:
    """Yield kind, start and stop of the body of each box (ISO/IEC 14496-12), and of those in it."""
    if depth > _AVIF_DEPTH:
        raise ValueError("its boxes are nested too deep")
    while stop - start >= 8:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", data, start + 8), 16
        end = min(start + size, stop) if size else stop
        if end < start + head:
            raise ValueError("a box in it has no size")
        yield kind, start + head, end
        if kind in _AVIF_FOLDERS:
            skip = _AVIF_FOLDERS[kind] + (2 if kind == b"iinf" and data[start + head] else 0)
            yield from _boxes(data, start + head + skip, end, depth + 1)
        start = end


def _av1_streams(data: bytes, boxes: Iterable[_Box]) -> Iterator[bytes]:
    """Yield the AV1 data of each picture, and of the first picture of each track."""
    coded: set[int] = set()
    items: list[tuple[int, bool, list[tuple[int, int]]]] = []
    idat = 0
    chunks: list[int] = []
    lengths: list[int] = []
    for kind, start, _ in boxes:
        if kind == b"idat":
            idat = start
        elif kind == b"infe":
            coded |= _coded_item(data, start)
        elif kind == b"iloc":
            items += _item_places(data, start)
        elif kind in (b"stco", b"co64"):
            chunks += struct.unpack_from(">I" if kind == b"stco" else ">Q", data, start + 8)
        elif kind == b"stsz":
            (every,) = struct.unpack_from(">I", data, start + 4)
            lengths += [every] if every else struct.unpack_from(">I", data, start + 12)
    places = [(idat if inside else 0, extents) for number, inside, extents in items if number in coded]
    places += [(0, [extent]) for extent in zip(chunks, lengths, strict=True)]
    if sum(min(length, len(data)) for _, extents in places for _, length in extents) > 2 * len(data):
        raise ValueError("its parts lie over one another")
    for base, extents in places:
        yield b"".join(data[base + offset : base + offset + length] for offset, length in extents)


def _coded_item(data: bytes, start: int) -> set[int]:
    """Number of the item that a box ``infe`` describes, if it is AV1 data."""
    version = data[start]
    number, _, kind = struct.unpack_from(">HH4s" if version < 3 else ">IH4s", data, start + 4)
    return {number} if kind == b"av01" else set()


def _item_places(data: bytes, start: int) -> Iterator[tuple[int, bool, list[tuple[int, int]]]]:
    """Yield of each item in a box ``iloc`` its number, whether it lies in ``idat``, and its offsets and lengths."""
    version = data[start]
    widths = data[start + 4] >> 4, data[start + 4] & 15, data[start + 5] >> 4, data[start + 5] & 15
    offset_bytes, length_bytes, base_bytes, index_bytes = widths
    at = start + 6

    def number(width: int) -> int:
        nonlocal at
        if at + width > len(data):
            raise ValueError("the places of its parts are cut off")
        at += width
        return int.from_bytes(data[at - width : at], "big")

    left = MAX_PIECES
    for _ in range(number(2 if version < 2 else 4)):
        item = number(2 if version < 2 else 4)
        inside = bool(version) and number(2) & 15 == 1
        number(2)
        base, count = number(base_bytes), number(2)
        left -= 1 + count
        if left < 0:
            raise ValueError(f"it has more than {MAX_PIECES} parts")
        extents = []
        for _ in range(count):
            number(index_bytes if version else 0)
            offset, length = base + number(offset_bytes), number(length_bytes)
            extents.append((offset, length or len(data)))
        yield item, inside, extents


def _av1_pieces(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of each OBU (AV1 specification, 5.3), up to the first that is none."""
    at = 0
    while at < len(stream):
        head = stream[at]
        at += 2 if head & 4 else 1
        size = len(stream) - at
        if head & 2:
            size, shift = 0, 0
            while True:
                byte = stream[at]
                at += 1
                size |= (byte & 0x7F) << shift
                shift += 7
                if not byte & 0x80 or shift > 56:
                    break
        yield head >> 3 & 15, stream[at : at + min(size, 1024)]
        at += size


def _av1_sizes(body: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size in a sequence header (AV1 specification, 5.5.1), and the largest one that a frame may give itself."""
    bits, at = int.from_bytes(body, "big"), 8 * len(body)

    def take(count: int) -> int:
        nonlocal at
        at -= count
        if at < 0:
            raise ValueError("a part of it ends within its header")
        return bits >> at & ((1 << count) - 1)

    take(4)
    reduced = take(1)
    if reduced:
        take(5)
    else:
        delay = 0
        if take(1):  # Timing.
            take(64)
            if take(1):
                zeros = 0
                while not take(1):
                    zeros += 1
                take(min(zeros, 32) if zeros < 32 else 0)
            if take(1):
                delay = take(5) + 1
                take(42)
        delayed = take(1)
        timed = bool(delay)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if timed and take(1):
                take(2 * delay + 1)
            if delayed and take(1):
                take(4)
    across, down = take(4) + 1, take(4) + 1
    size = take(across) + 1, take(down) + 1
    return size, size if reduced else (1 << across, 1 << down)
