"""Measure near-duplicates by embeddings: ``python benchmarks/near_embeddings.py search`` and ``... threshold OUTPUT``.

``search`` compares random embeddings of length 1 as they come from shards of 1,000 rows. Their numbers have a common
mean and a spectrum that falls, so that pairs have cosines of 0.4 to 0.8, as pictures have by a CLIP; there are no
clusters in them. A tenth of the rows are near one of the first 20,000, with a cosine of 0.95 to 1. ``--exact`` compares
every pair.

``threshold`` shows cosines by a CLIP: of pairs of different images of an output, and of its images with themselves,
changed in ways that a viewer hardly sees.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import click
import numpy as np
from PIL import Image, ImageEnhance
from plan import peak_memory

from vcf_batch.commands.score.duplicates import near_embeddings
from vcf_batch.output.output import Output
from vcf_batch.output.shards import read_samples

SHARD, FIRST = 1_000, 20_000
COSINES = (0.9, 0.93, 0.95, 0.97, 0.99)


def shards_of(rows: int, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Embeddings of each shard, ``[1000, width]`` float16, and the row that each is near, -1 without one."""
    rng = np.random.default_rng(0)
    spectrum = (1 + np.arange(width)) ** -0.35
    spectrum = (spectrum * np.sqrt(width) / np.linalg.norm(spectrum)).astype(np.float32)
    mean = 1.3 * rng.standard_normal(width, np.float32)
    kept: list[np.ndarray] = []
    for start in range(0, rows, SHARD):
        values = mean + rng.standard_normal((SHARD, width), np.float32) * spectrum
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        like = np.full(SHARD, -1)
        if start < FIRST:
            kept.append(values.astype(np.float16))
        else:
            like[::10] = rng.integers(0, FIRST, SHARD // 10)
            noise = rng.standard_normal((SHARD // 10, width), np.float32) / np.sqrt(width)
            values[::10] = np.concatenate(kept)[like[::10]] + noise * rng.uniform(0, 0.3, (SHARD // 10, 1))
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        yield values.astype(np.float16), like


@click.group()
def main() -> None:
    """Measure near-duplicates by embeddings."""


@main.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--cosine", default=0.95, show_default=True)
@click.option("--exact", is_flag=True)
def search(rows: int, width: int, cosine: float, exact: bool) -> None:
    """Find the near-duplicates among random embeddings."""
    if exact:
        near_embeddings.EXACT_ROWS = rows
    number = near_embeddings.clusters(rows)
    before = peak_memory()
    step = max(1, rows // (near_embeddings.SAMPLED * number)) if number > 1 else rows
    sample = np.concatenate([values for at, (values, _) in enumerate(shards_of(rows, width)) if at % step == 0])
    begin, used = time.perf_counter(), time.process_time()
    comparison = near_embeddings.EmbeddingComparison(cosine, rows, sample)
    trained = time.process_time() - used
    del sample
    likes = []
    for values, like in shards_of(rows, width):
        likes.append(like)
        comparison.add(values)
    firsts, likes_of = comparison.firsts(), np.concatenate(likes)
    are_near = likes_of >= 0
    found = firsts[are_near] == firsts[likes_of[are_near]]
    click.echo(
        f"{rows:,} rows of {width}, {number:,} clusters: {time.perf_counter() - begin:.0f} s, processor "
        f"{time.process_time() - used:.0f} s with the making of the rows, {trained:.0f} s of it training; peak "
        f"{peak_memory() / (1 << 30):.2f} GiB ({before / (1 << 30):.2f} before); {(firsts != np.arange(rows)).sum():,} "
        f"duplicates; {found.mean():.4%} of {are_near.sum():,} rows have the first of the row that they are near"
    )


def _jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def changed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return changed


def _cropped(image: Image.Image) -> Image.Image:
    across, down = max(1, image.width // 32), max(1, image.height // 32)
    return image.crop((across, down, image.width - across, image.height - down)).resize(image.size)


CHANGES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 90": _jpeg(90),
    "JPEG of quality 50": _jpeg(50),
    "half the size and back": lambda image: image.resize((image.width // 2, image.height // 2)).resize(image.size),
    "brighter by 10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "cropped by 1/32 at each side": _cropped,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@main.command()
@click.argument("output")
@click.option("--clip", required=True)
@click.option("--most", default=1_000, show_default=True, help="Images that are looked at.")
def threshold(output: str, clip: str, most: int) -> None:
    """Show cosines of different images and of changed ones."""
    from vcf_batch.metrics.clip_score import ClipJudge

    judge, opened = ClipJudge.from_pretrained(clip), Output(output)
    data = [sample[opened.config.image_format] for tar in opened.tars() for sample in read_samples(tar)][:most]
    pictures = [Image.open(io.BytesIO(each)).convert("RGB") for each in data]

    def embedded(images: list[Image.Image]) -> np.ndarray:
        return judge.embed_images(images).numpy().astype(np.float16).astype(np.float64)

    own = embedded(pictures)
    pairs = (own @ own.T)[np.triu_indices(len(own), 1)]
    click.echo(f"| pairs | lowest | median | highest | {' | '.join(f'{each} or more' for each in COSINES)} |")
    click.echo("|" + "---|" * (4 + len(COSINES)))
    for name, cosines in (
        ("different images", pairs),
        *((name, (own * embedded([*map(change, pictures)])).sum(axis=1)) for name, change in CHANGES.items()),
    ):
        shares = " | ".join(f"{np.mean(cosines >= each):.1%}" for each in COSINES)
        spread = " | ".join(f"{value:.3f}" for value in np.percentile(cosines, (0, 50, 100)))
        click.echo(f"| {name} | {spread} | {shares} |")


if __name__ == "__main__":
    sys.exit(main())
