"""Measure what follows sampling: ``python benchmarks/finish.py``.

Batches of 768 x 768 pixels are finished: converted, prepared for the scores, hashed, encoded as PNG and handed on. The
networks of the scores compute nothing, as their work is a GPU's. The pictures are noise with the spectrum of
photographs, as in ``benchmarks/image_formats.py``. One thread for encoding is compared with as many as a worker has.
"""

import dataclasses
import functools
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from image_formats import SIZE, rough
from measure import alternate
from PIL import Image
from torch import Tensor

from vcf_batch.config.run_config import RunConfig
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.records import Sample
from vcf_batch.setup import absolute_paths, defaults, run_models
from vcf_batch.worker import batches, in_process
from vcf_batch.worker.batches import Pictures
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import ENCODERS
from vcf_batch.worker.finishing import Finisher
from vcf_batch.worker.shard_rows import ShardRows
from vcf_batch.worker.worker import Worker

BATCH = 8


def load(folder: Path) -> Worker:
    """A worker of the tiny model, over a manifest of one batch with one reference a row."""
    for number in range(BATCH):
        Image.fromarray(rough(BATCH + number)).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(BATCH)]
    pq.write_table(pa.table({"prompt": names, "reference": names}), folder / "m.parquet")
    config = RunConfig(manifest=str(folder / "m.parquet"), output=str(folder / "out"), model="tiny", batch_size=BATCH)
    config = in_process.settled(absolute_paths.absolute(config))
    job = defaults.settle(config, Manifest.open(config.manifest), run_models.resolve(config))
    return in_process.load(job, str(folder / "scratch"))


def without_networks(scorer: Scorer) -> None:
    """Let the networks of the scores give zeros."""
    judge: Any = scorer.judge.model
    nothing = torch.zeros(1, judge.config.projection_dim)

    def features(pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=nothing.expand(len(pixel_values), -1))

    def compared(outputs: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(outputs)), torch.zeros(len(references))

    judge.get_image_features = features
    cast(Any, scorer.perceptual).compare = compared


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Print the seconds of an image, and the ratio."""
    sampled = torch.from_numpy(np.stack([rough(number) for number in range(BATCH)])).permute(0, 3, 1, 2) / 255
    with tempfile.TemporaryDirectory() as folder:
        worker = load(Path(folder))
        worker.components.device.use_threads()
        without_networks(worker.components.scorer)
        rows = ShardRows.of(worker.manifest.rows(0, BATCH, 0), {}, worker.components.config, [1] * BATCH)
        pictures = [[worker.components.references.read(row.references[0])] for row in rows.rows]
        clocks: dict[str, Clock] = {}

        def finish(threads: int) -> list[Sample]:
            written: list[Sample] = []
            clock = clocks[str(threads)] = Clock()
            with ThreadPoolExecutor(threads) as encoders:
                components = dataclasses.replace(worker.components, encoders=encoders)
                (batch,) = batches.cut(rows, BATCH)
                batch.pictures, batch.images, batch.objectives = pictures, Pictures(sampled), [None] * BATCH
                Finisher(components, rows, written.append, clock).finish(batch)
            return written

        most = min(ENCODERS, len(os.sched_getaffinity(0)))
        assert [one.image for one in finish(1)] == [one.image for one in finish(most)], "threads change no byte"
        found = alternate({str(threads): functools.partial(finish, threads) for threads in (1, most)}, rounds)
    for threads, seconds in found.items():
        parts = ", ".join(f"{name} {value / BATCH:.3f}" for name, value in clocks[threads].seconds.items())
        click.echo(f"{threads} threads: {seconds / BATCH:.3f} s an image of {SIZE} pixels ({parts})")
    click.echo(f"{found['1'] / found[str(most)]:.2f} times as fast with {most} threads")


if __name__ == "__main__":
    main()
