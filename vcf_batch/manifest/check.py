"""The pass over all rows of a manifest before a run: what refuses it, and how many rows have what.

Repeated ids are found among very many, in bounded memory. Ids are compared by 128 bits of hash: two different ids of a
manifest have equal hashes with a probability below 1e-20. The hashes are spread over files in local scratch, and then
the files are read one by one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vcf_batch.errors import ManifestError
from vcf_batch.manifest.carried import is_list
from vcf_batch.manifest.columns import OPTIONS, shown
from vcf_batch.manifest.contract import SAFE_ID
from vcf_batch.storage import scratch

if TYPE_CHECKING:
    from vcf_batch.manifest.manifest import Manifest

_SHOWN = 5
_ROWS_PER_CHECK = 65_536
_WEIGHT = r"\([^()]*:\s*[0-9]*\.?[0-9]+\s*\)"
"""A weight in a prompt as other programs read it: ``(word:1.2)``. Here it is text like any other."""

ROWS_PER_PARTITION = 500_000
MAX_PARTITIONS = 256
_PENDING_ROWS = 500_000
_RECORD = np.dtype([("hash", np.uint64), ("check", np.uint64), ("row", np.int64)])
_WORD = 8
_WORD_MASKS = np.array([(1 << 8 * kept) - 1 for kept in range(_WORD + 1)], dtype=np.uint64)
"""Mask of a word for each number of its bytes that belong to the id."""
_HASH_FACTOR, _CHECK_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
"""Odd factors with many bits set throughout: the golden ratio's, and a prime of xxHash."""


@dataclass
class Census:
    """Numbers of rows that have something."""

    rows: int
    having: dict[str, int | None] = field(default_factory=dict)
    """Rows with a value in each of :data:`~vcf_batch.manifest.columns.OPTIONS`; 0 where there is no such column, None
    where only the bytes of images tell."""
    weighted: int = 0
    """Rows whose prompt has a weight such as ``(word:1.2)``."""


def check(manifest: "Manifest") -> Census:
    """Read every row once and refuse empty prompts and missing, unsafe or repeated ids.

    Memory is bounded; hashes of the ids go through local scratch (24 bytes each). A mistake that concerns one row
    alone, such as an override out of range, is not refused here: it becomes the :attr:`Row.error` of its row.

    Raises:
        ManifestError: one error with each column, the number of wrong rows, and the places of the first ones.
        StorageError: the storage failed.
    """
    findings, total = _Findings(manifest), manifest.num_rows
    columns = [name for name in OPTIONS if name in manifest._columns]
    has_ids = "sample_id" in columns
    census = Census(total, dict.fromkeys(OPTIONS, 0))
    with RepeatFinder(total) as finder:
        for first_row, batch in manifest._batches(
            columns, manifest.first_row, manifest.stop, _ROWS_PER_CHECK, counting=True
        ):
            prompts = large_texts(batch["prompt"])
            findings.add("prompt", "null", first_row, pc.is_null(prompts))
            findings.add("prompt", "empty", first_row, _each(_blank, prompts))
            census.weighted += pc.sum(_each(_weighted, prompts)).as_py() or 0
            for name in columns:
                before = census.having[name]
                here = _having(batch[name], manifest.embeds) if name in batch.schema.names else None
                census.having[name] = None if before is None or here is None else before + here
            if has_ids:
                ids = large_texts(batch["sample_id"])
                findings.add("sample_id", "null", first_row, pc.is_null(ids))
                findings.add("sample_id", "unsafe", first_row, _each(_unsafe, ids), ids)
                if not findings.of("sample_id"):
                    finder.add(_binary(ids), first_row)
        if has_ids and not findings.of("sample_id"):
            findings.add_repeats(finder)
    findings.raise_if_any()
    return census


def _having(column: pa.Array, embeds: bool) -> int:
    """Number of values that are not null, and no empty lists.

    Args:
        column: a column without fields that hold bytes.
        embeds: whether it has such fields, so that an image without a path may be there.
    """
    if is_list(column.type):
        return pc.sum(pc.greater(pc.list_value_length(column), 0)).as_py() or 0
    if pt.is_struct(column.type) and not embeds:
        return len(column) - column.flatten()[0].null_count
    return len(column) - column.null_count


class _Findings:
    """Number of wrong rows for each column and complaint, and the places of the first ones."""

    _REMEDIES: Mapping[str, str] = {
        "null": "every row needs a value",
        "empty": "every row needs a prompt",
        "unsafe": "an id is 1 to 128 of the characters A-Z a-z 0-9 _ -",
        "repeated": "every id must be unique",
    }

    def __init__(self, manifest: "Manifest") -> None:
        self._manifest = manifest
        self._counts: dict[tuple[str, str], int] = {}
        self._examples: dict[tuple[str, str], list[str]] = {}

    def of(self, column: str) -> bool:
        return any(name == column for name, _ in self._counts)

    def add(
        self, column: str, complaint: str, first_row: int, offends: pa.Array, values: pa.Array | None = None
    ) -> None:
        """Record the rows that are true in ``offends``, one boolean per row from ``first_row`` on; null is false."""
        if not pc.any(offends).as_py():
            return
        positions = np.flatnonzero(offends.fill_null(False).to_numpy(zero_copy_only=False))
        examples = []
        for position in positions[:_SHOWN].tolist():
            value = "" if values is None else f" ({shown(_binary(values.slice(position, 1))[0].as_py())})"
            examples.append(self._manifest.locate(first_row + position) + value)
        self._record(column, complaint, len(positions), examples)

    def add_repeats(self, finder: "RepeatFinder") -> None:
        count, repeats = finder.repeats(_SHOWN)
        locate = self._manifest.locate
        if count:
            ids = [self._manifest.rows(repeat.row, repeat.row + 1, run_seed=0)[0].key for repeat in repeats]
            examples = [
                f"{locate(repeat.row)} ({key!r}, as {locate(repeat.first)})"
                for key, repeat in zip(ids, repeats, strict=True)
            ]
            self._record("sample_id", "repeated", count, examples)

    def raise_if_any(self) -> None:
        if not self._counts:
            return
        lines = []
        for (column, complaint), count in self._counts.items():
            first = "; ".join(self._examples[column, complaint])
            rows = "1 row is" if count == 1 else f"{count} rows are"
            named = self._manifest.mapped.get(column, column)
            lines.append(f"  column {named!r}: {rows} {complaint} ({self._REMEDIES[complaint]}), first: {first}")
        raise ManifestError(f"{self._manifest.url} breaks the manifest contract:\n" + "\n".join(lines))

    def _record(self, column: str, complaint: str, count: int, examples: list[str]) -> None:
        about = (column, complaint)
        self._counts[about] = self._counts.get(about, 0) + count
        self._examples[about] = (self._examples.get(about, []) + examples)[:_SHOWN]


def _each(judge: Callable[[pa.Array], pa.Array], texts: pa.Array) -> pa.Array:
    """Results of ``judge`` for each text; each distinct text of a dictionary is judged once."""
    return judge(texts.dictionary).take(texts.indices) if pa.types.is_dictionary(texts.type) else judge(texts)


def large_texts(texts: pa.Array) -> pa.Array:
    """Texts as large_string, or as a dictionary of them."""
    if isinstance(texts.type, pa.UuidType):
        return pa.array([value and str(value) for value in texts.to_pylist()], pa.large_string())
    return texts if pt.is_dictionary(texts.type) else texts.cast(pa.large_string())


def _binary(texts: pa.Array) -> pa.Array:
    """Texts as large_binary, however the file encodes them."""
    return texts.cast(pa.large_string()).cast(pa.large_binary())


def _unsafe(ids: pa.Array) -> pa.Array:
    return pc.invert(pc.match_substring_regex(_binary(ids), rf"\A{SAFE_ID}\z"))


def _blank(texts: pa.Array) -> pa.Array:
    texts = texts.cast(pa.large_string())
    try:
        # Lengths are not compared with a number: pyarrow loads pandas to make a scalar.
        return pc.or_(pc.invert(pc.binary_length(texts).cast(pa.bool_())), pc.utf8_is_space(texts))
    except pa.ArrowInvalid:
        # A text that is not UTF-8 fails its row later. Here the batch is checked for ASCII white space instead.
        return pc.invert(pc.match_substring_regex(_binary(texts), r"[^\s]"))


def _weighted(texts: pa.Array) -> pa.Array:
    texts = texts.cast(pa.large_string())
    has_colon = pc.match_substring(texts, ":")
    if not pc.any(has_colon).as_py():
        return has_colon
    return pc.match_substring_regex(_binary(texts), _WEIGHT)


@dataclass(frozen=True, slots=True, order=True)
class Repeat:
    """A repeated id: row ``row`` has the same id as the earlier row ``first``."""

    row: int
    first: int


class RepeatFinder:
    """Finder of repeated ids. It is a context manager: leaving it deletes its scratch folder.

    Memory is bounded by :data:`ROWS_PER_PARTITION` and :data:`MAX_PARTITIONS`, not by the number of repeats. Scratch
    takes 24 bytes for each id.

    Args:
        expected: approximate number of ids; it decides the number of partitions.
    """

    def __init__(self, expected: int) -> None:
        self._count = min(max(-(-expected // ROWS_PER_PARTITION), 1), MAX_PARTITIONS)
        self._scratch = scratch.temporary(f"the hashes of {expected:,} ids", expected * _RECORD.itemsize)
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0

    def __enter__(self) -> Self:
        """Make the scratch folder.

        Raises:
            StorageError: it cannot be made. Within the block: its disk is full.
        """
        self._folder = Path(self._scratch.__enter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scratch.__exit__(kind, error, trace)

    def add(self, ids: pa.Array, first_row: int) -> None:
        """Add the ids (binary, no nulls) of the rows from ``first_row`` on. Batches must come in row order."""
        records = np.empty(len(ids), _RECORD)
        records["hash"], records["check"] = hash_ids(ids.cast(pa.large_binary()))
        records["row"] = np.arange(first_row, first_row + len(ids))
        self._pending.append(records)
        self._pending_rows += len(ids)
        if self._pending_rows >= _PENDING_ROWS:
            self._spread()

    def repeats(self, most: int) -> tuple[int, list[Repeat]]:
        """Number of rows that repeat an earlier id, and the first ``most`` of them."""
        self._spread()
        total = 0
        found: list[Repeat] = []
        for partition in range(self._count):
            for count, some in self._repeats_in(partition, most):
                total += count
                found = sorted(found + some)[:most]
        return total, found

    def _path(self, partition: int) -> Path:
        return self._folder / f"{partition}.records"

    def _spread(self) -> None:
        """Append the pending records to the files of their partitions."""
        if not self._pending:
            return
        records = np.concatenate(self._pending)
        self._pending, self._pending_rows = [], 0
        partitions = (records["hash"] % np.uint64(self._count)).astype(np.int16)
        records = records[np.argsort(partitions, kind="stable")]
        stops = np.cumsum(np.bincount(partitions, minlength=self._count))
        for partition, part in enumerate(np.split(records, stops[:-1])):
            if len(part):
                with self._path(partition).open("ab") as file:
                    # Not tofile, which does not tell why it could not write.
                    file.write(part.view(np.uint8).data)

    def _repeats_in(self, partition: int, most: int) -> Iterator[tuple[int, list[Repeat]]]:
        """Yield the repeats of one partition by chunks. Memory holds its distinct ids and one chunk."""
        if not self._path(partition).exists():
            return
        seen = np.empty(0, _RECORD)
        with self._path(partition).open("rb") as file:
            while len(chunk := np.fromfile(file, _RECORD, ROWS_PER_PARTITION)):
                records = np.concatenate([seen, chunk])
                if not _equals_previous(np.sort(records["hash"])).any():
                    seen = records
                    continue
                # The sort is stable: of equal ids, the one seen first stays first.
                records = records[np.lexsort((records["check"], records["hash"]))]
                is_repeat = _equals_previous(records["hash"]) & _equals_previous(records["check"])
                seen = records[~is_repeat]
                firsts = seen["row"][np.cumsum(~is_repeat) - 1][is_repeat]
                rows = records["row"][is_repeat]
                shown = np.argsort(rows, kind="stable")[:most]
                yield len(rows), [Repeat(int(rows[at]), int(firsts[at])) for at in shown]


def hash_ids(ids: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent hashes of each id's bytes, ``[n]`` uint64 each. The loop runs over the words of an id."""
    offsets = np.frombuffer(ids.buffers()[1], dtype=np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    padded = np.append(data, np.zeros(_WORD, np.uint8))
    words = np.ndarray(len(data) + 1, dtype="<u8", buffer=padded, strides=(1,))  # the word that begins at each byte
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    hashes = lengths.astype(np.uint64) * _HASH_FACTOR
    checks = lengths.astype(np.uint64) * _CHECK_FACTOR
    for begin in range(0, int(lengths.max(initial=0)), _WORD):
        alive = np.flatnonzero(lengths > begin)
        word = words[starts[alive] + begin] & _WORD_MASKS[np.minimum(lengths[alive] - begin, _WORD)]
        hashes[alive] = _mixed((hashes[alive] ^ word) * _HASH_FACTOR)
        checks[alive] = _mixed((checks[alive] + word) * _CHECK_FACTOR)
    return hashes, checks


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix the high bits of products into their low bits, which are mixed badly."""
    return values ^ (values >> np.uint64(32))


def _equals_previous(values: np.ndarray) -> np.ndarray:
    """Boolean ``[n]``: whether each value equals the one before it."""
    return np.concatenate([[False], values[1:] == values[:-1]])
