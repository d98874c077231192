"""What becomes of each row: the split that it goes to, or the reason why it is left out."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vcf_batch.commands.export.references import Names, ReferenceImages
from vcf_batch.commands.export.settings import ExportSettings
from vcf_batch.commands.export.sources import REFERENCE_HASH, Sources, SourceShard
from vcf_batch.commands.export.split import Split
from vcf_batch.driver.progress import plural, steps
from vcf_batch.errors import UsageError
from vcf_batch.manifest.carried import is_list
from vcf_batch.manifest.check import RepeatFinder
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import Row
from vcf_batch.report.condition import Condition

NO_IMAGE, NOT_SELECTED, EXCLUDED, STRADDLING = (
    "without an image",
    "not selected by --where",
    "in --exclude",
    "straddling splits",
)
"""Reasons why a row is left out."""

_NEEDED = ("key", "status", "prompt", "reference")


@dataclass(frozen=True, slots=True)
class Judged:
    """A row of the outputs, judged."""

    position: int
    split: str | None
    """None if the row is left out."""
    reason: str | None
    """The reason why it is left out; None if it is not."""
    record: dict[str, Any]
    """Its columns: all of :attr:`Selection.schema`, or those that judging needs."""
    row: Row | None
    """The row of the manifest, where references are read."""


@dataclass
class Choice:
    """What is chosen of all rows."""

    splits: Counter[str] = field(default_factory=Counter)
    """Number of rows by split."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of rows by the reason why they are left out."""
    unknown: int = 0
    """Number of keys to exclude that no row with an image has."""

    @property
    def kept(self) -> int:
        return sum(self.splits.values())


class Selection:
    """The rows of an export.

    Args:
        sources: the outputs.
        settings: the settings of the export.

    Raises:
        UsageError: the condition is none on the columns of the outputs, or a manifest is needed and cannot be read.
        DamageFound, StorageError: a parquet cannot be read.
    """

    def __init__(self, sources: Sources, settings: ExportSettings) -> None:
        self._sources, self._settings = sources, settings
        self.schema = sources.schema()
        """The columns of the rows that are handed on."""
        self.names = Names(sources)
        self._split = Split(settings.shares, settings.split_by)
        names_hash = bool(settings.where and re.search(rf"(?i)\b{REFERENCE_HASH}\b", settings.where))
        copies = settings.references == "copy"
        self.images = ReferenceImages(sources) if names_hash or copies else None
        """Where references are read; None if they are not."""
        self._hashes_first = names_hash
        if self.images and REFERENCE_HASH not in self.schema.names:
            at = self.schema.get_field_index("reference")
            self.schema = self.schema.insert(at + 1, pa.field(REFERENCE_HASH, self.schema.field(at).type))
        where = settings.where
        self._condition = None if where is None else Condition(where, self.schema, is_repeatable=True)

    def choose(self, sources: Sources) -> Choice:
        """Judge every row. No image of an output is read.

        Raises:
            UsageError: no row is kept, a split has none, or two of the rows that are kept have one key.
            DamageFound: a parquet does not match its receipt.
            StorageError: the storage failed.
        """
        choice, found = Choice(), 0
        unknown = set(self._settings.exclude)
        with RepeatFinder(sources.rows) as finder:
            judged = side_by_side(self._judge_shard, sources.shards())
            for _, (splits, left_out, keys, excluded) in steps(judged, "selecting", sources.count(), "shard"):
                choice.splits.update(splits)
                choice.left_out.update(left_out)
                unknown -= excluded
                finder.add(keys, found)
                found += len(keys)
            count, repeats = finder.repeats(1)
        if repeats:
            self._refuse_repeats(count, (repeats[0].first, repeats[0].row))
        choice.unknown = len(unknown)
        self._refuse_empty(choice)
        return choice

    def judged(self, shard: SourceShard, whole: bool = True) -> Iterator[Judged]:
        """Each row of a shard, in order.

        Args:
            shard: a committed shard of the outputs.
            whole: whether the records have all columns.
        """
        images = self.images if whole or self._hashes_first else None
        rows = images.rows(shard) if images else None
        named = self._condition.columns if self._condition else ()
        columns = None if whole else [*dict.fromkeys((*_NEEDED, *named))]
        position = shard.start
        for batch in self._sources.batches(shard, self.schema, columns):
            given = [next(rows) if rows else None for _ in range(batch.num_rows)]
            if images and self._hashes_first:
                batch = self._with_hashes(batch, shard, given)
            selected = self._selected(batch)
            records = (batch if whole else batch.select([*_NEEDED])).to_pylist()
            for record, row in zip(records, given, strict=True):
                yield self._verdict(position, shard, record, row, selected)
                position += 1

    def _verdict(
        self, position: int, shard: SourceShard, record: dict[str, Any], row: Row | None, selected: set[str] | None
    ) -> Judged:
        key = record["key"]
        if record["status"] != "success":
            return Judged(position, None, NO_IMAGE, record, row)
        # Before the condition: every key of the list that a row has is to be found.
        if key in self._settings.exclude:
            return Judged(position, None, EXCLUDED, record, row)
        if selected is not None and key not in selected:
            return Judged(position, None, NOT_SELECTED, record, row)
        split = self._split.of(key, record["prompt"], self.names.of(shard.source, record["reference"]))
        return Judged(position, split, None if split else STRADDLING, record, row)

    def _selected(self, batch: pa.RecordBatch) -> set[str] | None:
        if self._condition is None:
            return None
        return self._condition.keys(pa.Table.from_batches([batch]))

    def _with_hashes(self, batch: pa.RecordBatch, shard: SourceShard, rows: list[Row | None]) -> pa.RecordBatch:
        """The batch with the hash of each reference of the rows that have an image."""
        assert self.images
        kind = self.schema.field(REFERENCE_HASH).type
        hashes: list[Any] = []
        for status, row in zip(batch.column("status").to_pylist(), rows, strict=True):
            assert row
            found = self.images.hashes(shard.source, row) if status == "success" else []
            hashes.append((found or None) if is_list(kind) else next(iter(found), None))
        columns = [
            pa.array(hashes, kind) if each.name == REFERENCE_HASH else batch.column(each.name) for each in batch.schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=batch.schema)

    def _judge_shard(self, shard: SourceShard) -> tuple[Counter[str], Counter[str], pa.Array, set[str]]:
        """Number of rows by split, number of rows left out by reason, keys of those that are kept, binary, and those
        that are excluded."""
        self._sources.check_hash(shard, "parquet")
        splits, left_out, keys, excluded = Counter[str](), Counter[str](), list[str](), set[str]()
        for each in self.judged(shard, whole=False):
            if each.split is None:
                left_out[str(each.reason)] += 1
                excluded |= {each.record["key"]} if each.reason == EXCLUDED else set()
            else:
                splits[each.split] += 1
                keys.append(each.record["key"])
        return splits, left_out, pa.array(keys, pa.string()).cast(pa.binary()), excluded

    def _refuse_repeats(self, count: int, numbers: tuple[int, int]) -> None:
        """Name the first key that two rows have, by the numbers of both among the rows that are kept."""
        named: list[tuple[str, str]] = []
        number = 0
        for shard in self._sources.shards():
            for each in self.judged(shard, whole=False):
                if each.split is None:
                    continue
                if number in numbers:
                    named.append((each.record["key"], shard.source.output.url))
                number += 1
            if len(named) == 2:
                break
        (key, first), (_, second) = named
        where = f"in {first} and in {second}" if first != second else f"twice in {first}"
        raise UsageError(
            f"the key {key!r} is {where}, and {count - 1:,} more rows have a key of an earlier one. A key names files "
            "and may be there once: choose one of the rows with --where and run_fingerprint, leave both out with "
            "--exclude, or export the outputs apart"
        )

    def _refuse_empty(self, choice: Choice) -> None:
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in sorted(choice.left_out.items()))
        if not choice.kept:
            rows = plural(sum(choice.left_out.values()), "row")
            raise UsageError(
                f"no row is left of {rows}: {left_out or 'none is there'}. Select more with --where, --exclude or "
                "--split-by"
            )
        for name, share in self._settings.shares.items():
            if not choice.splits[name]:
                others = f" (left out: {left_out})" if left_out else ""
                raise UsageError(
                    f"the split {name!r} has the share {float(share):g} and gets none of the "
                    f"{plural(choice.kept, 'row')} that the selection keeps{others}. Give it a larger share, or leave "
                    "it out"
                )
