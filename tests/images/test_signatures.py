"""The first bytes of a file say what it is."""

import pytest

from support import pictures
from vcf_batch.images import FORMATS
from vcf_batch.images.signatures import READ, START_BYTES, kind_of


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_of_references_is_known_by_its_first_bytes(image_format: str) -> None:
    """The formats that are read, and these alone, are those of references."""
    kind = kind_of(pictures.file(image_format)[:START_BYTES])
    assert kind in READ
    assert kind.upper() == image_format
    assert {each.upper() for each in READ} == {*FORMATS}


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", None),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"BMW, and other words with these two letters", None),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "SVG"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", None),
        (b"", None),
    ],
)
def test_what_begins_otherwise_is_not_taken_for_an_image(start: bytes, kind: str | None) -> None:
    """Videos, texts and the companions of files on macOS are none; formats that are not read have their names."""
    assert kind_of(start) == kind
