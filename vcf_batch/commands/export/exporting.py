"""The export itself: rows to shards, shards to their places, receipts last.

A call that was killed is continued by the next one with the same outputs and settings. The receipt of a shard has the
position behind its last row. Of each split, the rows up to that of its last whole shard are passed over, so the shards
that are left get the bytes that they would have had.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vcf_batch import storage
from vcf_batch.commands.export import described, record
from vcf_batch.commands.export.images import ShardImages
from vcf_batch.commands.export.record import ExportReceipt, ExportRecord, shard_stem
from vcf_batch.commands.export.references import FOLDER, listed
from vcf_batch.commands.export.selection import Judged, Selection
from vcf_batch.commands.export.settings import ExportSettings
from vcf_batch.commands.export.shard_files import IMAGE, SUFFIXES, OpenShard, PackedRow, pack
from vcf_batch.commands.export.sources import REFERENCE_HASH, Sources, SourceShard, refuse_gaps, refuse_old_searches
from vcf_batch.commands.push import ABANDONED_SECONDS, check_target
from vcf_batch.driver.progress import steps
from vcf_batch.errors import RefusedError, UsageError
from vcf_batch.manifest.carried import is_list
from vcf_batch.output import shards
from vcf_batch.output.receipts import RECEIPT_SUFFIX
from vcf_batch.storage import scratch


@dataclass(frozen=True)
class Exported:
    """What an export holds."""

    record: ExportRecord
    shards: Mapping[str, int]
    """Number of shards of each split."""
    written: int
    """Number of shards that this call has written; the others were there."""
    lines: Sequence[str]
    """Lines that name what was left out."""


def export(
    outputs: Sequence[str], target: str, settings: ExportSettings, show: Callable[[str], object] = lambda line: None
) -> Exported:
    """Make a dataset of the successful rows of outputs.

    Args:
        outputs: folders or URLs that runs have written, in order.
        target: an empty or new folder, or one that this very call has begun.
        settings: what is selected, and the form that it gets.
        show: called with a line for each shard that is written.

    Raises:
        UsageError: an output or a setting is wrong, no row is kept, or a key is there twice.
        RefusedError: the target holds something else, or an output has changed meanwhile.
        DamageFound: an output is damaged.
        Unfinished: shards are not generated yet, and ``partial`` is not set.
        StorageError: a storage failed, or has no room.
    """
    target = storage.absolute(target)
    sources = Sources(outputs)
    for source in sources.all:
        check_target(source.output.url, target)
    _check_images(sources, settings)
    record.refuse_foreign(target, record.read(target))
    survey = sources.survey
    if not settings.partial:
        refuse_gaps(survey, sources)
    refuse_old_searches(survey)
    selection = Selection(sources, settings)
    _check_columns(sources, selection.schema, settings)
    choice = selection.choose(sources)
    _remove_unfinished(target, settings)
    there = record.claim(target, record.of(storage.name(target), sources, survey, settings, choice))
    lines = [*(f"left out: {line}" for line in survey.left_out), *survey.unscored]
    if choice.unknown:
        lines.append(
            f"{choice.unknown:,} of {len(settings.exclude):,} keys of --exclude are none of a row with an image"
        )
    writing = _Writing(sources, selection, settings, target, there, show)
    writing.go_on()
    if sources.have_changed():
        raise RefusedError(
            f"an output has changed while it was exported, by a repair or by more finished shards; delete {target} and "
            "rerun this command"
        )
    for name, data in described.files(target, there):
        url = storage.join(target, name)
        if name != described.CARD or not storage.exists(url):
            storage.publish_bytes(url, data)
    return Exported(there, writing.shards, writing.written, lines)


def _remove_unfinished(target: str, settings: ExportSettings) -> None:
    """Delete what a killed export has left half written in a local target."""
    folders = ["", *settings.shares]
    if settings.references == "copy":
        folders += [f"{FOLDER}/{number:02x}" for number in range(256)]
    for folder in folders:
        storage.remove_unfinished(storage.join(target, folder), ABANDONED_SECONDS)


def _check_images(sources: Sources, settings: ExportSettings) -> None:
    """Refuse images that outputs do not have, and tars with images of several formats."""
    for source in sources.all:
        if settings.images and not source.output.config.triplets:
            raise UsageError(
                f"--images {','.join(settings.images)}: {source.output.url} has no such images, as it was made without "
                "--triplets; leave --images out"
            )
    formats = {source.output.config.image_format: source.output.url for source in sources.all}
    if len(formats) > 1 and settings.format != "parquet":
        told = ", ".join(f"{ending} in {url}" for ending, url in formats.items())
        raise UsageError(f"the images have several formats: {told}. Export them apart, or with --format parquet")


def _check_columns(sources: Sources, schema: pa.Schema, settings: ExportSettings) -> None:
    """Refuse columns with the names of those that images get in a parquet."""
    taken = [name for name in (IMAGE, *settings.images) if name in schema.names and settings.format == "parquet"]
    if taken:
        urls = ", ".join(source.output.url for source in sources.all)
        raise UsageError(
            f"{urls} has a column {taken[0]!r}, where --format parquet puts images; use tars, or rename it for a new "
            "run"
        )


class _Writing:
    """The shards of an export, written one after the other.

    Args:
        sources: the outputs.
        selection: the rows that are kept.
        settings: the settings.
        target: the export.
        there: its record.
        show: called with a line for each shard that is written.
    """

    def __init__(
        self,
        sources: Sources,
        selection: Selection,
        settings: ExportSettings,
        target: str,
        there: ExportRecord,
        show: Callable[[str], object],
    ) -> None:
        self._sources, self._selection, self._settings = sources, selection, settings
        self._target, self._there, self._show = target, there, show
        self.shards: dict[str, int] = {}
        self.written = 0
        self._begin: dict[str, int] = {}
        """Position from which the rows of each split that is not finished are written."""
        self._open: dict[str, OpenShard] = {}

    def go_on(self) -> None:
        """Write the shards that are not there, or whose copies of references are not. For errors see :func:`export`."""
        copies = None
        if self._settings.references == "copy":
            with storage.refusals_as_storage_errors():
                copies = {f"{FOLDER}/{name}" for name in storage.list_tree(storage.join(self._target, FOLDER))}
        for split, rows in self._there.splits.items():
            found = count = begin = 0
            for receipt in record.whole_shards(self._target, self._there, split):
                if copies is not None and not self._has_copies(receipt, copies):
                    break
                found, count, begin = found + receipt.rows, count + 1, receipt.next
            self.shards[split] = count
            if found < rows:
                self._begin[split] = begin
        if not self._begin:
            return
        room = self._settings.shard_bytes * len(self._begin)
        with scratch.folder() as folder, scratch.writing("the shards of an export", folder, room):
            begin = min(self._begin.values())
            for shard in steps(self._sources.shards(begin), "exporting", self._sources.count(begin), "shard"):
                for judged, row in self._rows(shard):
                    self._add(folder, str(judged.split), row, judged.position)
            for split in [*self._open]:
                self._close(folder, split)

    def _has_copies(self, receipt: ExportReceipt, copies: Set[str]) -> bool:
        """Whether all references that the rows of a shard name are among the copies; no if they cannot be read."""
        url = storage.join(self._target, receipt.split, receipt.name + SUFFIXES["parquet"])
        try:
            with shards.open_parquet(url) as parquet:
                table = parquet.read(["reference", "negative_reference"], use_threads=False)
                given = itertools.chain.from_iterable(column.to_pylist() for column in table.columns)
                return all(name in copies for value in given for name in listed(value))
        # A damaged file may hold anything.
        except (pa.ArrowException, OSError, ValueError):
            return False

    def _rows(self, shard: SourceShard) -> Iterator[tuple[Judged, PackedRow]]:
        """The rows of a shard that are to be written."""
        ending = shard.source.output.config.image_format
        with ShardImages(self._sources, shard, self._settings.images) as images:
            for judged in self._selection.judged(shard):
                if judged.split not in self._begin or judged.position < self._begin[judged.split]:
                    continue
                pictures = images.of(judged.record)
                columns = self._handed_on(shard, judged)
                in_tar = self._settings.format != "parquet"
                yield judged, pack(columns, pictures, ending, self._selection.schema, in_tar)

    def _handed_on(self, shard: SourceShard, judged: Judged) -> dict[str, Any]:
        """The columns of a row, with the names that references have for receivers."""
        names, given = self._selection.names, dict(judged.record)
        if masks := given.get("reference_masks"):
            given["reference_masks"] = [next(iter(names.of(shard.source, mask)), None) for mask in masks]
        if self._settings.references == "copy":
            assert self._selection.images and judged.row
            copies, negative = self._selection.images.copies(shard.source, judged.row, self._target)
            return given | {
                "reference": self._formed("reference", [copy.path for copy in copies]),
                "negative_reference": negative and negative.path,
                REFERENCE_HASH: self._formed(REFERENCE_HASH, [copy.sha256 for copy in copies]),
            }
        columns = ("reference", "negative_reference")
        return given | {name: self._formed(name, names.of(shard.source, given[name])) for name in columns}

    def _formed(self, column: str, values: list[str]) -> list[str] | str | None:
        """Values in the form of a column: a list, or one value. None if there is none."""
        if is_list(self._selection.schema.field(column).type):
            return values or None
        return next(iter(values), None)

    def _add(self, folder: str, split: str, row: PackedRow, position: int) -> None:
        shard = self._open.get(split)
        if shard and shard.bytes + row.bytes > self._settings.shard_bytes:
            self._close(folder, split)
            shard = None
        if shard is None:
            shard = self._open[split] = OpenShard(
                os.path.join(folder, split),
                shard_stem(self.shards[split]),
                self._selection.schema,
                self._settings.format,
                self._settings.images,
            )
        shard.add(row, position)

    def _close(self, folder: str, split: str) -> None:
        """Put the open shard of a split into its place, its receipt last."""
        shard, name = self._open.pop(split), shard_stem(self.shards[split])
        paths = shard.finish()
        there = storage.join(self._target, split)
        entries = {kind: storage.digest(path) for kind, path in paths.items()}
        receipt = ExportReceipt(self._there.fingerprint, split, name, shard.rows, shard.next, entries)
        # What an earlier call wrote here did not fit its receipt.
        storage.remove(storage.join(there, name + RECEIPT_SUFFIX), missing_ok=True)
        for kind, path in paths.items():
            storage.upload(path, storage.join(there, name + SUFFIXES[kind]))
        storage.publish_bytes(storage.join(there, name + RECEIPT_SUFFIX), receipt.to_json())
        shutil.rmtree(os.path.join(folder, split))
        self.shards[split] += 1
        self.written += 1
        size = sum(entry.size for entry in entries.values())
        self._show(f"{split}/{name}: {shard.rows:,} rows, {size / 1e6:,.1f} MB")
