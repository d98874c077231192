"""Bounds of TIFF files, their strips and tiles, read from their fields; and what kinds of them are not decoded."""

import struct
from collections.abc import Iterator, Set

from vcf_batch.errors import RowError
from vcf_batch.images.limits import LARGE_PIXELS, MAX_PIECES, PADDING, check_size

TIFF_STARTS = (b"II*\0", b"II\0*", b"MM\0*", b"MM*\0", b"II+\0")
"""What Pillow reads, faulty ones included, but for BigTIFF in big-endian order, which it takes for another format."""

_MAX_TIFF_FIELDS = 4096
"""Most fields of a TIFF's directory, as in libtiff."""
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value of each type."""
_BITS, _COMPRESSION, _SAMPLE_FORMAT = 258, 259, 339
_DECODED = {*range(1, 9), 32771, 32773, 32809, 32946, 34676, 34677, 34925, 50000}
"""Compressions that Pillow decodes."""
_COMPRESSIONS = {
    9: "JBIG",
    10: "JBIG",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    34712: "JPEG 2000",
    34713: "Nikon's raw format",
    34887: "LERC",
    34892: "lossy JPEG of DNG",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers"}
_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 277, 278, 284, 322, 323
_OFFSETS = {273, 324}
_BYTE_COUNTS = {279, 325}
_TIFF_FIELDS = {_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, *_OFFSETS, *_BYTE_COUNTS}


def check_tiff(data: bytes, max_pixels: int) -> None:
    """Compare the picture, strips and tiles of a file with ``max_pixels``.

    Raises:
        RowError: the file goes over the limit, or is of a kind that is not read.
        ValueError, struct.error, IndexError: the file is damaged.
    """
    if data[:4] not in TIFF_STARTS:
        raise RowError("the image is a BigTIFF in big-endian order, which is not read; save it as a PNG, JPEG or WebP")
    order = ">" if data.startswith(b"MM") else "<"
    fields = dict(_tiff_fields(data, order, _TIFF_FIELDS))
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
    check_size((across * piece[0], down * piece[1]), PADDING * max_pixels, "all tiles of the image have")
    needed = across * down * layers
    # Pillow decodes every piece, except that of pieces which all cover the picture it takes the last.
    alike = layers == 1 and (piece if tiled else (width, one.get(_ROWS, height))) == (width, height)
    for count in (needed, *(len(values) for tag, values in fields.items() if tag in _OFFSETS)):
        if count > MAX_PIECES:
            raise _too_many(count)
        if count > needed and not alike:
            raise RowError(f"the image is a TIFF of {count} strips or tiles, and has room for {needed}; save it anew")
    for tag in _BYTE_COUNTS & fields.keys():
        if len(fields[tag]) > 1 and sum(fields[tag]) > len(data):
            raise ValueError(f"its {len(fields[tag])} strips or tiles are said to have {sum(fields[tag])} bytes")


def _too_many(count: int) -> RowError:
    return RowError(f"the image is a TIFF of {count} strips or tiles, over the limit of {MAX_PIECES}; save it anew")


def unsupported(data: bytes, opened: bool) -> str | None:
    """What makes a file one that is not decoded, as "JPEG 2000 compression"; None if it does not look like one.

    Args:
        data: a file that was not decoded.
        opened: whether Pillow knows how its pixels are stored.
    """
    try:
        order = ">" if data.startswith(b"MM") else "<"
        fields = dict(_tiff_fields(data, order, {_BITS, _COMPRESSION, _SAMPLES, _SAMPLE_FORMAT}))
    except (RowError, ValueError, OverflowError, struct.error, IndexError):
        return None
    (compression,) = fields.get(_COMPRESSION, (1,))[:1]
    if compression not in _DECODED:
        return f"{_COMPRESSIONS.get(compression, f'number {compression}')} compression"
    if opened:
        return None
    (samples,), bits = fields.get(_SAMPLES, (1,))[:1], fields.get(_BITS, (1,))
    numbers = _NUMBERS.get(fields.get(_SAMPLE_FORMAT, (1,))[0], "numbers of an unknown kind")
    sizes = " or ".join(map(str, sorted(set(bits[:8]))))
    return f"{samples} {'sample' if samples == 1 else 'samples'} a pixel, which are {numbers} of {sizes} bits"


def _tiff_fields(data: bytes, order: str, wanted: Set[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the wanted fields of the first directory, as tag and values."""
    big = data[2] == 43
    (position,) = struct.unpack_from(order + "Q", data, 8) if big else struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, position)
    if count > _MAX_TIFF_FIELDS:
        raise ValueError(f"its directory has {count} fields")
    entry = struct.Struct(order + ("HHQ" if big else "HHI"))
    step, inline = (20, 8) if big else (12, 4)
    seen: set[int] = set()
    held = 0
    for start in range(position + (8 if big else 2), position + (8 if big else 2) + count * step, step):
        tag, kind, number = entry.unpack_from(data, start)
        # Pillow and libtiff keep a copy of every field, known or not, and fields may lie over one another.
        size = number * _TIFF_SIZES.get(kind, 0)
        place = start + entry.size
        if size > inline:
            (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, place)
            held += max(0, min(size, len(data) - place))
            if held > 2 * len(data):
                raise RowError(
                    f"the image is a TIFF whose fields have more than twice the {len(data)} bytes of the file; "
                    "save it anew without its metadata"
                )
        if tag not in wanted:
            continue
        # Of a repeated field, one reader may take the first and another one the last.
        if tag in seen or kind not in _TIFF_INTEGERS or not number:
            raise ValueError(f"field {tag} of its directory is not readable")
        seen.add(tag)
        if number > MAX_PIECES:
            raise _too_many(number)
        values = struct.Struct(f"{order}{number}{_TIFF_INTEGERS[kind]}")
        if place + size > len(data):
            raise ValueError(f"field {tag} of its directory is cut off")
        yield tag, values.unpack_from(data, place)
