"""The schema of a shard's parquet; a sample as a row of it, and back."""

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from vcf_batch.errors import printable, redact_name
from vcf_batch.output.row_json import finite
from vcf_batch.output_columns import COLUMNS, SETTINGS, Extra, columns_of
from vcf_batch.records import SCORES, TEXTURE, Draw, Objective, Reference, Row, Sample, Scores


def schema(carried_schema: pa.Schema, reference_is_list: bool, extras: Collection[Extra | None] = ()) -> pa.Schema:
    """The schema of a shard's parquet: :func:`~vcf_batch.output_columns.columns_of`, then the carried columns.

    Args:
        carried_schema: columns that the manifest hands through. Its metadata is left out.
        reference_is_list: ``reference`` is a list of strings, as in the manifest, rather than a string.
        extras: see :func:`~vcf_batch.output_columns.columns_of`.

    Raises:
        ValueError: a carried column has the name of an output column.
    """
    if taken := [name for name in carried_schema.names if name in COLUMNS]:
        raise ValueError(f"carried columns {taken} have names of output columns; rename them in the manifest")
    types = {name: column.type for name, column in columns_of(extras).items()}
    if reference_is_list:
        types["reference"] = pa.list_(types["reference"])
    return pa.schema(
        [pa.field(*each) for each in types.items()]
        + [field.with_nullable(True).remove_metadata() for field in carried_schema]
    )


def record_of(
    sample: Sample, carried: Iterable[str], reference_is_list: bool, reference_is_web: bool = False
) -> dict[str, Any]:
    """The row of a sample, by its columns. Scores that are not finite are null.

    Args:
        sample: of a row of the manifest.
        carried: names of the carried columns.
        reference_is_list: see :func:`schema`.
        reference_is_web: see :func:`of_manifest`.
    """
    return {
        **of_manifest(sample.row, carried, reference_is_list, reference_is_web),
        "status": sample.status,
        "error_message": sample.error_message and printable(sample.error_message),
        **{name: sample.settings.get(name) for name in SETTINGS},
        "lora_sha256": sample.lora_sha256 and [*sample.lora_sha256],
        "prompt_tokens": sample.prompt_tokens,
        "prompt_truncated": sample.prompt_truncated,
        "pno_objective": sample.pno_objective and dataclasses.asdict(sample.pno_objective),
        "width": sample.width,
        "height": sample.height,
        "sha256": None if sample.image is None else hashlib.sha256(sample.image).hexdigest(),
        "phash": sample.phash,
        **_finite(sample.scores),
        TEXTURE: finite(sample.scores.texture_similarity),
        "nsfw": sample.nsfw,
        "attempts": [{"seed": each.seed, **_finite(each.scores), "nsfw": each.nsfw} for each in sample.attempts]
        or None,
    }


def of_manifest(
    row: Row, carried: Iterable[str], reference_is_list: bool, reference_is_web: bool = False
) -> dict[str, Any]:
    """The columns that the manifest alone decides, for one row. References are named without their secrets.

    Args:
        carried: names of the carried columns.
        reference_is_list: see :func:`schema`.
        reference_is_web: see :attr:`vcf_batch.manifest.manifest.Manifest.reference_is_web`.
    """

    def named(reference: Reference | None) -> str | None:
        return None if reference is None else redact_name(reference.name, reference_is_web)

    names = [named(reference) for reference in row.references]
    return {
        "key": row.key,
        "prompt": row.prompt,
        "reference": (names or None) if reference_is_list else next(iter(names), None),
        "reference_masks": [*map(named, row.masks)] or None,
        "negative_reference": named(row.negative_reference),
        **{name: row.carried.get(name) for name in carried},
    }


def sample_of(
    row: Row, record: Mapping[str, Any], image: bytes | None, triplet: Mapping[str, bytes] = MappingProxyType({})
) -> Sample:
    """The sample that a committed shard has of a row: a :class:`ShardWriter` makes the same bytes of it again.

    Args:
        row: of the manifest.
        record: the row of the parquet, with every one of :func:`~vcf_batch.output_columns.columns_of` at least.
        image: the member of the tar, if there is one.
        triplet: the images beside it, by :data:`vcf_batch.records.TRIPLET`.
    """
    objective = record["pno_objective"]
    return Sample(
        row=row,
        status=record["status"],
        settings={name: record.get(name) for name in SETTINGS},
        image=image,
        triplet=triplet,
        width=record["width"],
        height=record["height"],
        phash=record["phash"],
        scores=dataclasses.replace(_scores(record), texture_similarity=record.get(TEXTURE)),
        error_message=record["error_message"],
        pno_objective=objective and Objective(**objective),
        nsfw=record["nsfw"],
        lora_sha256=tuple(record.get("lora_sha256") or ()) or None,
        prompt_tokens=record["prompt_tokens"],
        prompt_truncated=record["prompt_truncated"],
        attempts=tuple(Draw(each["seed"], _scores(each), each["nsfw"]) for each in record["attempts"] or ()),
    )


def _finite(scores: Scores) -> dict[str, float | None]:
    return {name: finite(getattr(scores, name)) for name in SCORES}


def _scores(record: Mapping[str, Any]) -> Scores:
    return Scores(**{name: record[name] for name in SCORES})
