"""What a file makes its decoder do is bounded before anything is decoded, whatever its header says."""

import contextlib
import io
import resource
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support import pictures
from support.pictures import file, jpeg_segment, png_chunk, tiff, tiff_strips, tiff_tile, to_bytes
from vcf_batch import images
from vcf_batch.errors import RowError

LIMIT = 1_000_000
OVER = "over the limit of"

BOMBS = {
    "tiff-tile": (tiff_tile(4_000), "a tile of the image has 4000 x 4000 = 16000000 pixels, over the limit of 1000000"),
    "tiff-tile-low": (tiff({322: 10**9, 323: 1, 324: 16, 325: 9}), "a tile of the image has 1000000000 x 1"),
    "tiff-tiles-beside": (
        tiff({256: 1, 257: 65_000, 322: 1_000, 323: 1_000, 324: [16] * 65, 325: [0] * 65}),
        "all tiles of the image have 1000 x 65000",
    ),
    "tiff-tile-big": (tiff({322: 4_000, 323: 4_000, 324: 16, 325: 9}, big=True), "a tile of the image has 4000 x 4000"),
    "tiff-strips": (tiff_strips(200_000), "200000 strips or tiles, over the limit of 65536; save it anew"),
    "tiff-strips-more": (tiff_strips(1_000_001), "1000001 strips or tiles, over the limit of 65536; save it anew"),
    "tiff-strips-without-room": (tiff_strips(60_000), "60000 strips or tiles, and has room for 16; save it anew"),
    "tiff-strips-whole": (
        tiff({259: 1, 273: [16] * 60_000, 278: 2**32 - 1, 279: [256] * 60_000}, bytes(256)),
        "60000 strips or tiles, and has room for 1; save it anew",
    ),
    "tiff-strips-over-one-another": (
        tiff({257: 60_000, 273: [16] * 60_000, 278: 1, 279: [10**6] * 60_000}, bytes(10**6)),
        "its 60000 strips or tiles are said to have 60000000000 bytes",
    ),
    "tiff-high": (tiff({257: 2**32 - 1, 273: 16, 279: 9}), f"16 x 4294967295 = 68719476720 pixels, {OVER} 1000000"),
    "tiff-big-endian-bigtiff": (b"MM\0+" + bytes(64), "which is not read; save it as a PNG, JPEG or WebP"),
    "avif": (pictures.avif_of_another_size(1_200), "a part of the image has 1200 x 1200 = 1440000 pixels, over"),
    "gif-frame": (pictures.gif_frame(13_000, 13_000), "13000 x 13000 = 169000000 pixels, over the limit of 1000000"),
    "gif-blocks": (b"GIF89a" + bytes(7) + b"!\xfe" + b"\1x" * 10**6, "more than 65536 blocks before its first picture"),
    "tiff-fields-over-one-another": (
        pictures.tiff_fields_over_one_another(50),
        "a TIFF whose fields have more than twice the 1000710 bytes of the file; save it anew without its metadata",
    ),
    "webp": (pictures.webp_header(16_000, 16_000, b"VP8X"), OVER),
    "webp-chunks": (pictures.webp_chunks(70_000), "a WebP of more than 65536 chunks; save it anew"),
    "jpeg-scans": (pictures.jpeg_scans(101), "a JPEG of more than 100 scans; save it anew"),
    "jpeg-comments": (
        pictures.jpeg_segments(jpeg_segment(0xFE) * 20_000),
        "a JPEG of more than 16384 segments; save it anew",
    ),
    "jpeg-comments-behind-a-second-start": (
        pictures.jpeg_segments((b"\xff\xd8" + jpeg_segment(0xFE) * 15_000) * 2),
        "a JPEG of more than 16384 segments",
    ),
    "jpeg-comments-behind-an-early-end": (
        pictures.jpeg_segments(b"\xff\xd9" + jpeg_segment(0xFE) * 20_000),
        "a JPEG of more than 16384 segments",
    ),
    "jpeg-comments-between-scans": (
        pictures.jpeg_segments(jpeg_segment(0xFE) * 20_000, scanned=True, progressive=True),
        "a JPEG of more than 16384 segments",
    ),
    "jpeg-exif": (
        pictures.jpeg_segments(jpeg_segment(0xE1, b"Exif\0\0" + bytes(1000)) * 300),
        "a JPEG of more than 256 Exif segments; save it anew without its metadata",
    ),
    "jpeg-filling": (
        pictures.jpeg_segments(b"\xff" * 2_000_000),
        "a JPEG of more than 1048576 bytes between its segments; save it anew",
    ),
    "jpeg-restarts": (pictures.jpeg_segments(b"\xff\xd0" * 1_000_000), "1048576 bytes between its segments"),
    "jpeg-without-end": (b"\xff\xd8\xff\xfe\0\2" + bytes(2_000_000), "1048576 bytes between its segments"),
    "png-empty-pixels": (pictures.png_chunks(png_chunk(b"IDAT") * 70_000), "a PNG of more than 65536 chunks; save it"),
    "png-before": (pictures.png_chunks(png_chunk(b"teST") * 70_000), "a PNG of more than 65536 chunks; save it anew"),
    "png-after": (pictures.png_chunks(b"", None, png_chunk(b"teST") * 70_000), "a PNG of more than 65536 chunks"),
    **{
        f"png-{kind.decode()}": (
            pictures.png_chunks(png_chunk(kind, head + zlib.compress(bytes(10**6), 9)) * 300),
            "more than 256 compressed texts and profiles; save it anew without its metadata",
        )
        for kind, head in ((b"iCCP", b"a\0\0"), (b"zTXt", b"\0\0"), (b"iTXt", b"\xff\0\1\0\0\0"))
    },
    "bmp-runs-nothing": (
        pictures.bmp_runs(16, 16, bytes(100_000)),
        "a BMP of run lengths with 101078 bytes, over the limit of 66080 for 256 pixels; save it as a PNG",
    ),
    "bmp-runs-upside-down": (pictures.bmp_runs(16, -16, bytes(100_000)), "over the limit of 66080 for 256 pixels"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_neither_memory_nor_time(name: str) -> None:
    """The picture's own size is small, and what its decoder would have to do is not: the row fails before it does."""
    data, expected = BOMBS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(RowError) as caught:
            images.decode(data, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert expected in str(caught.value)
    assert time.process_time() - begin < 1
    # Decoders allocate outside of Python.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 2**10


def test_a_frame_within_an_avif_is_counted() -> None:
    """Frames that are decoded and not shown cost as much as those that are."""
    data = to_bytes(Image.new("RGB", (256, 256)), "AVIF", speed=10)
    begin = data.index(b"mdat") + 4
    obus = data[begin:]
    # The temporal delimiter and the sequence header, then the frame twenty times.
    head = 2 + 2 + obus[3]
    many = obus + obus[head:] * 20
    at = data.index(b"iloc")
    length = data.index(len(obus).to_bytes(4, "big"), at)
    data = data[:length] + len(many).to_bytes(4, "big") + data[length + 4 : begin] + many
    with pytest.raises(RowError, match=r"frames and parts of the image have 1376256 pixels, over 4 times the limit"):
        images.decode(data, 256 * 256)


PLAIN = {
    "strips": to_bytes(Image.fromarray(pictures.noise(300, 200)), "TIFF", strip_size=200 * 3),
    "lzw": file("TIFF", compression="tiff_lzw"),
    "jpeg": file("TIFF", compression="jpeg"),
    "deflate": file("TIFF", compression="tiff_adobe_deflate"),
    "big": file("TIFF", big_tiff=True),
    "tile larger than the picture": tiff_tile(256),
    "last of several strips": tiff({259: 1, 273: [16] * 3, 278: 16, 279: [256] * 3}, bytes(1024)),
    "sequence": pictures.animation("AVIF"),
    "alpha": to_bytes(pictures.rgba((1, 2, 3, 4)), "AVIF"),
    "gif with comment": file("GIF", comment=b"x" * 1000),
    "lzma": file("TIFF", compression="lzma"),
    "zstd": file("TIFF", compression="zstd"),
    "jpeg of many segments": pictures.jpeg_segments(
        b"".join(jpeg_segment(0xE0 + i % 16, bytes(60_000)) for i in range(200)) + jpeg_segment(0xFE, b"x") * 200
    ),
    "jpeg with long exif": pictures.jpeg_segments(jpeg_segment(0xE1, b"Exif\0\0II*\0" + bytes(60_000)) * 20),
    "jpeg of 100 scans": pictures.jpeg_scans(91),
    "jpeg with restarts": file("JPEG", restart_marker_blocks=1),
    "jpeg with filling": pictures.jpeg_segments(b"\xff" * 100_000),
    "jpeg with another behind it": file("JPEG") + file("JPEG") * 200,
    "png of small chunks": pictures.png_chunks(png_chunk(b"tEXt", b"a\0b") * 1000, piece=1),
    "png with texts": pictures.png_chunks(png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**5))) * 200),
    "webp of several chunks": pictures.webp_chunks(100),
    "webp sequence": pictures.animation("WEBP"),
    "bmp runs": pictures.bmp_runs(300, 200, (b"\1\5" * 300 + b"\0\0") * 200 + b"\0\1"),
    "several pages": to_bytes(
        Image.fromarray(pictures.noise()), "TIFF", save_all=True, append_images=[Image.fromarray(pictures.noise())] * 9
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_encoders_write_is_read(name: str) -> None:
    assert images.decode(PLAIN[name], LIMIT).size == Image.open(io.BytesIO(PLAIN[name])).size


def test_runs_are_read_up_to_a_large_picture() -> None:
    """Pillow expands the runs of a BMP in Python, in seconds for a large picture."""
    with pytest.raises(RowError, match=r"run lengths with 4001 x 4000 = 16004000 pixels, over the limit of 16000000"):
        images.decode(pictures.bmp_runs(4001, 4000, b"\0\1"), 10**8)


def test_a_dictionary_of_gigabytes_costs_no_memory() -> None:
    """The dictionary that an LZMA stream names is reserved, and not filled."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert images.decode(pictures.tiff_lzma_dictionary(40), LIMIT).size == (16, 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 2**10


@pytest.mark.parametrize("image_format", images.FORMATS)
@given(seed=st.randoms(use_true_random=False))
def test_a_damaged_header_is_the_rows(image_format: str, seed: object) -> None:
    """Whatever the bytes, the row fails with a message or is decoded."""
    data = bytearray(file(image_format))
    for _ in range(seed.randint(1, 4)):  # type: ignore[attr-defined]
        data[seed.randrange(min(len(data), 400))] = seed.randrange(256)  # type: ignore[attr-defined]
    with contextlib.suppress(RowError):
        images.decode(bytes(data), LIMIT)
