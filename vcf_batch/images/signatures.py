"""What the first bytes of a file say that it is, whatever its name."""

from vcf_batch.images.tiff import TIFF_STARTS

START_BYTES = 512
"""Number of first bytes that :func:`kind_of` looks at."""

READ = frozenset({"JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF"})
"""Kinds that references may have: those of :data:`vcf_batch.images.FORMATS`."""

LFS_POINTER, SVG, XML = "Git LFS pointer", "SVG", "web page or XML"

_STARTS = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    *((0, start, "TIFF") for start in TIFF_STARTS),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_BMP_HEADERS = range(12, 125)
"""Sizes of a BMP's header. The two letters at its beginning are those of many a text, too."""


def kind_of(start: bytes) -> str | None:
    """Name of what a file's first :data:`START_BYTES` bytes begin; None if they are no image that is known here.

    A name is one of :data:`READ`, another format of images, or one of :data:`LFS_POINTER`, :data:`SVG` and
    :data:`XML`, which stand where an image was expected.
    """
    start = start[:START_BYTES]
    for offset, signature, name in _STARTS:
        if start[offset : offset + len(signature)] == signature:
            return name
    if start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if start[4:8] == b"ftyp":
        stop = min(int.from_bytes(start[:4], "big"), len(start))
        brands = {start[8:12], *(start[at : at + 4] for at in range(16, stop, 4))}
        return "AVIF" if brands & _AVIF_BRANDS else "HEIC" if brands & _HEIC_BRANDS else None
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return LFS_POINTER
    if text.startswith(b"<"):
        return SVG if b"<svg" in text else XML
    return None
