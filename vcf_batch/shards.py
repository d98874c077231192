"""One shard's files: write them, and read them back. :mod:`vcf_batch.commits` has what lies between.

A shard is ``NAME.tar`` (the successful samples, for WebDataset readers), ``NAME.parquet`` (one row for every manifest
row) and ``NAME_stats.json``, the receipt (:mod:`vcf_batch.receipts`). A worker writes the first two in local scratch
(:class:`ShardWriter`).

The bytes of tar and parquet depend on the samples alone: no times, owners or host names, fixed encoder settings, and
groups of :data:`ROWS_PER_GROUP` rows in manifest order. (The parquet names the pyarrow version that wrote it.)
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch import storage
from vcf_batch.errors import StorageError, printable, redact
from vcf_batch.records import (
    OUTPUT_COLUMNS,
    SCORE_STEP,
    STATUSES,
    Attempt,
    FileEntry,
    Objective,
    Row,
    Sample,
    Scores,
    Shard,
    Status,
)
from vcf_batch.row_json import finite, row_json

SUFFIXES: Mapping[str, str] = {"tar": ".tar", "parquet": ".parquet"}
"""What follows the shard's name in the names of its files, by their name in :attr:`Receipt.files`."""
ROWS_PER_GROUP = 1024
ROWS_AT_ONCE = 256
"""Rows that are held at once when a shard is read again."""

_SCORES = tuple(field.name for field in dataclasses.fields(Scores))
_SETTINGS = (
    "seed",
    "reference_weights",
    "negative_prompt",
    "fusion",
    "strength",
    "fusion_lo",
    "fusion_hi",
    "unconditional",
    "image_tokens",
    "guidance_scale",
    "guidance_lo",
    "guidance_hi",
    "deep_cache",
    "steps",
    "scheduler",
    "eta",
    "pno_steps",
)
_NOT_STRINGS = {
    "reference_weights": pa.list_(pa.float64()),
    "seed": pa.int64(),
    "strength": pa.float64(),
    "fusion_lo": pa.float64(),
    "fusion_hi": pa.float64(),
    "guidance_scale": pa.float64(),
    "guidance_lo": pa.float64(),
    "guidance_hi": pa.float64(),
    "deep_cache": pa.int32(),
    "steps": pa.int32(),
    "eta": pa.float64(),
    "pno_steps": pa.int32(),
    "pno_objective": pa.struct({"first": pa.float64(), "best": pa.float64(), "steps": pa.int32()}),
    "width": pa.int32(),
    "height": pa.int32(),
    **dict.fromkeys(_SCORES, pa.float64()),
    "nsfw": pa.bool_(),
    "attempts": pa.list_(pa.struct({"seed": pa.int64(), **dict.fromkeys(_SCORES, pa.float64()), "nsfw": pa.bool_()})),
}


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """A finished shard in local scratch, and what its receipt says about it."""

    tar: str
    """Local path."""
    parquet: str
    """Local path."""
    counts: Mapping[Status, int]
    entries: Mapping[str, FileEntry]
    """``tar`` and ``parquet``."""
    means: Mapping[str, float | None]
    """Mean of each score over the successful samples that have it; None if none has."""
    histograms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """See :attr:`vcf_batch.records.Receipt.histograms`."""
    sampled: int = 0
    """See :attr:`vcf_batch.records.Receipt.sampled`."""


class Tally:
    """Counts of a shard's rows by status, means and histograms of its scores, as the receipt tells them."""

    def __init__(self) -> None:
        self._counts: Counter[Status] = Counter()
        self._scores: dict[str, list[float]] = {name: [] for name in _SCORES}
        self.sampled = 0
        """See :attr:`vcf_batch.records.Receipt.sampled`."""

    def add(self, status: Status, record: Mapping[str, Any]) -> None:
        """Take one row, by its columns."""
        self._counts[status] += 1
        # A row that is rejected before it is sampled has had no attempt.
        self.sampled += status == "success" or (status == "rejected" and bool(record["attempts"]))
        if status == "success":
            for name, found in self._scores.items():
                if record[name] is not None:
                    found.append(record[name])

    @property
    def counts(self) -> dict[Status, int]:
        return {status: self._counts[status] for status in STATUSES}

    @property
    def means(self) -> dict[str, float | None]:
        """Of each score over the successful samples that have it; None if none has."""
        return {name: math.fsum(found) / len(found) if found else None for name, found in self._scores.items()}

    @property
    def histograms(self) -> dict[str, dict[str, int]]:
        """See :attr:`vcf_batch.records.Receipt.histograms`."""
        return {
            name: dict(Counter(f"{math.ceil(score / SCORE_STEP) * SCORE_STEP:.2f}" for score in sorted(found)))
            for name, found in self._scores.items()
        }


def schema(carried_schema: pa.Schema, reference_is_list: bool) -> pa.Schema:
    """The columns of a shard's parquet: :data:`OUTPUT_COLUMNS`, then the carried ones with their types.

    Args:
        carried_schema: columns that the manifest hands through. Its metadata is left out.
        reference_is_list: ``reference`` is a list of strings, as in the manifest, rather than a string.

    Raises:
        ValueError: a carried column has the name of an output column.
    """
    if taken := [name for name in carried_schema.names if name in OUTPUT_COLUMNS]:
        raise ValueError(f"carried columns {taken} have names of output columns; rename them in the manifest")
    types = {**_NOT_STRINGS, "reference": pa.list_(pa.string()) if reference_is_list else pa.string()}
    own = [pa.field(name, types.get(name, pa.string())) for name in OUTPUT_COLUMNS]
    return pa.schema(own + [field.with_nullable(True).remove_metadata() for field in carried_schema])


class ShardWriter:
    """Writes one shard's tar and parquet in local scratch; use it with ``with``.

    Leaving the ``with`` block without :meth:`finish` deletes both files: an abandoned shard leaves nothing that looks
    whole.

    Args:
        scratch_dir: local folder of this attempt alone; made if there is none.
        shard: the rows to be written.
        image_format: extension of the images in the tar: ``png``, ``webp`` or ``jpg``.
        carried_schema: see :func:`schema`.
        reference_is_list: see :func:`schema`.
    """

    def __init__(
        self, scratch_dir: str, shard: Shard, image_format: str, carried_schema: pa.Schema, reference_is_list: bool
    ) -> None:
        self._shard = shard
        self._image_format = image_format
        self._reference_is_list = reference_is_list
        self._schema = schema(carried_schema, reference_is_list)
        self._carried = carried_schema.names
        self._pending: list[dict[str, Any]] = []
        self._added = 0
        self._tally = Tally()
        self._finished = False
        os.makedirs(scratch_dir, exist_ok=True)
        self._paths = {kind: os.path.join(scratch_dir, shard.name + suffix) for kind, suffix in SUFFIXES.items()}
        # PAX equals USTAR but for names over 100 characters, which keys may have.
        self._tar = tarfile.open(self._paths["tar"], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._parquet = pq.ParquetWriter(
            self._paths["parquet"],
            self._schema,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=True,
            write_statistics=True,
            store_schema=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._finished:
            with contextlib.suppress(OSError):
                self._close()
            for path in self._paths.values():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def add(self, sample: Sample) -> None:
        """Append the next row of the shard, in manifest order.

        Args:
            sample: with an image if and only if it succeeded, else with an ``error_message``. Scores that are not
                finite are recorded as null.

        Raises:
            ValueError: the sample is out of order, or breaks the rules above.
            StorageError: the scratch cannot be written.
        """
        expected = self._shard.start + self._added
        if sample.row.number != expected or expected >= self._shard.stop:
            raise ValueError(
                f"shard {self._shard.name} has rows {self._shard.start} to {self._shard.stop - 1} in order: "
                f"expected row {expected}, got {sample.row.number}"
            )
        if (sample.status == "success") != (sample.image is not None):
            raise ValueError(f"sample {sample.row.key}: status {sample.status} with image {sample.image is not None}")
        if sample.status != "success" and not sample.error_message:
            raise ValueError(f"sample {sample.row.key} is {sample.status} without an error_message")
        record = self._record(sample)
        self._tally.add(sample.status, record)
        self._added += 1
        self._pending.append(record)
        with self._writing():
            if sample.image is not None:
                self._add_member(sample.row.key, self._image_format, sample.image)
                for name, image in sample.triplet.items():
                    self._add_member(sample.row.key, f"{name}.{self._image_format}", image)
                self._add_member(sample.row.key, "txt", sample.row.prompt.encode())
                self._add_member(sample.row.key, "json", row_json(self._batch([record])))
            if len(self._pending) == ROWS_PER_GROUP:
                self._flush()

    def finish(self) -> ShardFiles:
        """Close both files and return what they are.

        Raises:
            ValueError: rows of the shard are missing.
            StorageError: the scratch cannot be written or read back.
        """
        if self._added != len(self._shard):
            raise ValueError(f"shard {self._shard.name} has {self._added} of its {len(self._shard)} rows")
        with self._writing():
            self._flush()
            self._close()
        self._finished = True
        return ShardFiles(
            tar=self._paths["tar"],
            parquet=self._paths["parquet"],
            counts=self._tally.counts,
            entries={kind: storage.digest(path) for kind, path in self._paths.items()},
            means=self._tally.means,
            histograms=self._tally.histograms,
            sampled=self._tally.sampled,
        )

    def _record(self, sample: Sample) -> dict[str, Any]:
        return {
            **columns_of(sample.row, self._carried, self._reference_is_list),
            "status": sample.status,
            "error_message": sample.error_message and printable(sample.error_message),
            **{name: sample.settings.get(name) for name in _SETTINGS},
            "pno_objective": sample.pno_objective and dataclasses.asdict(sample.pno_objective),
            "width": sample.width,
            "height": sample.height,
            "sha256": None if sample.image is None else hashlib.sha256(sample.image).hexdigest(),
            "phash": sample.phash,
            **_finite(sample.scores),
            "nsfw": sample.nsfw,
            "attempts": [{"seed": each.seed, **_finite(each.scores), "nsfw": each.nsfw} for each in sample.attempts]
            or None,
        }

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot write the scratch files of shard {self._shard.name}: {error}. "
                "Check that there is room, or set TMPDIR to a larger disk."
            ) from error

    def _add_member(self, key: str, extension: str, data: bytes) -> None:
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        # tarfile remembers every member, which a large shard feels.
        self._tar.getmembers().clear()

    def _flush(self) -> None:
        if self._pending:
            self._parquet.write_batch(self._batch(self._pending))
            self._pending = []

    def _batch(self, records: list[dict[str, Any]]) -> pa.RecordBatch:
        # Made of values: pyarrow joins batches with nested dictionary columns to invalid ones.
        columns = [pa.array([record[field.name] for record in records], field.type) for field in self._schema]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def _close(self) -> None:
        self._tar.close()
        self._parquet.close()


def columns_of(row: Row, carried: Iterable[str], reference_is_list: bool) -> dict[str, Any]:
    """The columns that the manifest alone decides, for one row. References are named without their secrets.

    Args:
        carried: names of the carried columns.
        reference_is_list: see :func:`schema`.
    """
    uris = [reference.uri and redact(reference.uri) for reference in row.references]
    negative = row.negative_reference and row.negative_reference.uri
    return {
        "key": row.key,
        "prompt": row.prompt,
        "reference": (uris or None) if reference_is_list else next(iter(uris), None),
        "negative_reference": negative and redact(negative),
        **{name: row.carried.get(name) for name in carried},
    }


def sample_of(
    row: Row, record: Mapping[str, Any], image: bytes | None, triplet: Mapping[str, bytes] = MappingProxyType({})
) -> Sample:
    """The sample that a committed shard has of a row: a :class:`ShardWriter` makes the same bytes of it again.

    Args:
        row: of the manifest.
        record: the row of the parquet, at least :data:`OUTPUT_COLUMNS`.
        image: the member of the tar, if there is one.
        triplet: the images beside it, by :data:`vcf_batch.records.TRIPLET`.
    """
    objective = record["pno_objective"]
    return Sample(
        row=row,
        status=record["status"],
        settings={name: record[name] for name in _SETTINGS},
        image=image,
        triplet=triplet,
        width=record["width"],
        height=record["height"],
        phash=record["phash"],
        scores=_scores(record),
        error_message=record["error_message"],
        pno_objective=objective and Objective(**objective),
        nsfw=record["nsfw"],
        attempts=tuple(Attempt(each["seed"], _scores(each), each["nsfw"]) for each in record["attempts"] or ()),
    )


def _finite(scores: Scores) -> dict[str, float | None]:
    return {name: finite(getattr(scores, name)) for name in _SCORES}


def _scores(record: Mapping[str, Any]) -> Scores:
    return Scores(**{name: record[name] for name in _SCORES})


def read_samples(tar_url: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard's tar, streamed, as WebDataset readers give them.

    Yields:
        ``{"__key__": key, "png" | "webp" | "jpg": bytes, "txt": prompt, "json": the parquet row}``, and with triplets
        ``"content.png"`` and ``"style.png"``.

    Raises:
        tarfile.ReadError: the file is not a tar, or ends within a member.
        FileNotFoundError, PermissionError, StorageError: it cannot be read.
    """
    with storage.open_read(tar_url) as file:
        for key, parts in itertools.groupby(read_members(file), key=lambda part: part[0].partition(".")[0]):
            sample = {name.partition(".")[2]: data for name, data in parts}
            yield {"__key__": key, **sample, "txt": sample["txt"].decode(), "json": json.loads(sample["json"])}


def read_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member of a tar, streamed. What is not a plain file has no content.

    Raises:
        tarfile.ReadError: the file is not a tar, or ends within a member.
    """
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            content = tar.extractfile(member)
            yield member.name, content.read() if content else b""
            tar.members = []  # type: ignore[attr-defined]
