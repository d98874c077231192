"""Files of pictures, odd and broken ones among them, as tests decode them."""

import io
import lzma
import struct
import zlib

import numpy as np
from PIL import Image


def noise(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def to_bytes(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def file(image_format: str, **options: object) -> bytes:
    return to_bytes(Image.fromarray(noise()), image_format, **options)


def png_chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to no pixels: what a decompression bomb looks like from outside."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 10)) + png_chunk(b"IEND")


def png_chunks(before: bytes, piece: int | None = None, after: bytes = b"") -> bytes:
    """A PNG with chunks before and after its pixels, which lie in chunks of ``piece`` bytes."""
    data = file("PNG")
    begin = data.index(b"IDAT") - 4
    end = data.rindex(b"IEND") - 4
    pixels = data[begin + 8 : end - 4]
    size = piece or len(pixels)
    body = b"".join(png_chunk(b"IDAT", pixels[i : i + size]) for i in range(0, len(pixels), size))
    return data[:begin] + before + body + after + data[end:]


def jpeg_segments(body: bytes, scanned: bool = False, **options: object) -> bytes:
    """A JPEG with other bytes before its first segment, or before its last scan."""
    data = file("JPEG", **options)
    at = data.rindex(b"\xff\xda") if scanned else 2
    return data[:at] + body + data[at:]


def jpeg_segment(marker: int, body: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def webp_chunks(count: int) -> bytes:
    """A WebP with empty chunks after its picture."""
    data = file("WEBP")
    body = struct.pack("<4sI4x6s", b"VP8X", 10, (39).to_bytes(3, "little") + (23).to_bytes(3, "little")) + data[12:]
    body += struct.pack("<4sI", b"none", 0) * count
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def bmp_runs(width: int, height: int, runs: bytes) -> bytes:
    """A BMP of run lengths, one byte a pixel."""
    palette = bytes(range(256)) * 4
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + head + palette + runs


def tiff_fields_over_one_another(count: int) -> bytes:
    """A TIFF with fields of a megabyte in private use, which all are the same bytes."""
    pixels = zlib.compress(bytes(256)).ljust(10**6, b"\0")
    fields = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (279, 20)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields]
    entries += [struct.pack("<HHII", 40_000 + i, 7, len(pixels), 8) for i in range(count)]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory


def tiff_lzma_dictionary(code: int) -> bytes:
    """A TIFF whose LZMA stream names a dictionary: code 40 is that of 4 GiB."""
    body = bytearray(lzma.compress(bytes(256), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**16}]))
    # The block's header: its size in words, flags, the filter's number, the size of its settings, the settings.
    body[16] = code
    end = 12 + (body[12] + 1) * 4
    body[end - 4 : end] = struct.pack("<I", zlib.crc32(body[12 : end - 4]))
    return tiff({259: 34925, 273: 16, 278: 16, 279: len(body)}, bytes(body))


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    """A WebP of one of its three chunk kinds that declares a size and holds no pixels."""
    body = {
        b"VP8X": b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little") + b"\0" * 5,
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + width.to_bytes(2, "little") + height.to_bytes(2, "little"),
    }[kind]
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    data = to_bytes(Image.new("L", (8, 8), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def tiff(fields: dict[int, int | list[int]], body: bytes = b"", big: bool = False) -> bytes:
    """A TIFF of one directory with the given fields, as LONG; its pixels are deflated, and lie at byte 16."""
    fields = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, **fields}
    at = 16 + len(body)
    lists, entries = b"", b""
    lead, offset, pad = ("<HHQ", "<Q", 8) if big else ("<HHI", "<I", 4)
    for tag, value in sorted(fields.items()):
        values = value if isinstance(value, list) else [value]
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(packed) > pad:
            lists, packed = lists + packed, struct.pack(offset, at + len(lists))
        entries += struct.pack(lead, tag, 4, len(values)) + packed.ljust(pad, b"\0")
    directory = struct.pack("<Q" if big else "<H", len(fields)) + entries + bytes(pad)
    start = at + len(lists)
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, start) if big else struct.pack("<2sHI8x", b"II", 42, start)
    return head + body + lists + directory


def tiff_tile(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels whose only tile is larger."""
    body = zlib.compress(bytes(side * side))
    return tiff({322: side, 323: side, 324: 16, 325: len(body)}, body)


def tiff_strips(count: int) -> bytes:
    """An uncompressed TIFF with strips of one row, which all lie over the same bytes."""
    return tiff({259: 1, 273: [16] * count, 278: 1, 279: [16] * count}, bytes(64 * 1024))


def avif_of_another_size(side: int) -> bytes:
    """An AVIF whose boxes say 16 x 16, and its AV1 data more."""
    data = to_bytes(Image.new("RGB", (side, side)), "AVIF", speed=10)
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", 16, 16) + data[at + 8 :]


def gif_frame(width: int, height: int) -> bytes:
    """A GIF with a canvas of 16 x 16 whose first frame is larger, and is replaced after it is shown."""
    head = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x80, 0, 0) + bytes(6)
    return head + b"!\xf9\4\x08\0\0\0\0" + b"," + struct.pack("<4HB", 0, 0, width, height, 0) + b"\2\1\x44\0;"


def rgba(colour: tuple[int, int, int, int]) -> Image.Image:
    return Image.new("RGBA", (8, 8), colour)


def animation(image_format: str) -> bytes:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    return to_bytes(first, image_format, save_all=True, append_images=[second], lossless=True)


def palette(**options: object) -> bytes:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 128, 0])
    return to_bytes(palette, "PNG", **options)
