"""Croissant (MLCommons) metadata of an export: its files, and the columns of its rows."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from vcf_batch.commands.export.record import ExportRecord
from vcf_batch.commands.export.shard_files import PICTURE
from vcf_batch.manifest.carried import is_list, is_string
from vcf_batch.output_columns import COLUMNS

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context of Croissant 1.0, as its documents begin."""

_ROWS, _TARS, _SAMPLES = "rows", "tars", "samples"

_SPLIT = "split"
"""Name of the field with the split of a row. A column of this name has none: names of fields are there once."""


def describe(record: ExportRecord, schema: pa.Schema) -> bytes:
    """The document, as indented UTF-8 JSON. Columns of objects are left out, as readers of Croissant lack them.

    Args:
        record: the export.
        schema: columns of its parquets.
    """
    files = [_file_set(_ROWS, record, "parquet", "application/x-parquet")]
    if "tar" in record.kinds:
        files.append(_file_set(_TARS, record, "tar", "application/x-tar"))
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": record.name,
        "description": f"{record.rows:,} synthetic images with their prompts, made with vcf-batch and selected by it.",
        "version": "1.0.0",
        "identifier": record.fingerprint,
        "distribution": files,
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": _SAMPLES,
                "name": _SAMPLES,
                "key": {"@id": f"{_SAMPLES}/key"},
                "field": [_split(), *_fields(record, schema)],
            }
        ],
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _file_set(name: str, record: ExportRecord, ending: str, format: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "encodingFormat": format,
        "includes": [f"{split}/*.{ending}" for split in record.splits],
    }


def _split() -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{_SAMPLES}/{_SPLIT}",
        "name": _SPLIT,
        "description": "The split of the row, which is the folder of its file.",
        "dataType": "sc:Text",
        "source": {
            "fileSet": {"@id": _ROWS},
            "extract": {"fileProperty": "fullpath"},
            "transform": {"regex": "^([^/]+)/.*$"},
        },
    }


def _fields(record: ExportRecord, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    meanings = {**{name: column.meaning for name, column in COLUMNS.items()}, **record.meanings}
    for column in schema:
        repeated = is_list(column.type)
        own = column.type.value_type if repeated else column.type
        kind = "sc:ImageObject" if own == PICTURE else _kind(own)
        if kind is None or column.name == _SPLIT:
            continue
        other = "The image." if kind == "sc:ImageObject" else "From the manifest."
        yield {
            "@type": "cr:Field",
            "@id": f"{_SAMPLES}/{column.name}",
            "name": column.name,
            "description": meanings.get(column.name, other),
            "dataType": kind,
            **({"repeated": True} if repeated else {}),
            "source": {
                "fileSet": {"@id": _ROWS},
                "extract": {"column": column.name},
                **({"transform": {"jsonPath": "bytes"}} if kind == "sc:ImageObject" else {}),
            },
        }


def _kind(kind: pa.DataType) -> str | None:
    """The type of a value in the words of schema.org; None if it has none."""
    if is_string(kind):
        return "sc:Text"
    if pt.is_boolean(kind):
        return "sc:Boolean"
    if pt.is_integer(kind):
        return "sc:Integer"
    if pt.is_floating(kind):
        return "sc:Float"
    return "sc:Date" if pt.is_date(kind) or pt.is_timestamp(kind) else None
