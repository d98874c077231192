"""Measure the time and bytes of image formats: ``python benchmarks/image_formats.py``.

There are two kinds of pictures of 768 x 768 pixels. Rough pictures are noise with the spectrum of photographs (the
amplitude falls with the frequency). Drawn pictures are the tiny family's pictures, enlarged. All figures are relative
to the PNG that runs write by default.
"""

import functools
import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vcf_batch import images
from vcf_batch.tiny import world

Encoder = Callable[[NDArray[np.uint8]], bytes]

SIZE = 768
PICTURES = 4
OTHERS = {
    "PNG, level 0": {"format": "PNG", "compress_level": 0},
    "PNG, level 3": {"format": "PNG", "compress_level": 3},
    "PNG, level 6": {"format": "PNG", "compress_level": 6},
    "WebP lossless, method 4": {"format": "WEBP", "lossless": True, "quality": 50, "method": 4},
    "JPEG, quality 90": {"format": "JPEG", "quality": 90, "subsampling": 0},
}
"""Formats that runs do not offer, for comparison: Pillow's options by name."""


def rough(number: int) -> NDArray[np.uint8]:
    """Noise with the average spectrum of photographs (1/f): grey, a third as much colour, and a camera's noise."""
    random = np.random.default_rng(number)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    frequency[0, 0] = 1
    grey, *colour = np.fft.ifft2(np.fft.fft2(random.standard_normal((4, SIZE, SIZE))) / frequency).real
    field = grey + np.stack(colour) / 3
    field = 48 * field / field.std() + random.standard_normal(field.shape) + 128
    return np.clip(np.rint(field), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def drawn() -> list[NDArray[np.uint8]]:
    """Enlarged pictures of the tiny family's world."""
    small = world.render(world.sample_scenes(PICTURES, 0)).permute(0, 2, 3, 1).numpy()
    large = [Image.fromarray(images.from_unit(one)).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in small]
    return [np.asarray(picture) for picture in large]


def encoders() -> dict[str, Encoder]:
    """Encoders of the formats that runs offer, then of the others."""

    def save(options: dict[str, Any], image: NDArray[np.uint8]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, **options)
        return buffer.getvalue()

    offered = {"png": "PNG, level 1", "webp": "WebP lossless, method 0", "jpg": "JPEG, quality 95"}
    found: dict[str, Encoder] = {
        f"**{shown}**": functools.partial(images.encode, image_format=name) for name, shown in offered.items()
    }
    return found | {name: functools.partial(save, options) for name, options in OTHERS.items()}


def _all(one: Encoder, pictures: Sequence[NDArray[np.uint8]]) -> int:
    """Encode the pictures and return their bytes in total."""
    return sum(len(one(picture)) for picture in pictures)


def _cpu_seconds(work: Callable[[], int]) -> float:
    """Processor seconds of a call. Other work of the machine is not counted."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Print time and size of each format, relative to the first."""
    kinds = {"rough": [rough(number) for number in range(PICTURES)], "drawn": drawn()}
    table: dict[str, list[float]] = {name: [] for name in encoders()}
    for pictures in kinds.values():
        works = {name: functools.partial(_all, one, pictures) for name, one in encoders().items()}
        times = {name: statistics.median(_cpu_seconds(work) for _ in range(rounds)) for name, work in works.items()}
        sizes = {name: work() for name, work in works.items()}
        first = next(iter(works))
        for name in works:
            table[name] += [times[name] / times[first], sizes[name] / sizes[first]]
    click.echo(
        "| format | " + " | ".join(f"{kind}: time | size" for kind in kinds) + " |\n|---|" + "---|" * 2 * len(kinds)
    )
    for name, ratios in table.items():
        click.echo(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
