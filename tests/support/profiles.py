"""ICC profiles, made byte by byte: spaces of three primaries, greys, and tables of printing inks."""

import struct
from collections.abc import Sequence

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""X, Y and Z of red, green and blue, under the light D50."""
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))

_NUMBERS = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
CURVE = b"para" + bytes(4) + struct.pack(">HH5i", 3, 0, *(round(value * 65536) for value in _NUMBERS))
"""The curve of sRGB."""


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x", 132 + 12 * len(tags) + len(body), b"", 0x04000000, kind, space, pcs, b"acsp"
    )
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def rgb(primaries: Sequence[Sequence[float]] = SRGB, curve: bytes = CURVE, **options: bytes) -> bytes:
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    colours = dict(zip(names, map(xyz, primaries), strict=True))
    return profile(b"RGB ", colours | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve), **options)


def grey(curve: bytes = CURVE) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve})


def inks(black: int = 51, grid: int = 2, points: int | None = None) -> bytes:
    """A table of four inks: cyan, magenta and yellow have no colour, and full black has the lightness ``black``/255.

    Args:
        black: lightness of full black, of 255.
        grid: number of points along each ink that the table says it has.
        points: number of points that it has; by default the right one.
    """
    lab = b"".join(bytes((255 if not k else black, 128, 128)) for k in [0, 1] * 8)
    head = (
        b"mft1"
        + bytes(4)
        + bytes((4, 3, grid, 0))
        + struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    )
    straight = bytes(range(256))
    lut = head + straight * 4 + (lab if points is None else bytes(3 * points)) + straight * 3
    return profile(b"CMYK", {b"A2B0": lut}, kind=b"prtr", pcs=b"Lab ")
