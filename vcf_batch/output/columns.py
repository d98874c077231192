"""The columns of a shard's parquet, and the way of a sample into a row and back."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from vcf_batch.errors import printable, redact
from vcf_batch.output.row_json import finite
from vcf_batch.records import OUTPUT_COLUMNS, SCORES, Draw, Objective, Row, Sample, Scores

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
    "pno_objective": pa.struct(
        {"first": pa.float64(), "best": pa.float64(), "steps": pa.int32(), "stopped": pa.bool_()}
    ),
    "width": pa.int32(),
    "height": pa.int32(),
    **dict.fromkeys(SCORES, pa.float64()),
    "nsfw": pa.bool_(),
    "attempts": pa.list_(pa.struct({"seed": pa.int64(), **dict.fromkeys(SCORES, pa.float64()), "nsfw": pa.bool_()})),
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


def record_of(sample: Sample, carried: Iterable[str], reference_is_list: bool) -> dict[str, Any]:
    """The row of a sample, by its columns. Scores that are not finite are null.

    Args:
        sample: of a row of the manifest.
        carried: names of the carried columns.
        reference_is_list: see :func:`schema`.
    """
    return {
        **of_manifest(sample.row, carried, reference_is_list),
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


def of_manifest(row: Row, carried: Iterable[str], reference_is_list: bool) -> dict[str, Any]:
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
        attempts=tuple(Draw(each["seed"], _scores(each), each["nsfw"]) for each in record["attempts"] or ()),
    )


def _finite(scores: Scores) -> dict[str, float | None]:
    return {name: finite(getattr(scores, name)) for name in SCORES}


def _scores(record: Mapping[str, Any]) -> Scores:
    return Scores(**{name: record[name] for name in SCORES})
