"""Pixels of files with an ICC profile become sRGB, and those of any other file stay as they are."""

import io
import logging
import resource
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from support import profiles
from support.pictures import file, noise, png_chunk, png_chunks, to_bytes
from vcf_batch import images
from vcf_batch.errors import NodeError
from vcf_batch.images import colours

LIMIT = 1_000_000
ORANGE = (201, 60, 40)
SWAPPED = profiles.rgb((profiles.SRGB[1], profiles.SRGB[0], profiles.SRGB[2]))
P3 = profiles.rgb(profiles.DISPLAY_P3)
WITH_PROFILES = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")


def pixel(image: Image.Image, image_format: str = "PNG", **options: object) -> tuple[int, ...]:
    decoded = images.decode(to_bytes(image, image_format, **options), LIMIT)
    assert not decoded.info
    return decoded.getpixel((1, 1))  # type: ignore[return-value]


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (P3, (219, 41, 23)),
        (profiles.rgb(profiles.ADOBE_RGB, profiles.gamma(2.2)), (233, 57, 34)),
        (SWAPPED, (60, 201, 40)),
    ],
    ids=["display-p3", "adobe-rgb", "swapped"],
)
def test_a_profile_is_converted_to_srgb(profile: bytes, expected: tuple[int, ...]) -> None:
    """A Display P3 (201, 60, 40) is (219, 41, 23): the colour that its owner sees."""
    assert np.abs(np.subtract(pixel(plain("RGB", ORANGE), icc_profile=profile), expected)).max() <= 1


@pytest.mark.parametrize("image_format", WITH_PROFILES)
def test_profiles_of_every_format_that_has_them_are_converted(image_format: str) -> None:
    """The profile counts in JPEG, PNG, WebP, TIFF and AVIF."""
    options = {"quality": 100, "subsampling": 0} if image_format == "JPEG" else {"lossless": True, "quality": 100}
    found = pixel(plain("RGB", ORANGE), image_format, icc_profile=SWAPPED, **options)
    assert np.abs(np.subtract(found, (60, 201, 40))).max() <= 4


MODES = {
    "alpha": (plain("RGBA", (*ORANGE, 255)), "PNG", (60, 201, 40)),
    "alpha-half": (plain("RGBA", (*ORANGE, 128)), "PNG", (157, 228, 147)),
    "alpha-none": (plain("RGBA", (*ORANGE, 0)), "PNG", (255, 255, 255)),
    "palette": (plain("RGB", ORANGE).quantize(2), "PNG", (60, 201, 40)),
    "grey-in-rgb": (plain("L", 90), "PNG", (90, 90, 90)),
    "bilevel": (plain("1", 1), "PNG", (255, 255, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_a_profile_counts_in_every_mode(name: str) -> None:
    """Transparent pixels are converted before they are composed over the white of sRGB."""
    image, image_format, expected = MODES[name]
    assert np.abs(np.subtract(pixel(image, image_format, icc_profile=SWAPPED), expected)).max() <= 1


@pytest.mark.parametrize(
    ("mode", "colour"), [("L", 128), ("LA", (128, 255)), ("I;16", 128 * 257)], ids=["grey", "grey-alpha", "16-bit"]
)
def test_greys_are_converted_by_a_profile_of_greys(mode: str, colour: object) -> None:
    """A linear grey of one half is 188 in sRGB; half of it transparent over white is lighter."""
    image = Image.fromarray(np.full((8, 8), colour, np.uint16)) if mode == "I;16" else plain(mode, colour)
    assert pixel(image, icc_profile=profiles.grey(profiles.gamma(1))) == (188, 188, 188)
    assert pixel(image, icc_profile=profiles.grey()) == (128, 128, 128)


def test_inks_are_converted_by_their_profile() -> None:
    """Full black of this press has the lightness 20 of 100, 45 in sRGB above its black; without a profile it is 0."""
    black = plain("CMYK", (0, 0, 0, 255))
    for image_format in ("JPEG", "TIFF"):
        assert np.abs(np.subtract(pixel(black, image_format, icc_profile=profiles.inks()), 45)).max() <= 1
        assert pixel(black, image_format) == (0, 0, 0)


SRGB = {
    "matrix": profiles.rgb(),
    "pillow": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "curve-of-1024-points": profiles.rgb(
        curve=b"curv"
        + bytes(4)
        + struct.pack(
            ">I1024H",
            1024,
            *(
                round(65535 * (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4))
                for x in np.linspace(0, 1, 1024)
            ),
        )
    ),
    "rounded-primaries": profiles.rgb([[round(v, 4) for v in colour] for colour in profiles.SRGB]),
}


@pytest.mark.parametrize("name", SRGB)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_a_profile_of_srgb_changes_no_byte(name: str, mode: str) -> None:
    """What makes a profile one of sRGB is its colours, not its name: no pixel differs from those without a profile."""
    image = Image.fromarray(noise())
    image = Image.fromarray(noise()[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    with_profile, without = (to_bytes(image, "PNG", **options) for options in ({"icc_profile": SRGB[name]}, {}))
    assert np.array_equal(np.asarray(images.decode(with_profile, LIMIT)), np.asarray(images.decode(without, LIMIT)))


def test_converting_twice_gives_the_same_bytes() -> None:
    """The bytes do not depend on what was converted before, or beside it."""
    data = file("PNG", icc_profile=P3)
    expected = images.decode(data, LIMIT).tobytes()
    colours._transform.cache_clear()
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(images.decode(data, LIMIT).tobytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


# Profiles that cannot be used


def overlapping(count: int) -> bytes:
    return P3[:128] + struct.pack(">I", count) + struct.pack(">4sII", b"rXYZ", 0, 100) * min(count, 10_000)


def huge_table(kind: bytes) -> bytes:
    """A profile whose table says it has 255 points along each channel: 50 million colours."""
    if kind == b"mAB ":
        body = kind + bytes(4) + bytes((3, 3, 0, 0)) + struct.pack(">5I", 32, 0, 0, 32, 0)
        table = body + bytes((255,) * 3 + (0,) * 13 + (2,) + (0,) * 3) + bytes(200)
    else:
        table = kind + bytes(4) + bytes((3, 3, 255, 0)) + bytes(2000)
    return profiles.profile(b"RGB ", {b"A2B0": table}, pcs=b"Lab ")


UNUSABLE = {
    "empty": b"",
    "no-profile": b"profile",
    "cut": P3[:300],
    "class-of-a-link": profiles.rgb(kind=b"link"),
    "space": P3.replace(b"RGB ", b"HSV "),
    "for-inks": profiles.inks(),
    "tags": overlapping(2**32 - 1),
    "tags-again-and-again": overlapping(90),
    "table-of-bytes": huge_table(b"mft1"),
    "table-of-words": huge_table(b"mft2"),
    "table-of-stages": huge_table(b"mAB "),
    "table-of-floats": huge_table(b"mpet"),
    "too-large": P3 + bytes(9 * 2**20),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_profile_that_cannot_be_used_counts_as_none(name: str) -> None:
    """It costs the row nothing, and neither time nor memory: LittleCMS sees no size that its bytes do not have."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    image_format = "JPEG" if len(UNUSABLE[name]) < 10**6 else "TIFF"
    image = plain("RGB", ORANGE)
    assert pixel(image, image_format, icc_profile=UNUSABLE[name]) == pixel(image, image_format)
    assert time.process_time() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 2**10


def test_a_damaged_profile_never_loses_a_picture() -> None:
    """Whatever the bytes of a profile, the picture is decoded."""
    random = np.random.default_rng(0)
    for profile in (P3, profiles.inks(), profiles.grey()):
        mode = {b"RGB ": "RGB", b"CMYK": "CMYK", b"GRAY": "L"}[profile[16:20]]
        for _ in range(60):
            broken = bytearray(profile)
            for place in random.integers(0, min(len(broken), 400), 3):
                broken[place] = random.integers(0, 256)
            image = images.decode(to_bytes(plain(mode, 0), "TIFF", icc_profile=bytes(broken)), LIMIT)
            assert image.size == (8, 8)


def test_an_unusable_profile_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log names the first file, with the reason; thousands of such files give one line."""
    monkeypatch.setattr(colours, "_told", threading.Event())
    with caplog.at_level(logging.WARNING):
        for name in ("reference 'a.png'", "reference 'b.png'"):
            images.decode(file("PNG", icc_profile=b"profile"), LIMIT, name)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(
        "reference 'a.png' has a colour profile that cannot be used (it is cut off, or no ICC profile)"
    )


def test_a_machine_without_littlecms_does_not_lose_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose Pillow cannot convert colours is not used: the row is not to blame."""

    def absent(*_: object) -> object:
        raise ImportError("no LittleCMS")

    monkeypatch.setattr(colours, "_transform", absent)
    with pytest.raises(NodeError, match="built without LittleCMS"):
        images.decode(file("PNG", icc_profile=P3), LIMIT)
    images.decode(file("PNG"), LIMIT)


def test_a_large_picture_is_converted_within_its_bounds() -> None:
    """Decoding with a profile takes no more memory than the 24 bytes a pixel that decoding may take."""
    pixels = 2_000 * 2_000
    picture = Image.new("RGBA", (2_000, 2_000), (*ORANGE, 128))
    data = to_bytes(picture, "PNG", icc_profile=P3, compress_level=1)
    del picture
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images.decode(data, 10**8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 * pixels / 2**10


# Long metadata


def test_a_png_with_a_long_profile_is_read_by_it() -> None:
    """Pillow refuses profiles over a megabyte; the picture is whole, so it is read, in its own colours."""
    long = SWAPPED + bytes(2 * 2**20)
    data = png_chunks(png_chunk(b"iCCP", b"a\0\0" + zlib.compress(long)))
    expected = np.asarray(Image.open(io.BytesIO(file("PNG"))))[..., [1, 0, 2]]
    assert np.abs(np.asarray(images.decode(data, LIMIT)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 * 2**20))),
        png_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 3 * 2**20)),
        png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20 * 2**20))),
        png_chunk(b"iCCP", b"a\0\7" + zlib.compress(P3)),
        png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(8 * 2**20))) * 250,
        b"".join(png_chunk(b"tEXt", b"a\0" + b"x" * 2**20) for _ in range(70)),
    ],
    ids=["text", "international", "profile", "unknown-compression", "many-profiles", "many-texts"],
)
def test_long_metadata_of_a_png_costs_nothing(chunk: bytes) -> None:
    """The picture is whole, so it is read, wherever the metadata stand, and in bounded time."""
    begin = time.process_time()
    for data in (png_chunks(chunk), png_chunks(b"", None, chunk)):
        assert np.array_equal(np.asarray(images.decode(data, LIMIT)), noise())
    assert time.process_time() - begin < 2


def test_what_is_read_of_a_png_with_long_metadata_is_the_same_but_for_them() -> None:
    """Its orientation still counts."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file("PNG", exif=exif)
    at = data.index(b"IDAT") - 4
    longer = data[:at] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 * 2**20))) + data[at:]
    assert images.decode(longer, LIMIT).tobytes() == images.decode(data, LIMIT).tobytes()
