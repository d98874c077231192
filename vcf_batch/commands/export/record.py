"""``export.json``, what an export is made of; and the receipts of its shards, ``SPLIT/00000_stats.json``."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vcf_batch import __version__, storage
from vcf_batch.commands.export.selection import Choice
from vcf_batch.commands.export.settings import ExportSettings
from vcf_batch.commands.export.shard_files import KINDS, SUFFIXES
from vcf_batch.commands.export.sources import RUN, Sources, Survey
from vcf_batch.config.fingerprint import fingerprint
from vcf_batch.errors import RefusedError, redact_name
from vcf_batch.output.output import EXPORT_NAME
from vcf_batch.output.receipts import RECEIPT_SUFFIX
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import FileEntry
from vcf_batch.sharding import MIN_DIGITS

EXPORT_LAYOUT = 1
"""Version of an export's layout."""

MAX_EXPORT_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """An export as its ``export.json`` describes it."""

    name: str
    """Name of the dataset: that of its folder when it was made."""
    fields: Mapping[str, Any]
    """The settings, and the identity of each output: what decides on the bytes."""
    sources: Sequence[Mapping[str, Any]]
    """Name, run, models and number of rows of each output."""
    image_format: str
    """Extension of the images; that of each file is in its name, where outputs have several."""
    splits: Mapping[str, int]
    """Number of rows of each split."""
    left_out: Mapping[str, int]
    """Number of rows that are left out, by reason."""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """A sentence on each column that neither a run nor its manifest has: the one of the run, and those of scores."""
    vcf_batch: str = __version__
    layout: int = EXPORT_LAYOUT
    fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.fields))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the files of a shard."""
        return KINDS[self.fields["format"]]

    @property
    def rows(self) -> int:
        return sum(self.splits.values())

    def to_json(self) -> bytes:
        """The record as indented UTF-8 JSON."""
        return (json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ExportRecord":
        """Read back :meth:`to_json`.

        Raises:
            ValueError: the bytes are not a record, or its fingerprint is not that of its fields.
        """
        try:
            there = json.loads(data)
            said = there.pop("fingerprint")
            record = cls(**there)
            counts = [*record.splits.values(), *record.left_out.values()]
            if said != record.fingerprint or record.layout != EXPORT_LAYOUT or not record.splits:
                raise ValueError(f"its layout is {record.layout}, and its fingerprint is not that of its fields")
            if not all(type(count) is int and count >= 0 for count in counts) or record.kinds is None:
                raise ValueError("its counts are no numbers")
            return record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the record of an export: {error}") from error


def of(name: str, sources: Sources, survey: Survey, settings: ExportSettings, choice: Choice) -> ExportRecord:
    """The record of an export that is begun."""
    described = [
        {
            "name": source.name,
            "run_fingerprint": source.output.record.fingerprint,
            "rows": source.output.plan.num_rows,
            "shards_left_out": survey.damaged[source.index] + survey.unfinished[source.index],
            "models": {
                name: {"name": _without_folder(model["name"]), "identity": model["identity"]}
                for name, model in source.output.record.named_models.items()
            },
        }
        for source in sources.all
    ]
    identities = [
        [source.output.record.fingerprint, digest] for source, digest in zip(sources.all, survey.digests, strict=True)
    ]
    return ExportRecord(
        name=name,
        fields={**settings.fields(), "sources": identities},
        sources=described,
        image_format=sources.all[0].output.config.image_format,
        splits={name: choice.splits[name] for name in settings.shares},
        left_out=dict(sorted(choice.left_out.items())),
        meanings={
            RUN: "The fingerprint of the run that has made the row.",
            **{column.name: column.meaning for score in sources.scores.values() for column in score.columns},
        },
    )


def _without_folder(name: str) -> str:
    """The name of a model; of a local path its last part."""
    return storage.name(name) if name.startswith(("/", "~", ".", "file://")) else redact_name(name)


def read(target: str) -> ExportRecord | None:
    """The record of the export in a folder; None if there is none.

    Raises:
        RefusedError: it is there, but is not what this version writes.
        StorageError: the storage failed.
    """
    url = storage.join(target, EXPORT_NAME)
    try:
        with storage.refusals_as_storage_errors():
            return ExportRecord.from_json(storage.read_bytes(url, limit=MAX_EXPORT_BYTES))
    except FileNotFoundError:
        return None
    except (storage.NotAFileError, ValueError) as error:
        raise RefusedError(f"{url} is damaged, or of another version: {error}; export into another folder") from error


def refuse_foreign(target: str, there: ExportRecord | None) -> None:
    """Refuse a folder with files that are no export's.

    Raises:
        RefusedError: it is not empty.
        StorageError: the storage failed.
    """
    if there is not None:
        return
    with storage.refusals_as_storage_errors():
        found = storage.list_some(target, 1)
    if found:
        raise RefusedError(
            f"{target} holds files, such as {found[0]}, and no {EXPORT_NAME}: name a new or empty folder"
        )


def claim(target: str, record: ExportRecord) -> ExportRecord:
    """Publish the record of an export, or find that the folder holds this very export.

    Returns:
        The record that is there.

    Raises:
        RefusedError: the folder holds another export, or other files.
        StorageError: the storage failed.
    """
    there = read(target)
    refuse_foreign(target, there)
    if there is None:
        try:
            storage.publish_bytes(storage.join(target, EXPORT_NAME), record.to_json(), create=True)
            return record
        except FileExistsError:
            there = read(target)
    if there is None or there.fingerprint != record.fingerprint:
        raise RefusedError(_difference(target, there, record))
    return there


def _difference(target: str, there: ExportRecord | None, record: ExportRecord) -> str:
    if there is None:
        return f"{target} is being written by another export; name another folder"
    names = [name for name in record.fields if there.fields.get(name) != record.fields[name]]
    lines = [
        f"  {name}: {json.dumps(there.fields.get(name))} there, {json.dumps(record.fields[name])} now"
        for name in names
        if name != "sources"
    ]
    if "sources" in names:
        lines.append("  the outputs: others there, or they have changed since, by a repair or more finished shards")
    return f"{target} holds another export; they differ in:\n" + "\n".join(lines) + "\nExport into another folder."


@dataclass(frozen=True, slots=True)
class ExportReceipt:
    """The receipt of a shard of an export: written last, so its existence means that the shard's files are whole."""

    fingerprint: str
    split: str
    name: str
    """Stem of the names of the shard's files."""
    rows: int
    next: int
    """Position behind its last row in the rows of the outputs, from which an export goes on."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """Size and hash of each file, by kind."""

    def to_json(self) -> bytes:
        """The receipt as indented UTF-8 JSON with sorted keys."""
        return (json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ExportReceipt":
        """Read back :meth:`to_json`.

        Raises:
            ValueError: the bytes are not a receipt.
        """
        try:
            there = json.loads(data)
            there["files"] = {kind: FileEntry(**entry) for kind, entry in there["files"].items()}
            receipt = cls(**there)
            numbers = [receipt.rows, receipt.next, *(entry.size for entry in receipt.files.values())]
            if not all(type(number) is int and number >= 0 for number in numbers) or receipt.rows < 1:
                raise ValueError(f"rows is {receipt.rows!r}, next is {receipt.next!r}")
            return receipt
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a receipt: {error}") from error


def shard_stem(index: int) -> str:
    """Stem of the names of a shard's files. How many shards there will be is not known before."""
    return f"{index:0{MIN_DIGITS}d}"


def misfit(record: ExportRecord, split: str, name: str, receipt: ExportReceipt, sizes: Mapping[str, int]) -> str | None:
    """The first way in which a receipt is not that of a shard, or does not fit its files; None if it fits.

    Args:
        sizes: bytes of the files of the split's folder, by name.
    """
    if (receipt.fingerprint, receipt.split, receipt.name) != (record.fingerprint, split, name):
        return f"its receipt is that of {receipt.split}/{receipt.name} of export {receipt.fingerprint[:12]}"
    if {*receipt.files} != {*record.kinds}:
        return f"its receipt describes {sorted(receipt.files)}; a shard has {sorted(record.kinds)}"
    for kind, entry in receipt.files.items():
        file = name + SUFFIXES[kind]
        if sizes.get(file) != entry.size:
            found = "is missing" if file not in sizes else f"has {sizes[file]} bytes, its receipt says {entry.size}"
            return f"{file} {found}"
    return None


def whole_shards(target: str, record: ExportRecord, split: str) -> Iterator[ExportReceipt]:
    """The receipts of the first shards of a split, up to the first one that is missing or does not fit its files.

    Raises:
        StorageError: the storage failed.
    """
    folder = storage.join(target, split)
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(folder)

    def read_one(name: str) -> ExportReceipt | None:
        try:
            with storage.refusals_as_storage_errors():
                receipt = ExportReceipt.from_json(storage.read_bytes(storage.join(folder, name + RECEIPT_SUFFIX)))
        except (FileNotFoundError, storage.NotAFileError, ValueError):
            return None
        return None if misfit(record, split, name, receipt, sizes) else receipt

    names = itertools.takewhile(lambda name: name + RECEIPT_SUFFIX in sizes, map(shard_stem, itertools.count()))
    for _, receipt in side_by_side(read_one, names):
        if receipt is None:
            return
        yield receipt
