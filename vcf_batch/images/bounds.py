"""The bounds of image files: what a file makes its decoder do, read from its bytes before a decoder sees them.

The size in a header is not all that a file costs. A tile may be larger than the picture it belongs to, strips may all
lie over the same bytes, and a frame may be larger than its canvas. Each of these is bounded here by the same number of
pixels as the picture.
"""

import itertools
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vcf_batch.errors import RowError

MAX_JPEG_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten. A scan of 100 bytes can cover the whole picture."""

MAX_PIECES = 65_536
"""Most strips or tiles of a TIFF, parts of an AVIF, and blocks of a GIF before its first picture. Each costs time,
however small it is."""

LARGE_PIXELS = 16_000_000
"""Number of pixels above which images are decoded two at a time: decoding takes up to 24 bytes a pixel, and a file of a
few kilobytes may declare many pixels. A tile of a smaller picture may have this number of pixels."""

_PADDING = 4
"""Greatest ratio of the pixels that are decoded to those that are allowed: tiles that are no larger than their picture
cover less than four times as much."""

_MAX_TIFF_FIELDS = 4096
"""Most fields of a TIFF's directory, as in libtiff."""

_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")

_TIFF_STARTS = (b"II*\0", b"II\0*", b"MM\0*", b"MM*\0", b"II+\0")
"""What Pillow reads, faulty ones included, but for BigTIFF in big-endian order, which it takes for another format."""
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 277, 278, 284, 322, 323
_OFFSETS = {273, 324}
_BYTE_COUNTS = {279, 325}
_TIFF_FIELDS = {_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, *_OFFSETS, *_BYTE_COUNTS}


_Box = tuple[bytes, int, int]

_AVIF_FOLDERS = {
    b"meta": 4,
    b"iinf": 6,
    **dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"iprp", b"ipco"), 0),
}
"""Boxes that hold others, and the number of bytes before these (2 more in a later version of ``iinf``)."""
_AVIF_DEPTH = 8
_AV1_SEQUENCE, _AV1_FRAMES = 1, {3, 6}
"""Types of OBU, the pieces of AV1 data: a sequence header, and the headers of frames."""


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
        elif data[:4] in (*_TIFF_STARTS, b"MM\0+"):
            _check_tiff(data, max_pixels)
        elif data[4:8] == b"ftyp":
            _check_avif(data, max_pixels)
    except (struct.error, IndexError) as error:
        raise ValueError("its header is cut off") from error


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


def _check_tiff(data: bytes, max_pixels: int) -> None:
    if data[:4] not in _TIFF_STARTS:
        raise RowError("the image is a BigTIFF in big-endian order, which is not read; save it as a PNG, JPEG or WebP")
    order = ">" if data.startswith(b"MM") else "<"
    fields = dict(_tiff_fields(data, order))
    one = {tag: values[0] for tag, values in fields.items() if tag not in _OFFSETS | _BYTE_COUNTS}
    if min(one.values(), default=0) < 0 or _WIDTH not in one or _HEIGHT not in one:
        raise ValueError("its width and height are not given")
    width, height = one[_WIDTH], one[_HEIGHT]
    check_size((width, height), max_pixels)
    strip = width, min(one.get(_ROWS, height), height)
    tiled = not fields.keys().isdisjoint((_TILE_WIDTH, _TILE_HEIGHT, 324))
    if tiled and 273 in fields:
        raise ValueError("it has both strips and tiles")
    piece = (one.get(_TILE_WIDTH, 0), one.get(_TILE_HEIGHT, 0)) if tiled else strip
    if 0 in piece:
        raise ValueError(f"its strips or tiles have {piece[0]} x {piece[1]} pixels")
    limit = min(max_pixels, max(width * height, LARGE_PIXELS))
    if piece[0] * piece[1] > limit:
        raise RowError(
            f"a tile of the image has {piece[0]} x {piece[1]} = {piece[0] * piece[1]} pixels, over the limit of "
            f"{limit}; save it with smaller tiles"
        )
    across, down = -(-width // piece[0]), -(-height // piece[1])
    layers = max(1, one.get(_SAMPLES, 1)) if one.get(_PLANAR, 1) == 2 else 1
    check_size((across * piece[0], down * piece[1]), _PADDING * max_pixels, "all tiles of the image have")
    needed = across * down * layers
    # Pillow decodes every piece, except that of pieces which all cover the picture it takes the last.
    alike = layers == 1 and (piece if tiled else (width, one.get(_ROWS, height))) == (width, height)
    for count in (needed, *(len(values) for tag, values in fields.items() if tag in _OFFSETS)):
        if count > MAX_PIECES:
            raise RowError(
                f"the image is a TIFF of {count} strips or tiles, over the limit of {MAX_PIECES}; save it anew"
            )
        if count > needed and not alike:
            raise RowError(f"the image is a TIFF of {count} strips or tiles, and has room for {needed}; save it anew")
    for tag in _BYTE_COUNTS & fields.keys():
        if len(fields[tag]) > 1 and sum(fields[tag]) > len(data):
            raise ValueError(f"its {len(fields[tag])} strips or tiles are said to have {sum(fields[tag])} bytes")


def _too_many(count: int) -> RowError:
    return RowError(f"the image is a TIFF of {count} strips or tiles, over the limit of {MAX_PIECES}; save it anew")


def _tiff_fields(data: bytes, order: str) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the fields of the first directory that bound the work, as tag and values."""
    big = data[2] == 43
    (position,) = struct.unpack_from(order + "Q", data, 8) if big else struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, position)
    if count > _MAX_TIFF_FIELDS:
        raise ValueError(f"its directory has {count} fields")
    entry = struct.Struct(order + ("HHQ" if big else "HHI"))
    step, inline = (20, 8) if big else (12, 4)
    seen: set[int] = set()
    for start in range(position + (8 if big else 2), position + (8 if big else 2) + count * step, step):
        tag, kind, number = entry.unpack_from(data, start)
        if tag not in _TIFF_FIELDS:
            continue
        # Of a repeated field, one reader may take the first and another one the last.
        if tag in seen or kind not in _TIFF_INTEGERS or not number:
            raise ValueError(f"field {tag} of its directory is not readable")
        seen.add(tag)
        if number > MAX_PIECES:
            raise RowError(
                f"the image is a TIFF of {number} strips or tiles, over the limit of {MAX_PIECES}; save it anew"
            )
        values = struct.Struct(f"{order}{number}{_TIFF_INTEGERS[kind]}")
        place = start + entry.size
        if values.size > inline:
            (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, place)
        if place + values.size > len(data):
            raise ValueError(f"field {tag} of its directory is cut off")
        yield tag, values.unpack_from(data, place)


def _check_avif(data: bytes, max_pixels: int) -> None:
    total = 0
    for part in _avif_parts(data):
        check_size(part.size, max_pixels, "a part of the image has")
        # A frame may have a size of its own, up to what its number of bits can say.
        check_size(part.largest, _PADDING * max_pixels, "a frame of the image may have")
        total += part.size[0] * part.size[1] * part.frames
    if total > _PADDING * max_pixels:
        raise RowError(
            f"the frames and parts of the image have {total} pixels, over {_PADDING} times the limit of {max_pixels}; "
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
