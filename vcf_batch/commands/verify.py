"""Check an output: read every file again and report each difference from what a run writes, shard by shard.

``run.json`` is compared with its own fingerprint. Each shard of the run's plan is read again
(:mod:`vcf_batch.commands.verify_shard`). A key that occurs twice in the output is reported. Several shards are read at
the same time, and each is streamed. Memory does not depend on their size; only the names of files grow with their
number.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from vcf_batch import storage
from vcf_batch.commands.verify_shard import check_shard
from vcf_batch.errors import DamageFound
from vcf_batch.manifest.repeats import RepeatFinder
from vcf_batch.output import commits
from vcf_batch.output.output import Output
from vcf_batch.output.shards import file_name, side_by_side
from vcf_batch.records import Shard

MAX_REPEATS = 100
"""Number of repeated keys that are named."""

_SHARD_FILE = re.compile(r"(\d{5,})(\.tar|\.parquet|_stats\.json)")


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference from what a run writes, or a note about something that could not be checked."""

    place: str
    """Name of a shard or of a file."""
    cause: str
    shard: Shard | None = None
    """The shard to generate again in order to repair the damage; None if that would not help."""
    is_damage: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}" if self.is_damage else f"note: {self.place}: {self.cause}"


def check(output: Output) -> Iterator[Finding]:
    """Read an output again and yield what is wrong with it. Of each shard, only the first fault is reported.

    Raises:
        StorageError: the storage failed.
    """
    if output.manifest is None:
        yield Finding("manifest", f"{output.manifest_error}; rows are not compared with it", is_damage=False)
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output.url)

    def keys_or_damage(shard: Shard) -> pa.Array | DamageFound:
        try:
            return check_shard(output, shard, sizes)
        except DamageFound as damage:
            return damage

    with RepeatFinder(output.plan.num_rows) as finder:
        for shard, result in side_by_side(keys_or_damage, output.plan):
            if isinstance(result, DamageFound):
                yield Finding(shard.name, str(result), shard)
            else:
                finder.add(result, shard.start)
        count, repeats = finder.repeats(MAX_REPEATS)
    for repeat in repeats:
        shard, first = (output.plan[row // output.plan.shard_size] for row in (repeat.row, repeat.first))
        yield Finding(
            shard.name, f"row {repeat.row} has the key of row {repeat.first} in {file_name(first, 'parquet')}", shard
        )
    if count > len(repeats):
        yield Finding("keys", f"{count - len(repeats)} more rows have a key that another row has")
    yield from _strangers(output, sizes)


def _strangers(output: Output, sizes: Mapping[str, int]) -> Iterator[Finding]:
    """Findings about files that do not belong to the shards of the plan."""
    names = {match[1] for match in map(_SHARD_FILE.fullmatch, sizes) if match}
    for name in sorted(names - {shard.name for shard in output.plan}):
        yield Finding(name, f"the run has {len(output.plan)} shards, and this is none of them; delete its files")
    if left := len(storage.list_tree(storage.join(output.url, commits.STAGING))):
        cause = f"{left} files of a run that is at work or was killed; the next start removes them"
        yield Finding(commits.STAGING, cause, is_damage=False)
