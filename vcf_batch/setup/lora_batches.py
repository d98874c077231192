"""The batches that rows with LoRAs are cut into, and those of the same rows in another order.

All rows of a batch have the same LoRAs, because these belong to the model. So the order of the rows decides how full
batches are, and how often a worker switches.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

from vcf_batch import sharding
from vcf_batch.errors import RowError
from vcf_batch.manifest.contract import parse_loras
from vcf_batch.records import Lora, settled_loras
from vcf_batch.setup.job import Job

_Value = str | tuple[str | None, ...] | None
"""A value of the column ``lora``: one LoRA, several, or none of its own."""

WORTH = 1.1
"""Least factor by which batches or switches have to be fewer for another order to be worth a word."""


@dataclass(frozen=True)
class LoraBatches:
    """Batches of a run by LoRAs alone; other settings of rows may divide them further."""

    loras: int
    """Number of different sets of LoRAs, each with its scales. No LoRA is one of them."""
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
    counts: Counter[_Value] = Counter()

    def counting() -> Iterator[_Value]:
        for value in job.manifest.each("lora"):
            hashable = tuple(value) if isinstance(value, list) else value
            counts[hashable] += 1
            yield hashable

    @cache  # The values of a column are few.
    def settled(value: _Value) -> tuple[Lora, ...]:
        return _settled(value, job.config.loras)

    as_it_is = _cut(map(settled, counting()), job)
    in_order = sorted(counts.items(), key=lambda each: str(each[0]))
    values = itertools.chain.from_iterable(itertools.starmap(itertools.repeat, in_order))
    return as_it_is, _cut(map(settled, values), job)


def is_worth_sorting(as_it_is: LoraBatches, in_order: LoraBatches) -> bool:
    """Whether sorting by LoRA saves a good part of the batches or of the switches."""
    return as_it_is.batches > WORTH * in_order.batches or as_it_is.switches > WORTH * in_order.switches


def _settled(value: _Value, run: Mapping[str, Lora]) -> tuple[Lora, ...]:
    """The LoRAs that a run uses for a value of the column, in whatever words it names them.

    A value that cannot be used counts as null: its rows fail, which is told elsewhere.
    """
    try:
        own = None if value is None else parse_loras(value)
    except RowError:
        own = None
    return settled_loras(own, run)


def _cut(loras: Iterable[tuple[Lora, ...]], job: Job) -> LoraBatches:
    """Cut rows with these LoRAs as a run does."""
    batch_size, shard_size = cast(int, job.config.batch_size), cast(int, job.config.shard_size)
    seen: set[tuple[Lora, ...]] = set()
    rows, batches, switches, last, rest = 0, 0, 0, None, iter(loras)
    while shard := [*itertools.islice(rest, shard_size)]:
        seen.update(shard)
        rows += len(shard)
        for batch in sorted(sharding.batches(shard, batch_size)):
            batches += 1
            switches += shard[batch[0]] != last
            last = shard[batch[0]]
    return LoraBatches(len(seen), batches, switches, batches * batch_size - rows)
