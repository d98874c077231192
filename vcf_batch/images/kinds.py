"""What a file is by its first bytes, whatever its name, and in which words it is refused."""

import io
import re
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from vcf_batch.errors import RowError
from vcf_batch.images import tiff

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""File formats of references. The list is closed because Pillow also reads EPS, and EPS starts Ghostscript."""

START_BYTES = 512
"""Number of first bytes that :func:`kind_of` looks at."""


class Kind(NamedTuple):
    """A kind of file."""

    name: str
    """Name of a format that is read, as in :data:`FORMATS` but for capitals; else what such a file is, in words."""
    remedy: str = ""
    """How to make an image of it that is read; empty if it is read already."""


_CONVERT = "convert it with 'magick IN OUT.png'"
_REVERT = "convert it with 'pngcrush -revert-iphone-optimizations IN OUT.png'"
_FRAME = "take a frame out of it with 'ffmpeg -i IN -frames:v 1 OUT.png'"
_SHOT = "export it as a PNG with the program that made it"

HEIC = Kind("a HEIC picture", "convert it with 'heif-convert IN OUT.png'")
LFS_POINTER = Kind("a Git LFS pointer, not the image it stands for", "fetch it with 'git lfs pull'")
SVG = Kind("an SVG drawing", "draw it as a PNG with 'rsvg-convert IN -o OUT.png'")
XML = Kind("a web page or XML text", "replace it by the image")
RAW = Kind("a camera's raw picture", _CONVERT)
_BMP, _AVIF, _FILM = Kind("BMP"), Kind("AVIF"), Kind("a film (MP4 or QuickTime)", _FRAME)
_PNM = Kind("a PNM picture", _CONVERT)

_SIGNATURES = (
    (0, b"\xff\xd8\xff\xf7", Kind("a JPEG-LS picture", _CONVERT)),
    (0, b"\xff\xd8\xff", Kind("JPEG")),
    (0, b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI", Kind("a PNG in the form of iOS apps", _REVERT)),
    (0, b"\x89PNG", Kind("PNG")),
    (8, b"WEBP", Kind("WebP")),
    (0, b"GIF8", Kind("GIF")),
    *((0, start, Kind("TIFF")) for start in tiff.TIFF_STARTS),
    (0, b"\xff\x0a", Kind("a JPEG XL picture", _CONVERT)),
    (4, b"JXL \r\n", Kind("a JPEG XL picture", _CONVERT)),
    (4, b"jP  \r\n", Kind("a JPEG 2000 picture", _CONVERT)),
    (0, b"\xff\x4f\xff\x51", Kind("a JPEG 2000 picture", _CONVERT)),
    (0, b"II\xbc\x01", Kind("a JPEG XR picture", _CONVERT)),
    (0, b"8BPS", Kind("a Photoshop document", _SHOT)),
    (0, b"gimp xcf", Kind("a GIMP document", _SHOT)),
    (0, b"\x76\x2f\x31\x01", Kind("an OpenEXR picture", _CONVERT)),
    (0, b"#?RADIANCE", Kind("a Radiance HDR picture", _CONVERT)),
    (0, b"qoif", Kind("a QOI picture", _CONVERT)),
    (0, b"DDS ", Kind("a DDS texture", _CONVERT)),
    (0, b"\0\0\1\0", Kind("an icon (ICO)", _CONVERT)),
    (0, b"SIMPLE  =", Kind("a FITS picture", _CONVERT)),
    (128, b"DICM", Kind("a DICOM picture", _CONVERT)),
    (0, b"FUJIFILMCCD-RAW", RAW),
    (8, b"crx ", RAW),
    (0, b"%PDF-", Kind("a PDF document", "convert a page of it with 'pdftoppm -png IN OUT'")),
    (0, b"\x1a\x45\xdf\xa3", Kind("a film (Matroska or WebM)", _FRAME)),
    (8, b"AVI ", Kind("a film (AVI)", _FRAME)),
    (0, b"\x93NUMPY", Kind("a NumPy array", "save it with PIL.Image.fromarray(ARRAY).save('OUT.png')")),
    (0, b"\x1f\x8b", Kind("compressed with gzip", "unpack it with 'gunzip'")),
    (0, b"BZh", Kind("compressed with bzip2", "unpack it with 'bunzip2'")),
    (0, b"\xfd7zXZ\0", Kind("compressed with xz", "unpack it with 'unxz'")),
    (0, b"\x28\xb5\x2f\xfd", Kind("compressed with Zstandard", "unpack it with 'unzstd'")),
    (0, b"PK\3\4", Kind("a zip archive", "unpack it with 'unzip'")),
)
"""Place and bytes of the signature of each kind; the first that fits decides."""

_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_BMP_HEADERS = range(12, 125)
"""Sizes of a BMP's header. The two letters at its beginning are those of many a text, too."""

_UNSUPPORTED = re.compile(r"(?i)unsupported|unknown|cannot handle|not supported")
"""How Pillow's messages on files begin that are whole, and of a kind that it does not decode."""


def kind_of(start: bytes) -> Kind | None:
    """What a file is by its first :data:`START_BYTES` bytes; None if it is nothing that is known here."""
    start = start[:START_BYTES]
    if start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in _BMP_HEADERS:
        return _BMP
    for offset, signature, kind in _SIGNATURES:
        if start.startswith(signature, offset):
            return kind
    if re.match(rb"P[1-7][\s#]", start[:3]):
        return _PNM
    if start[4:8] == b"ftyp":
        stop = min(int.from_bytes(start[:4], "big"), len(start))
        brands = {start[8:12], *(start[at : at + 4] for at in range(16, stop, 4))}
        return _AVIF if brands & _AVIF_BRANDS else HEIC if brands & _HEIC_BRANDS else _FILM
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return LFS_POINTER
    if text.startswith(b"<"):
        return SVG if b"<svg" in text else XML
    return None


def refuse_others(data: bytes) -> None:
    """Refuse a file of a kind that is known and not read.

    Raises:
        RowError: what the file is, and how to make an image of it.
    """
    kind = kind_of(data)
    if kind and kind.remedy:
        raise RowError(f"the file cannot be read because it is {kind.name}; {kind.remedy}")


def not_readable(data: bytes, error: Exception) -> str:
    """The reason in words why a file that was not decoded could not be.

    Args:
        data: the file, which :func:`refuse_others` let pass.
        error: what checking, opening or decoding it raised.
    """
    kind = kind_of(data)
    if kind is None:
        return f"the file of {len(data)} bytes is not an image in one of {', '.join(FORMATS)}"
    name, reason = kind.name, str(error)
    if isinstance(error, UnidentifiedImageError):
        # Its message contains a memory address, and so differs every time.
        reason = hidden if _UNSUPPORTED.match(hidden := _reason(data, name)) else ""
    if name == "TIFF" and (told := tiff.unsupported(data, opened=not _UNSUPPORTED.match(reason))):
        return f"the image cannot be read because it is a TIFF of {told}; convert it with 'magick IN -depth 8 OUT.png'"
    if _UNSUPPORTED.match(reason):
        return f"the image cannot be read because it is a {name} of an unusual kind ({reason}); {_CONVERT}"
    reason = f" ({reason})" if reason else ""
    return f"the image is a damaged or truncated {name} file of {len(data)} bytes{reason}; replace it"


def _reason(data: bytes, name: str) -> str:
    """Why a reader takes a file for none of its own, which Pillow keeps to itself; empty if it does not say."""
    try:
        Image.OPEN[name.upper()][0](io.BytesIO(data), "")
    except MemoryError:
        raise
    except Exception as error:
        return str(error)
    return ""
