"""The speed of a loaded worker, and the batch size with which it is fastest. No Ray here."""

import dataclasses
import itertools
import time
from collections.abc import Sequence

from vcf_batch.config.row_settings import checked, settings_of
from vcf_batch.errors import OutOfDeviceMemory
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models.prompt_tokens import windows_of
from vcf_batch.records import Row
from vcf_batch.worker.batches import batch_key
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components
from vcf_batch.worker.generation import Generation
from vcf_batch.worker.shard_rows import ShardRows, neutral

SECONDS = 1.0
"""Seconds after which a measurement is not repeated any more."""

GAIN = 1.05
"""Least factor by which a doubled batch size has to raise the throughput."""

BATCHES, STEPS = 2, 10
"""Numbers of batches and denoising steps of a measurement that compares batch sizes. While the first batch is scored,
the second one is sampled."""

CALIBRATION_ROWS = 64
"""Number of the manifest's first rows, of which the most demanding one is measured."""


def seconds_per_image(components: Components, rows: Sequence[Row]) -> float:
    """Seconds that one sample takes, from reading its references to encoding its image. The image is discarded.

    A first pass with one denoising step is not timed: it loads kernels and fills caches.

    Args:
        components: the components of a loaded worker; their ``config`` has the batch size.
        rows: the rows of a shard without errors, such as the manifest's first rows. Best are whole batches.

    Raises:
        OutOfDeviceMemory: a batch does not fit.
        StorageError: a reference cannot be read.
    """
    _generate(dataclasses.replace(components, config=components.config.replace(steps=1)), rows)
    begin = time.perf_counter()
    images, seconds = 0, 0.0
    while seconds < SECONDS:
        _generate(components, rows)
        images += len(rows)
        seconds = time.perf_counter() - begin
    return seconds / images


def fastest_batch_size(components: Components, manifest: Manifest, limit: int) -> int:
    """Batch size that gives the most samples a second, a power of two.

    It is doubled as long as memory holds it and the throughput rises by :data:`GAIN`. Each size is measured with few
    steps, on copies of the most demanding of the manifest's first rows. Plain pictures replace its references.

    Args:
        components: the components of a loaded worker.
        manifest: the manifest of the run.
        limit: largest batch size to try.

    Raises:
        OutOfDeviceMemory: not even one sample fits.
    """
    row = _most_demanding(components, manifest)
    best, least = 0, float("inf")
    for size in itertools.takewhile(lambda size: size <= limit, map((2).__pow__, itertools.count())):
        config = components.config.replace(batch_size=size, steps=min(components.config.steps or STEPS, STEPS))
        rows = [dataclasses.replace(row, number=number, seed=number) for number in range(BATCHES * size)]
        plain = [
            # Lengths of prompts count. LoRAs take no time, because they are merged.
            dataclasses.replace(each, prompt=row.prompt, overrides={**row.overrides, "lora": ()})
            for each in neutral(rows, range(len(rows)), config.negative_prompt)
        ]
        try:
            seconds = seconds_per_image(dataclasses.replace(components, config=config), plain)
        except OutOfDeviceMemory:
            if best:
                break
            raise
        if seconds * GAIN > least:
            break
        best, least = size, seconds
    return best


def _generate(components: Components, rows: Sequence[Row]) -> None:
    components.device.use_threads()
    windows = windows_of(components.pipeline.tokenizers, rows, components.config)
    whole = ShardRows.of(rows, {}, components.config, windows)
    Generation(components, whole, lambda _: None, Clock(), last_attempt=False, sampled_at_once=None).run()


def _most_demanding(components: Components, manifest: Manifest) -> Row:
    """Row that needs the most memory among the first rows. If it has PNO updates, they are reduced to one."""
    rows = [*manifest.first_rows(CALIBRATION_ROWS, components.config.seed)]
    sound = [row for row in rows if not checked(row, components.config).error]
    config = components.config
    windows = windows_of(components.pipeline.tokenizers, sound, config)
    row, _ = max(
        zip(sound, windows, strict=True),
        key=lambda each: batch_key(each[0], settings_of(each[0], config), each[1]),
        default=(Row(0, "text", ""), 1),
    )
    updates = min(settings_of(row, config)["pno_steps"], 1)
    return dataclasses.replace(row, overrides={**row.overrides, "pno_steps": updates})
