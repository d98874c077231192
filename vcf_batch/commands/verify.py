"""Check an output: read every file again and report each difference from what a run writes, shard by shard.

``run.json`` is compared with its own fingerprint. Each shard of the run's plan is read again
(:mod:`vcf_batch.commands.verifying`). A key that occurs twice in the output is reported. Several shards are read at
the same time, in threads of one or several processes, and each is streamed. Memory does not depend on their size; only
the names of files grow with their number.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vcf_batch import storage
from vcf_batch.commands.verifying.processes import read_in_processes
from vcf_batch.commands.verifying.shard_reader import NOT_GENERATED, ShardReader
from vcf_batch.driver.progress import plural, steps
from vcf_batch.errors import DamageFound, Unfinished
from vcf_batch.manifest.check import RepeatFinder
from vcf_batch.output import commits, progress_file, receipts
from vcf_batch.output.output import Output
from vcf_batch.output.shards import file_name
from vcf_batch.records import Shard
from vcf_batch.sharding import ShardPlan

MAX_REPEATS = 100
"""Number of repeated keys that are named."""

_LOT_BITS = 64


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference from what a run writes, or a note about something that could not be checked."""

    place: str
    """Name of a shard or of a file."""
    cause: str
    shard: Shard | None = None
    """The shard to generate again in order to repair the damage; None if that would not help."""
    kind: Literal["damage", "unfinished", "note"] = "damage"
    """``unfinished`` for a shard that is not generated yet, ``note`` for what is no fault of what is committed."""

    @property
    def is_damage(self) -> bool:
        return self.kind == "damage"

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}" if self.kind != "note" else f"note: {self.place}: {self.cause}"


def sample(plan: ShardPlan, fraction: float) -> frozenset[int]:
    """Indices of the shards of a sample: about this fraction of all, and at least one.

    A hash of its index decides on a shard. So the choice is the same each time, and a larger sample has the shards of
    a smaller one.

    Args:
        plan: the shards of an output.
        fraction: above 0, at most 1.
    """
    lots = [_lot(index) for index in range(len(plan))]
    most = max(min(lots), fraction * 2**_LOT_BITS)
    return frozenset(index for index, lot in enumerate(lots) if lot <= most)


def _lot(index: int) -> int:
    digest = hashlib.blake2b(str(index).encode(), digest_size=_LOT_BITS // 8, person=b"vcf-batch verify").digest()
    return int.from_bytes(digest, "big")


def check_receipts(output: Output) -> Iterator[Finding]:
    """Yield the shards that are not generated yet, or whose files do not have the sizes in their receipts.

    Damage that keeps the size of a file is not found: only the receipts are read that the driver of the run has not
    counted.

    Raises:
        StorageError: the storage failed.
    """
    told = progress_file.look(output.url, output.fingerprints, output.plan)
    for shard in output.plan:
        if reason := told.damaged.get(shard.name):
            yield Finding(shard.name, reason, shard)
        elif shard.index not in told.totals.done:
            yield Finding(shard.name, NOT_GENERATED, shard, "unfinished")


def check(output: Output, chosen: frozenset[int] | None = None, processes: int = 1) -> Iterator[Finding]:
    """Read an output again and yield what is wrong with it. Of each shard, only the first fault is reported.

    Args:
        output: the output.
        chosen: indices of the shards that are read; None reads all. Of the others, those are told that have no receipt.
        processes: number of processes that read. What is found, and in which order, does not depend on it.

    Raises:
        StorageError: the storage failed.
        VcfBatchError: a process that reads was killed.
    """
    lost = told = output.manifest_error
    if told:
        yield Finding("manifest", f"{told}; rows are not compared with it", kind="note")
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output.url)
    reader = ShardReader(output, sizes)
    indices: Sequence[int] = range(len(output.plan))
    if chosen is not None:
        lacks = (shard.index for shard in output.plan if not sizes.get(shard.name + receipts.RECEIPT_SUFFIX))
        indices = sorted(chosen.union(lacks))
    some = (output.plan[index] for index in indices)
    rows = output.plan.num_rows if chosen is None else sum(len(output.plan[index]) for index in chosen)
    with RepeatFinder(rows) as finder:
        read = read_in_processes(reader, some, min(processes, len(output.plan)))
        for shard, (result, manifest_error) in steps(read, "reading", len(indices), "shard"):
            lost = lost or manifest_error
            if isinstance(result, Unfinished):
                yield Finding(shard.name, str(result), shard, "unfinished")
            elif isinstance(result, DamageFound):
                yield Finding(shard.name, str(result), shard)
            else:
                finder.add(result, shard.start)
        count, repeats = finder.repeats(MAX_REPEATS)
    for repeat in repeats:
        shard, first = (output.plan[output.plan.index_of(row)] for row in (repeat.row, repeat.first))
        yield Finding(
            shard.name, f"row {repeat.row} has the key of row {repeat.first} in {file_name(first, 'parquet')}", shard
        )
    if count > len(repeats):
        yield Finding("keys", f"{count - len(repeats)} more rows have a key that another row has")
    if lost and not told:
        yield Finding("manifest", f"{lost}; rows read since are not compared with it", kind="note")
    yield from _strangers(output, sizes)


def _strangers(output: Output, sizes: Mapping[str, int]) -> Iterator[Finding]:
    """Findings about files that do not belong to the shards of the plan."""
    names = {match[1] for match in map(receipts.SHARD_FILE.fullmatch, sizes) if match}
    for name in sorted(names - {shard.name for shard in output.plan}):
        yield Finding(
            name, f"the run has {plural(len(output.plan), 'shard')}, and this is none of them; delete its files"
        )
    with storage.refusals_as_storage_errors():
        left = len(storage.list_tree(storage.join(output.url, commits.STAGING)))
    if left:
        cause = f"{left} files of a run that is at work or was killed; the next start removes them"
        yield Finding(commits.STAGING, cause, kind="note")
