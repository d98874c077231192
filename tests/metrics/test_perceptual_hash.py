"""The perceptual hash is what its definition says, and stays when an image is scaled or compressed anew."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from vcf_batch.metrics.perceptual_hash import BITS, perceptual_hash


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def by_definition(image: Image.Image) -> int:
    """Each frequency as a sum of its own, in floating point, and its bit."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    waves = [[math.cos(math.pi / 64 * frequency * (2 * place + 1)) for place in range(32)] for frequency in range(8)]
    lowest = [
        sum(grey[y, x] * waves[vertical][y] * waves[horizontal][x] for y in range(32) for x in range(32))
        for vertical in range(8)
        for horizontal in range(8)
    ]
    median = sum(sorted(lowest)[31:33]) / 2
    return int("".join("1" if value > median else "0" for value in lowest), 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_hash_is_that_of_its_definition(seed: int) -> None:
    found = perceptual_hash(picture(seed))
    assert found == by_definition(picture(seed))
    # As many frequencies are above the median as below it.
    assert found.bit_count() == BITS // 2


def test_the_hash_stays_the_same() -> None:
    """Published data sets hold it, so another version may not change it."""
    wave = np.cos(np.arange(40)[:, None] / 5) * np.cos(np.arange(60)[None] / 9)
    image = Image.fromarray((128 + 100 * wave).astype(np.uint8))
    assert f"{perceptual_hash(image):016x}" == "b54ab5b54ab54ab0"


def test_images_that_are_alike_have_hashes_that_are_near() -> None:
    """Scaled, compressed, brightened or without colours; other images are far."""
    hashes = [perceptual_hash(picture(seed)) for seed in range(30)]
    apart = [(one ^ other).bit_count() for at, one in enumerate(hashes) for other in hashes[:at]]
    assert min(apart) > 12 and 28 < sum(apart) / len(apart) < 36
    for seed, own in enumerate(hashes):
        image = picture(seed)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=60)
        brighter = image.point([min(int(value * 0.8 + 40), 255) for value in range(256)] * 3)
        for changed in (
            image.resize((48, 32)),
            picture(seed, 300, 200),
            Image.open(file),
            brighter,
            image.convert("L"),
        ):
            assert (own ^ perceptual_hash(changed)).bit_count() <= 4


def test_images_of_one_colour_have_one_hash() -> None:
    """Sums are exact: no rounding tells them apart. Black has no brightness either."""
    hashes = {perceptual_hash(Image.new("RGB", (50, 20), colour)) for colour in ("white", "red", "#010203")}
    assert hashes == {1 << 63} and perceptual_hash(Image.new("RGB", (50, 20))) == 0
