"""How fast a loaded worker generates, and with which batch size it is fastest. No Ray here."""

import dataclasses
import itertools
import time
from collections.abc import Sequence

from vcf_batch.errors import OutOfDeviceMemory
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.records import Row
from vcf_batch.row_settings import checked, settings_of
from vcf_batch.worker import batches
from vcf_batch.worker.batches import batch_key
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components
from vcf_batch.worker.generation import Generation

SECONDS = 1.0
"""A measurement is repeated until it has taken so long."""

GAIN = 1.05
"""By how much a doubled batch size has to raise the throughput to be worth its memory."""

BATCHES, STEPS = 2, 10
"""Of a measurement that compares batch sizes: the second batch is sampled beside the scoring of the first."""

ROWS_LOOKED_AT = 64


def seconds_per_image(components: Components, rows: Sequence[Row]) -> float:
    """Seconds that a sample of a shard takes: references read, sampled, scored and encoded, and thrown away.

    A first pass with a single denoising step, which is not timed, loads kernels and fills caches.

    Args:
        components: of a loaded worker; their ``config`` has the batch size.
        rows: the shard, such as the manifest's first rows; whole batches tell most. None has an error.

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
    """The batch size that gives the most samples a second: doubled as long as that pays and memory holds it.

    Measured on copies of the most demanding of the manifest's first rows, with plain pictures for its references and
    few steps.

    Args:
        components: of a loaded worker.
        manifest: the run's.
        limit: the largest batch size that makes sense.

    Raises:
        OutOfDeviceMemory: not even one sample fits.
    """
    row = _most_demanding(components, manifest)
    best, least = 0, float("inf")
    for size in itertools.takewhile(lambda size: size <= limit, map((2).__pow__, itertools.count())):
        config = components.config.replace(batch_size=size, steps=min(components.config.steps or STEPS, STEPS))
        rows = [dataclasses.replace(row, number=number, seed=number) for number in range(BATCHES * size)]
        plain = batches.neutral(rows, range(len(rows)), config.negative_prompt)
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
    Generation(components, rows, {}, lambda _: None, Clock(), last_attempt=False, sampled_at_once=None).run()


def _most_demanding(components: Components, manifest: Manifest) -> Row:
    """Of the first rows one that needs the most memory, with one update if there are any: they are all alike."""
    rows = manifest.rows(0, min(ROWS_LOOKED_AT, manifest.num_rows), components.config.seed)
    sound = [row for row in rows if not checked(row, components.config).error]
    row = max(sound, key=lambda row: batch_key(row, settings_of(row, components.config)), default=Row(0, "text", ""))
    updates = min(settings_of(row, components.config)["pno_steps"], 1)
    return dataclasses.replace(row, overrides={**row.overrides, "pno_steps": updates})
