"""The batches that rows with LoRAs are cut into, and those of the same rows in another order.

All rows of a batch have the same LoRAs, because these belong to the model. So the order of the rows decides how full
batches are, and how often a worker switches.
"""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from vcf_batch import sharding
from vcf_batch.setup.job import Job

WORTH = 1.1
"""Least factor by which batches or switches have to be fewer for another order to be worth a word."""


@dataclass(frozen=True)
class LoraBatches:
    """Batches of a run by LoRAs alone; other settings of rows may divide them further."""

    loras: int
    """Number of different values of the column, nulls included."""
    batches: int
    switches: int
    """Number of batches with another value than the one before, if one worker does them all."""
    padding: int
    """Number of places in batches that stay empty."""


def counted(job: Job) -> tuple[LoraBatches, LoraBatches] | None:
    """The batches of a run by its manifest's column ``lora``, and those if the rows were sorted by it.

    Every row is read, of one column. None without that column.

    Raises:
        ManifestError, StorageError: the manifest cannot be read.
    """
    if not job.manifest.has_loras:
        return None
    counts: Counter[Hashable] = Counter()
    as_it_is = _cut(map(_key, job.manifest.each("lora")), job, counts)
    in_order = sorted(counts.items(), key=lambda each: str(each[0]))
    return as_it_is, _cut(itertools.chain.from_iterable(itertools.starmap(itertools.repeat, in_order)), job, Counter())


def is_worth_sorting(as_it_is: LoraBatches, in_order: LoraBatches) -> bool:
    """Whether sorting by LoRA saves a good part of the batches or of the switches."""
    return as_it_is.batches > WORTH * in_order.batches or as_it_is.switches > WORTH * in_order.switches


def _key(value: Any) -> Hashable:
    return tuple(sorted(map(str, value))) if isinstance(value, list) else value


def _cut(keys: Iterable[Hashable], job: Job, counts: Counter[Hashable]) -> LoraBatches:
    """Cut rows with these keys as a run does, and count each key."""
    batch_size, shard_size = cast(int, job.config.batch_size), cast(int, job.config.shard_size)
    batches, switches, last, rest = 0, 0, object(), iter(keys)
    while shard := [*itertools.islice(rest, shard_size)]:
        counts.update(shard)
        for batch in sorted(sharding.batches(shard, batch_size)):
            batches += 1
            switches += shard[batch[0]] != last
            last = shard[batch[0]]
    return LoraBatches(len(counts), batches, switches, batches * batch_size - counts.total())
