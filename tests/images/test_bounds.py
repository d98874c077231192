"""What a file makes its decoder do is bounded before anything is decoded, whatever its header says."""

import contextlib
import io
import resource
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support import pictures
from support.pictures import file, tiff, tiff_strips, tiff_tile, to_bytes
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
    "webp": (pictures.webp_header(16_000, 16_000, b"VP8X"), OVER),
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
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_encoders_write_is_read(name: str) -> None:
    assert images.decode(PLAIN[name], LIMIT).size == Image.open(io.BytesIO(PLAIN[name])).size


@pytest.mark.parametrize("image_format", ["TIFF", "AVIF", "GIF"])
@given(seed=st.randoms(use_true_random=False))
def test_a_damaged_header_is_the_rows(image_format: str, seed: object) -> None:
    """Whatever the bytes, the row fails with a message or is decoded."""
    data = bytearray(file(image_format))
    for _ in range(seed.randint(1, 4)):  # type: ignore[attr-defined]
        data[seed.randrange(min(len(data), 400))] = seed.randrange(256)  # type: ignore[attr-defined]
    with contextlib.suppress(RowError):
        images.decode(bytes(data), LIMIT)
