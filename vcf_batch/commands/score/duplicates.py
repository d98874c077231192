"""``score --with duplicates``: the rows of an output whose image, or whose reference, an earlier row has too.

The search goes over all finished shards in one process. Its values are committed shard by shard, each with a receipt
that names the shards that were searched. So they count as absent once one of these has changed or one more is finished,
and a call that was interrupted searches again and commits what is missing.
"""

import functools
import hashlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
from pyarrow.types import is_string as is_text

from vcf_batch.commands.export.references import REMEMBERED
from vcf_batch.commands.export.sources import REFERENCE_HASH
from vcf_batch.commands.score import near_duplicates
from vcf_batch.commands.score.calibrating import require_manifest
from vcf_batch.commands.score.scoring import Added, refuse_repeated
from vcf_batch.errors import DamageFound, RowError, UsageError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.output import lease, shards
from vcf_batch.output.lease import Lease
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged
from vcf_batch.output.scores.definition import ScoreColumn, ScoreDefinition
from vcf_batch.output.scores.receipt import ScoreReceipt, among
from vcf_batch.output.scores.store import ScoreStore, parquet_bytes
from vcf_batch.output.shards import side_by_side
from vcf_batch.pool.signals import Signals
from vcf_batch.records import FileEntry, Reference, Row, Shard

By = Literal["phash"]
BYS: tuple[By, ...] = get_args(By)

DISTANCE = 4
"""Bits that near-duplicates may differ in, unless another number is asked for."""

REFERENCE_PHASH = "reference_phash"
"""Column with the perceptual hash of a row's reference, which a manifest may carry."""

_DUPLICATE_OF = "Key of the first row that stays and whose image this one is a near-duplicate of; null if it stays."
_REFERENCE_DUPLICATE_OF = (
    "Key of the first row with the same reference; null for the first one, and without a reference."
)


@dataclass(frozen=True)
class Search:
    """How duplicates are searched.

    Args:
        name: name of the score.
        by: ``phash``, the column of that name.
        distance: largest number of bits in which duplicates differ, 0 to
            :data:`vcf_batch.commands.score.near_duplicates.MAX_DISTANCE`.

    Raises:
        UsageError: there is no such way, or the distance is out of range.
    """

    name: str
    by: str = "phash"
    distance: float = DISTANCE

    def __post_init__(self) -> None:
        if self.by not in BYS:
            raise UsageError(f"--by {self.by} is none of {', '.join(BYS)}")
        if self.distance != int(self.distance) or not 0 <= self.distance <= near_duplicates.MAX_DISTANCE:
            raise UsageError(
                f"--threshold {self.distance:g} is no number of bits: give 0 to {near_duplicates.MAX_DISTANCE} of the "
                f"{near_duplicates.BITS} bits of a hash"
            )

    def definition(self, columns: Mapping[str, pa.DataType]) -> ScoreDefinition:
        """The definition of the score in an output with these columns."""
        fields = {
            "kind": "duplicates",
            "by": self.by,
            "distance": int(self.distance),
            "references": "phash" if is_text(columns.get(REFERENCE_PHASH, pa.null())) else "sha256",
        }
        prefix = "" if self.name == "duplicates" else f"{self.name}_"
        own = (
            ScoreColumn(f"{prefix}duplicate_of", _DUPLICATE_OF, type="key"),
            ScoreColumn(f"{prefix}reference_duplicate_of", _REFERENCE_DUPLICATE_OF, type="key"),
        )
        return ScoreDefinition(self.name, fields, {}, own)


def add(output: Output, search: Search) -> Added:
    """Search the finished shards of an output for duplicates, and commit the files of those that lack the score.

    Memory is about 170 bytes a row, with keys of nine digits, and 200 for each different reference.

    Args:
        output: the output. No byte of its own files changes.
        search: how duplicates are searched.

    Raises:
        UsageError: a column has the name of another one, or the manifest, which names the references, is not there.
        RefusedError: a score of this name is there by other settings, or another run owns the output.
        DamageFound: a parquet or the definition of a score is damaged.
        StorageError: the storage failed; what is finished is kept.
        Interrupted: Ctrl-C or SIGTERM. Rerunning goes on.
    """
    with Signals() as signals:
        signals.hold()
        with lease.hold(output.url) as held:
            store, added = ScoreStore(output.url), Added([])
            finished = [*_finished(output, added)]
            columns = _columns(output, finished)
            definition = store.claim(search.definition(columns), publish=False)
            refuse_repeated(output, store, [definition])
            added.scores = [definition]
            searched = among((shard.name, parquet_hash) for shard, parquet_hash in finished)
            committing = _SearchCommits(store, definition, held, searched)
            if lacking := [each for each in finished if not committing.has(*each)]:
                found = _SearchedRows(definition)
                read = functools.partial(_read, output, definition, _ReferenceTokens(output), columns)
                for shard, part in side_by_side(read, (shard for shard, _ in finished)):
                    signals.check()
                    found.add(shard, part)
                found.search()
                store.claim(definition)
                for shard, parquet_hash in lacking:
                    signals.check()
                    committing.commit(shard, parquet_hash, found)
                added.scored, added.without, added.reason = len(lacking), found.without, found.reason
            added.notes = [_told(definition, committing.counts)]
    return added


def _told(definition: ScoreDefinition, counts: Mapping[str, int]) -> str:
    """What was found, in words."""
    images, references = (counts[column.name] for column in definition.columns)
    near = f"by phash within {definition.fields['distance']} bits"
    same = near if definition.fields["references"] == "phash" else "by SHA-256, so exactly"
    return (
        f"{images:,} images are near-duplicates of an earlier one, {near}; {references:,} rows have the reference of "
        f"an earlier one, {same}"
    )


def _finished(output: Output, added: Added) -> Iterator[tuple[Shard, str]]:
    """The finished shards, each with the hash of its parquet; the others are counted."""
    for found in output.examine():
        if isinstance(found, Damaged):
            added.damaged += 1
        else:
            added.shards += 1
            yield found.shard, found.parquet_hash
    added.unfinished = len(output.plan) - added.shards - added.damaged


def _columns(output: Output, finished: Sequence[tuple[Shard, str]]) -> dict[str, pa.DataType]:
    """The columns of the output's parquets, with their types."""
    if not finished:
        raise UsageError(f"{output.url} has no finished shard to score; generate into it first")
    with shards.open_parquet(shards.file_url(output.url, finished[0][0], "parquet")) as parquet:
        return {field.name: field.type for field in parquet.schema_arrow}


class _SearchCommits:
    """The commits of a search."""

    def __init__(self, store: ScoreStore, definition: ScoreDefinition, held: Lease, searched: str) -> None:
        self._store, self._definition, self._held, self._searched = store, definition, held, searched
        self._begin = time.monotonic()
        self.counts: Counter[str] = Counter()
        """Number of rows that are duplicates, by column."""

    def has(self, shard: Shard, parquet_hash: str) -> bool:
        """Whether a shard has its values of this very search."""
        found = self._store.found(self._definition, shard, parquet_hash)
        if not isinstance(found, ScoreReceipt) or found.among != self._searched:
            return False
        self.counts.update(found.counts)
        return True

    def commit(self, shard: Shard, parquet_hash: str, found: "_SearchedRows") -> None:
        """Commit the values of a shard's rows."""
        keys, values = found.of(shard)
        data = parquet_bytes(self._definition, keys, values)
        without, reason = found.errors.get(shard.index, (0, None))
        receipt = ScoreReceipt(
            shard=shard,
            of=parquet_hash,
            fingerprint=self._definition.fingerprint,
            fields=self._definition.fields,
            parquet=FileEntry(len(data), hashlib.sha256(data).hexdigest()),
            counts={name: len(column) - column.count(None) for name, column in values.items()},
            means={},
            without=without,
            reason=reason,
            timings={
                "total": round(time.monotonic() - self._begin, 3),
                "worker": f"{socket.gethostname()}:{os.getpid()}",
            },
            among=self._searched,
        )
        self._held.confirm()
        self._store.commit(self._definition, data, receipt)
        self.counts.update(receipt.counts)


class _SearchedShard(NamedTuple):
    """What the search reads of a shard."""

    keys: pa.Array
    """Keys of all rows."""
    succeeded: np.ndarray
    """``[n]`` bool: whether a row has an image."""
    hashes: np.ndarray
    """``[m]`` uint64: the hash of each image."""
    references: Sequence[bytes | None]
    """What tells the reference of each image from others; None without one."""
    errors: Sequence[str]
    """Why references cannot be read."""


class _SearchedRows:
    """The rows of a search, and what it has found.

    Args:
        definition: the search.
    """

    def __init__(self, definition: ScoreDefinition) -> None:
        self.without = 0
        """Number of rows whose reference cannot be read."""
        self.reason: str | None = None
        """Why the first of them cannot."""
        self.errors: dict[int, tuple[int, str]] = {}
        """The same for each shard with such a row, by its index."""
        self._distance = int(definition.fields["distance"])
        self._by_phash = definition.fields["references"] == "phash"
        self._names = [column.name for column in definition.columns]
        self._parts: list[tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]] = []
        self._begins: dict[int, int] = {}
        self._rows = 0
        self._numbers: dict[bytes, int] = {}
        """A number for each reference, where they are compared byte for byte."""

    def add(self, shard: Shard, part: _SearchedShard) -> None:
        """Add the rows of a shard, which comes behind those before it."""
        self._begins[shard.index] = self._rows
        places = (self._rows + np.flatnonzero(part.succeeded)).astype(np.int32)
        referring = np.array([token is not None for token in part.references], bool)
        tokens = np.array([self._value(token) for token in part.references], np.uint64)
        self._parts.append((part.keys.cast(pa.large_string()), places, part.hashes, np.stack([tokens, referring])))
        self._rows += len(part.keys)
        if part.errors:
            self.without += len(part.errors)
            self.reason = self.reason or part.errors[0]
            self.errors[shard.index] = len(part.errors), part.errors[0]

    def _value(self, token: bytes | None) -> int:
        if token is None:
            return 0
        return int.from_bytes(token) if self._by_phash else self._numbers.setdefault(token, len(self._numbers))

    def search(self) -> None:
        """Search all rows that were added.

        Raises:
            UsageError: there are more than :data:`vcf_batch.commands.score.near_duplicates.MOST_ROWS` of them.
        """
        keys, places, hashes, tokens = zip(*self._parts, strict=True)
        self._parts.clear()
        self._keys = pa.concat_arrays(keys)
        rows = np.concatenate(places)
        values, referring = np.concatenate(tokens, axis=1)
        among = referring.astype(bool)
        self._firsts = [
            self._first_rows(rows, np.concatenate(hashes), self._distance),
            self._first_rows(rows[among], values[among], self._distance if self._by_phash else 0),
        ]

    def _first_rows(self, rows: np.ndarray, hashes: np.ndarray, distance: int) -> np.ndarray:
        """For each row the row that it is a duplicate of, ``[n]`` int32; -1 if it is none."""
        found = np.full(self._rows, -1, np.int32)
        firsts = rows[near_duplicates.first_alike(hashes, distance)]
        found[rows] = np.where(firsts == rows, -1, firsts)
        return found

    def of(self, shard: Shard) -> tuple[list[str], dict[str, list[str | None]]]:
        """The keys of a shard's rows, and the values of each column."""
        begin = self._begins[shard.index]
        values = {}
        for name, firsts in zip(self._names, self._firsts, strict=True):
            own = firsts[begin : begin + len(shard)]
            values[name] = self._keys.take(pa.array(own, mask=own < 0)).to_pylist()
        return self._keys.slice(begin, len(shard)).to_pylist(), values


def _read(
    output: Output, definition: ScoreDefinition, references: "_ReferenceTokens", columns: Iterable[str], shard: Shard
) -> _SearchedShard:
    """Read what the search needs of a shard.

    Raises:
        UsageError: a hash is none, or the manifest is needed and not there.
        DamageFound: the parquet cannot be read.
        StorageError: the storage failed.
    """
    by_phash = definition.fields["references"] == "phash"
    column = REFERENCE_PHASH if by_phash else REFERENCE_HASH
    wanted = ["key", "status", "phash", "reference", *([column] if column in columns else [])]
    name = shards.file_name(shard, "parquet")
    try:
        with shards.open_parquet(shards.file_url(output.url, shard, "parquet")) as parquet:
            table = parquet.read(wanted, use_threads=False)
        succeeded = np.array([status == "success" for status in table["status"].to_pylist()], bool)
        images = table.filter(pa.array(succeeded))
        hashes = np.array([int(value, 16) for value in images["phash"].to_pylist()], np.uint64)
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamageFound(f"{name} of {output.url} cannot be read: {told}; see 'vcf-batch verify'") from error
    if len(table) != len(shard):
        raise DamageFound(f"{name} of {output.url} has {len(table)} rows, its receipt says {len(shard)}")
    given = images[column].to_pylist() if column in table.column_names else [None] * len(images)
    keys, names = images["key"].to_pylist(), images["reference"].to_pylist()
    errors: Sequence[str] = ()
    if by_phash:
        tokens = [_phash(key, value) for key, value in zip(keys, given, strict=True)]
    else:
        tokens, errors = references.tokens(shard, keys, names, given)
    return _SearchedShard(table["key"].combine_chunks(), succeeded, hashes, tokens, errors)


def _phash(key: str, value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        token = bytes.fromhex(value)
    except ValueError:
        token = b""
    if len(token) != near_duplicates.BITS // 8:
        raise UsageError(
            f"{REFERENCE_PHASH} of row {key!r} is {value[:40]!r}; it must be 16 hex digits, or null. Mend the "
            "manifest, or rename the column, for a new run"
        )
    return token


class _ReferenceTokens:
    """What tells references apart: the SHA-256 of their bytes. Threads may share it.

    Args:
        output: the output. Its manifest is needed for references whose hashes are in no column.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._reader: ReferenceReader | None = None
        self._remembered = functools.lru_cache(REMEMBERED)(self._digest)

    def tokens(
        self, shard: Shard, keys: Sequence[str], names: Sequence[Any], given: Sequence[Any]
    ) -> tuple[list[bytes | None], list[str]]:
        """The hash of the reference of each image; of several references, their hashes one behind the other.

        Args:
            shard: the shard of the images.
            keys: their keys.
            names: their column ``reference``.
            given: their column :data:`REFERENCE_HASH`.

        Returns:
            The hashes, None without a reference, and why references cannot be read.

        Raises:
            UsageError: the manifest is needed, and cannot be read.
            StorageError: the storage failed.
        """
        found: dict[str, bytes | None] = {}
        unknown: set[str] = set()
        for key, name, value in zip(keys, names, given, strict=True):
            hashes = [value] if isinstance(value, str) else value or [None]
            if not name:
                found[key] = None
            elif all(hashes):
                found[key] = b"".join(map(bytes.fromhex, hashes))
            else:
                unknown.add(key)
        errors: list[str] = []
        for row in self._rows(shard) if unknown else ():
            if row.key in unknown:
                try:
                    found[row.key] = b"".join(map(self._hash, row.references))
                except RowError as error:
                    found[row.key] = None
                    errors.append(f"{row.key}: {error}")
        return [found.get(key) for key in keys], errors

    def _rows(self, shard: Shard) -> Iterator[Row]:
        with self._lock:
            if self._reader is None:
                require_manifest(self._output)
                config, base = self._output.config, self._output.need_manifest().base
                self._reader = ReferenceReader(base, config.reference_root, config.max_pixels)
        return self._output.manifest_rows(shard.start, shard.stop)

    def _hash(self, reference: Reference) -> bytes:
        if reference.sha256:
            return bytes.fromhex(reference.sha256)
        return self._digest(reference) if reference.data is not None else self._remembered(reference)

    def _digest(self, reference: Reference) -> bytes:
        assert self._reader
        return hashlib.sha256(self._reader.read_bytes(reference)).digest()
