"""One shard of an export in local scratch: a tar and the parquet of its rows, or a parquet with the images in the rows.

The bytes depend on the rows alone: no times, owners or host names, and fixed encoder settings.
"""

import io
import json
import os
import struct
import tarfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch.manifest.carried import is_list
from vcf_batch.output.row_json import row_json
from vcf_batch.storage.tar import BLOCK

SUFFIXES: Mapping[str, str] = {"tar": ".tar", "index": ".tar.idx", "parquet": ".parquet"}
"""Endings of the names of a shard's files, by their kind."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "webdataset": ("tar", "parquet"),
    "energon": ("tar", "index", "parquet"),
    "parquet": ("parquet",),
}
"""The files of a shard, by the format of its export."""

IMAGE = "image"
"""Name of the image of a row in a parquet, beside ``content`` and ``style``."""

PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""Type of an image in a parquet, as Hugging Face ``datasets`` has it."""

_ROWS_PER_GROUP = 1024
_PICTURES_PER_GROUP = 100
_BYTES_PER_GROUP = 1 << 24


class PackedRow(NamedTuple):
    """A row in the form of its export."""

    record: Mapping[str, Any]
    """Its columns, those of images in a parquet included."""
    members: tuple[tuple[str, bytes], ...]
    """Name and content of its members of a tar; empty in a parquet."""
    bytes: int
    """Number of bytes that it takes, without what a parquet adds to its images and its prompt."""


def pack(
    record: Mapping[str, Any], pictures: Mapping[str, bytes], ending: str, schema: pa.Schema, in_tar: bool
) -> PackedRow:
    """Put a row into the form of its export.

    Args:
        record: its columns.
        pictures: its images by name; its own is :data:`IMAGE`.
        ending: extension of the images.
        schema: types of the columns.
        in_tar: whether the images go into a tar, rather than into the parquet.
    """
    key, prompt = record["key"], record["prompt"].encode()
    named = [(f"{key}{'' if name == IMAGE else '.' + name}.{ending}", name) for name in pictures]
    if in_tar:
        images = ((file, pictures[name]) for file, name in named)
        members = (*images, (f"{key}.txt", prompt), (f"{key}.json", row_json(_batch([record], schema))))
        return PackedRow(record, members, sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in members))
    columns = {name: {"bytes": pictures[name], "path": file} for file, name in named}
    return PackedRow({**record, **columns}, (), sum(map(len, pictures.values())) + len(prompt))


class OpenShard:
    """A shard that rows are added to.

    Args:
        folder: a folder in local scratch for its files alone.
        name: stem of the files' names.
        schema: columns of the rows.
        format: one of :data:`KINDS`.
        images: names of the other images of a row.

    Raises:
        OSError: the scratch cannot be written, here and in all methods.
    """

    def __init__(self, folder: str, name: str, schema: pa.Schema, format: str, images: tuple[str, ...]) -> None:
        self.rows = self.bytes = 0
        self.next = 0
        """Position behind the last row."""
        os.makedirs(folder, exist_ok=True)
        self._paths = {kind: os.path.join(folder, name + SUFFIXES[kind]) for kind in KINDS[format]}
        self._tar: tarfile.TarFile | None = None
        if "tar" in self._paths:
            self._tar = tarfile.open(self._paths["tar"], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._places: list[int] = []
        self._schema = schema if self._tar else with_pictures(schema, images)
        self._pending: list[Mapping[str, Any]] = []
        self._pending_bytes = 0
        self._parquet = _writer(self._paths["parquet"], self._schema, () if self._tar else (IMAGE, *images))

    def add(self, row: PackedRow, position: int) -> None:
        """Add the next row, which has a position in the rows of the outputs."""
        self.rows += 1
        self.bytes += row.bytes
        self.next = position + 1
        if self._tar:
            self._places.append(self._tar.offset)
            for name, data in row.members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                self._tar.addfile(member, io.BytesIO(data))
                # tarfile remembers every member, which a large shard feels.
                self._tar.getmembers().clear()
        else:
            self._pending_bytes += row.bytes
        self._pending.append(row.record)
        most = _ROWS_PER_GROUP if self._tar else _PICTURES_PER_GROUP
        if len(self._pending) == most or self._pending_bytes >= _BYTES_PER_GROUP:
            self._flush()

    def finish(self) -> Mapping[str, str]:
        """Close the files; their paths by kind."""
        self._flush()
        self._parquet.close()
        if self._tar:
            self._places.append(self._tar.offset)
            self._tar.close()
        if "index" in self._paths:
            with open(self._paths["index"], "wb") as file:
                file.write(index_of(self._places))
        return self._paths

    def _flush(self) -> None:
        if self._pending:
            self._parquet.write_batch(_batch(self._pending, self._schema))
            self._pending, self._pending_bytes = [], 0


def index_of(places: list[int]) -> bytes:
    """The index of a tar as Energon has it: where each sample begins, and where the last one ends."""
    return struct.pack(f"<{len(places)}Q", *places)


def with_pictures(schema: pa.Schema, images: tuple[str, ...]) -> pa.Schema:
    """The columns with those of the images before them, and the mark by which ``datasets`` knows images."""
    fields = [pa.field(name, PICTURE) for name in (IMAGE, *images)]
    features = {field.name: {"_type": "Image"} for field in fields}
    mark = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([*fields, *schema], metadata=mark)


def _writer(path: str, schema: pa.Schema, images: tuple[str, ...]) -> pq.ParquetWriter:
    # The bytes of images are not worth statistics, a dictionary or compression.
    told = [path for field in schema if field.name not in images for path in _leaves(field.name, field.type)]
    return pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        data_page_version="1.0",
        compression={
            **dict.fromkeys(told, "zstd"),
            **{f"{name}.{part}": "none" for name in images for part in ("bytes", "path")},
        },
        compression_level=dict.fromkeys(told, 3),
        use_dictionary=told,
        write_statistics=told,
        write_page_index=True,
        store_schema=True,
    )


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    """The paths of a column's values in a parquet."""
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    if pa.types.is_map(kind):
        inner = (("key", kind.key_type), ("value", kind.item_type))
        return [leaf for name, each in inner for leaf in _leaves(f"{path}.key_value.{name}", each)]
    if is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [path]


def _batch(records: list[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    # Made of values: pyarrow joins batches with nested dictionary columns to invalid ones.
    columns = [pa.array([record[field.name] for record in records], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
