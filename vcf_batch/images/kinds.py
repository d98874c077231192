"""What a file is by its first bytes, and in which words it is refused."""

import io
import re

from PIL import Image, UnidentifiedImageError

from vcf_batch.errors import RowError
from vcf_batch.images import tiff

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""File formats of references. The list is closed because Pillow also reads EPS, and EPS starts Ghostscript."""

_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (4, b"ftyp", "AVIF"),
)

_CONVERT = "convert it with 'magick IN OUT.png'"
_REVERT = "convert it with 'pngcrush -revert-iphone-optimizations IN OUT.png'"
_HEIF = "convert it with 'heif-convert IN OUT.png'"
_FRAME = "take a frame out of it with 'ffmpeg -i IN -frames:v 1 OUT.png'"
_SHOT = "export it as a PNG with the program that made it"

_OTHERS = (
    (0, b"\xff\xd8\xff\xf7", "a JPEG-LS picture", _CONVERT),
    (
        12,
        b"CgBI",
        "a PNG in the form of iOS apps",
        "convert it with 'pngcrush -revert-iphone-optimizations IN OUT.png'",
    ),
    (0, b"\xff\x0a", "a JPEG XL picture", _CONVERT),
    (0, b"\0\0\0\x0cJXL \r\n", "a JPEG XL picture", _CONVERT),
    (0, b"\0\0\0\x0cjP  \r\n", "a JPEG 2000 picture", _CONVERT),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture", _CONVERT),
    (0, b"II\xbc\x01", "a JPEG XR picture", _CONVERT),
    (0, b"8BPS", "a Photoshop document", _SHOT),
    (0, b"gimp xcf", "a GIMP document", _SHOT),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR picture", _CONVERT),
    (0, b"#?RADIANCE", "a Radiance HDR picture", _CONVERT),
    (0, b"qoif", "a QOI picture", _CONVERT),
    (0, b"DDS ", "a DDS texture", _CONVERT),
    (0, b"\0\0\1\0", "an icon (ICO)", _CONVERT),
    (0, b"SIMPLE  =", "a FITS picture", _CONVERT),
    (128, b"DICM", "a DICOM picture", _CONVERT),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw picture", _CONVERT),
    (0, b"%PDF-", "a PDF document", "convert a page of it with 'pdftoppm -png IN OUT'"),
    (0, b"\x1a\x45\xdf\xa3", "a film (Matroska or WebM)", _FRAME),
    (8, b"AVI ", "a film (AVI)", _FRAME),
    (0, b"\x93NUMPY", "a NumPy array", "save it with PIL.Image.fromarray(ARRAY).save('OUT.png')"),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it with 'gunzip'"),
    (0, b"BZh", "compressed with bzip2", "unpack it with 'bunzip2'"),
    (0, b"\xfd7zXZ\0", "compressed with xz", "unpack it with 'unxz'"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "unpack it with 'unzstd'"),
    (0, b"PK\3\4", "a zip archive", "unpack it with 'unzip'"),
)
"""Files that are not read: place and text of their signature, what they are, and the remedy."""

_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_UNSUPPORTED = re.compile(r"(?i)unsupported|unknown|cannot handle|not supported")
"""How Pillow's messages on files begin that are whole, and of a kind that it does not decode."""


def refuse_others(data: bytes) -> None:
    """Refuse a file of a format that is known and not read.

    Raises:
        RowError: what the file is, and how to convert it.
    """
    known = _name(data)
    for offset, signature, what, remedy in _OTHERS:
        if data.startswith(signature, offset) and (known is None or offset == 0):
            raise RowError(f"the file cannot be read because it is {what}; {remedy}")
    if re.match(rb"P[1-7][\s#]", data[:3]):
        raise RowError(f"the file cannot be read because it is a PNM picture; {_CONVERT}")
    if data[4:8] != b"ftyp":
        return
    brands = {data[8:12], *(data[i : i + 4] for i in range(16, min(int.from_bytes(data[:4], "big"), 256), 4))}
    if brands & {b"avif", b"avis"}:
        return
    if data[8:12] == b"crx ":
        raise RowError(f"the file cannot be read because it is a camera's raw picture; {_CONVERT}")
    if brands & _HEIC:
        raise RowError(
            "the file cannot be read because it is a HEIC picture; convert it with 'heif-convert IN OUT.png'"
        )
    raise RowError(f"the file cannot be read because it is a film (MP4 or QuickTime); {_FRAME}")


def not_readable(data: bytes, error: Exception) -> str:
    """The reason in words why a file that was not decoded could not be.

    Args:
        data: the file.
        error: what checking, opening or decoding it raised.
    """
    name = _name(data)
    reason = str(error)
    if isinstance(error, UnidentifiedImageError):
        # Its message contains a memory address, and so differs every time.
        reason = hidden if _UNSUPPORTED.match(hidden := _reason(data, name)) else ""
    if name == "TIFF" and (told := tiff.unsupported(data, opened=not _UNSUPPORTED.match(reason))):
        return f"the image cannot be read because it is a TIFF of {told}; convert it with 'magick IN -depth 8 OUT.png'"
    if name and _UNSUPPORTED.match(reason):
        return f"the image cannot be read because it is a {name} of an unusual kind ({reason}); {_CONVERT}"
    if name:
        reason = f" ({reason})" if reason else ""
        return f"the image is a damaged or truncated {name} file of {len(data)} bytes{reason}; replace it"
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer, not the image it stands for; fetch it with 'git lfs pull'"
    if start.startswith(b"<"):
        what = "an SVG drawing" if b"<svg" in start else "a web page or XML text"
        return f"the file is {what}, not an image in one of {', '.join(FORMATS)}"
    return f"the file of {len(data)} bytes is not an image in one of {', '.join(FORMATS)}"


def _name(data: bytes) -> str | None:
    """The format of a file that is read, or may be damaged; None for any other."""
    return next((name for at, signature, name in _SIGNATURES if data.startswith(signature, at)), None)


def _reason(data: bytes, name: str | None) -> str:
    """Why a reader takes a file for none of its own, which Pillow keeps to itself; empty if it does not say."""
    if name is None:
        return ""
    try:
        Image.OPEN[name.upper()][0](io.BytesIO(data), "")
    except MemoryError:
        raise
    except Exception as error:
        return str(error)
    return ""
