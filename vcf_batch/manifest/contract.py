"""The manifest's columns and their types, and the conversion of Arrow batches to rows."""

import dataclasses
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from vcf_batch import output_columns, sharding
from vcf_batch.config.limits import FUSIONS, MAX_GUIDANCE_SCALE, MAX_PNO_STEPS, MAX_SEED, MAX_STRENGTH, ROLES
from vcf_batch.config.strengths import reference_shares
from vcf_batch.errors import ManifestError, RowError, UsageError
from vcf_batch.manifest import carried as carrying
from vcf_batch.manifest import columns as naming
from vcf_batch.manifest.carried import is_image, is_list, is_number, is_text, plain
from vcf_batch.manifest.columns import HASH_COLUMNS, MANIFEST_COLUMNS, cut, shown
from vcf_batch.records import MAX_LORAS, OVERRIDES, Lora, Reference, Row, parse_lora

MAX_TEXT_BYTES = 100_000
"""Longest prompt, negative prompt or reference; a longer one fails its row."""
MAX_CARRIED_BYTES = 1_000_000
"""Most bytes of all carried columns of a row together; more fail the row."""
MAX_REFERENCES = 16
"""Most references of a row."""
SAFE_ID = "[A-Za-z0-9_-]{1,128}"
_SHA256 = re.compile("[0-9A-Fa-f]{64}")

_NUMBERS = {"guidance_scale": MAX_GUIDANCE_SCALE, "strength": MAX_STRENGTH, "fusion_lo": 1.0, "fusion_hi": 1.0}
"""Numeric overrides, and the largest value of each; the smallest is 0."""
_PROBLEMS_SHOWN = 10
_REFERENCE_TYPES = "string, struct<bytes: binary, path: string>, or a list of either"


_OTHER_CASE = {name.casefold(): name for name in output_columns.COLUMNS if name not in MANIFEST_COLUMNS}
"""Names of columns of the outputs alone, by how readers see them that do not heed case."""


def check_schema(
    file: str,
    schema: pa.Schema,
    first_file: str,
    first_schema: pa.Schema,
    mapped: Mapping[str, str] = MappingProxyType({}),
    carry: Sequence[str] = (),
) -> None:
    """Check one file's columns against the contract, and against the manifest's first file.

    Args:
        mapped, carry: see :func:`vcf_batch.manifest.columns.problems`.

    Raises:
        ManifestError: one error that lists every problem, with file, column, actual and required type.
    """
    names = schema.names
    problems = [f"column {shown(name)} occurs {count} times" for name, count in Counter(names).items() if count > 1]
    problems += naming.problems(names, mapped, carry)
    meanings = {column: name for name, column in mapped.items()}
    for field in schema:
        if mapped.get(field.name, field.name) != field.name:
            continue  # another column is read in its place
        meaning = meanings.get(field.name, field.name)
        name, is_ours = shown(field.name), meaning in MANIFEST_COLUMNS
        if expected := _expected_type(meaning, field.type):
            problems.append(f"column {name} is {cut(str(field.type))}; it must be {expected}")
        elif not is_ours and field.name in output_columns.COLUMNS:
            problems.append(f"column {name} would collide with the output's own; rename it")
        elif not is_ours and field.name not in carry and (own := _OTHER_CASE.get(field.name.casefold())):
            problems.append(
                f"column {name} would be taken for the output's own {own!r} by readers that do not heed case, such as "
                f"DuckDB; rename it, or give --carry {shlex.quote(field.name)}"
            )
        elif not is_ours and (obstacle := carrying.not_carried(plain(field.type))):
            problems.append(
                f"column {name} {obstacle}, which cannot be carried through; change its type or leave it out"
            )
    references = mapped.get("reference", "reference")
    for name, column in HASH_COLUMNS.items():
        column = mapped.get(column, column)
        if not problems and name in names and column in names:
            kinds = [_reference_kind(schema.field(each).type) for each in (name, column)]
            if "null" not in kinds and kinds[0] != kinds[1]:
                problems.append(
                    f"column {name!r} is a {kinds[0]}, but {column!r} a {kinds[1]}; give a list of hashes for a list "
                    "of references, else one hash"
                )
    for name in sorted(set(first_schema.names) ^ set(names)):
        here, there = (file, first_file) if name in names else (first_file, file)
        problems.append(f"column {shown(name)} is in {here} but not in {there}; all files need the same columns")
    if not problems and references in names:
        kinds = [_reference_kind(each.field(references).type) for each in (schema, first_schema)]
        if "null" not in kinds and kinds[0] != kinds[1]:
            problems.append(
                f"column {references!r} is a {kinds[0]}, but in {first_file} a {kinds[1]}; make them the same"
            )
    if problems:
        more = [f"and {len(problems) - _PROBLEMS_SHOWN} more"] if len(problems) > _PROBLEMS_SHOWN else []
        lines = [f"\n  {line}" for line in problems[:_PROBLEMS_SHOWN] + more]
        raise ManifestError(f"{file} breaks the manifest contract:{''.join(lines)}")


def has_reference_lists(schema: pa.Schema) -> bool:
    """Whether rows of a checked schema may have several references."""
    return "reference" in schema.names and _reference_kind(schema.field("reference").type) == "list"


def has_embedded_references(schema: pa.Schema) -> bool:
    """Whether rows of a checked schema may have references or their masks as bytes."""
    return any(
        name in schema.names and carrying.holds_bytes(schema.field(name).type)
        for name in ("reference", "reference_masks")
    )


def parse_rows(batch: pa.RecordBatch, first_row: int, run_seed: int, carried: pa.Schema) -> list[Row]:
    """Convert one batch of a manifest's columns to rows.

    Args:
        batch: the manifest's columns among :data:`MANIFEST_COLUMNS`, and the columns of ``carried``.
        first_row: number of the first row in the manifest.
        run_seed: seed of the run; rows without a seed derive theirs from it.
        carried: see :func:`vcf_batch.manifest.carried.carried_schema`.

    Raises:
        ManifestError: a sample id is null or not safe.
    """
    weights = sum((carrying.sizes(batch[name]) for name in carried.names), np.zeros(batch.num_rows, np.int64))
    too_heavy = np.flatnonzero(weights > MAX_CARRIED_BYTES).tolist()
    errors = {at: f"the carried columns have {weights[at]} bytes; the limit is {MAX_CARRIED_BYTES}" for at in too_heavy}
    columns: dict[str, list[Any]] = {}
    kinds = dict(zip(carried.names, carried.types, strict=True))
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind, left_out = kinds.get(name, plain(column.type)), too_heavy
        if name not in kinds:
            lengths = carrying.sizes(column) if is_text(kind) else np.zeros(0)
            left_out = np.flatnonzero(lengths > MAX_TEXT_BYTES).tolist()
            errors = {at: f"{name} has {lengths[at]} bytes; the limit is {MAX_TEXT_BYTES}" for at in left_out} | errors
        columns[name] = carrying.values(name, column, kind, frozenset(left_out), errors)
    rows = []
    for at in range(batch.num_rows):
        values = {name: column[at] for name, column in columns.items()}
        number = first_row + at
        key = values.get("sample_id", numbered_key(number))
        if key is None or not re.fullmatch(SAFE_ID, key):
            raise ManifestError(
                f"column 'sample_id' of row {number} is {shown(key)}, which is not a safe id; an id is 1 to 128 of the "
                "characters A-Z a-z 0-9 _ -"
            )
        prompt, seed, error = values["prompt"] or "", sharding.derive_seed(run_seed, key), errors.get(at)
        references: tuple[Reference, ...] = ()
        negative: tuple[Reference, ...] = ()
        masks: tuple[Reference | None, ...] = ()
        overrides: dict[str, Any] = {}
        try:
            if error is None:
                _check_text("prompt", prompt)
                if not prompt.strip():
                    raise RowError("prompt is empty")
                references = _hashed(parse_references(values.get("reference")), values, "reference_sha256")
                negative = parse_references(values.get("negative_reference"), "negative_reference")
                negative = _hashed(negative, values, "negative_reference_sha256")
                masks = _parse_masks(values.get("reference_masks"), len(references))
                if values.get("seed") is not None:
                    seed = _check_number("seed", values["seed"], MAX_SEED)
                overrides = _parse_overrides(values, len(references))
        except RowError as trouble:
            error = str(trouble)
        rows.append(
            Row(
                number=number,
                key=key,
                prompt=prompt[:MAX_TEXT_BYTES],
                references=references,
                negative_reference=next(iter(negative), None),
                masks=masks,
                seed=seed,
                overrides=overrides,
                carried={name: values[name] for name in carried.names},
                error=error,
            )
        )
    return rows


def numbered_key(number: int) -> str:
    """The key of a row in a manifest without ``sample_id``."""
    return f"{number:09d}"


def parse_references(value: Any, column: str = "reference") -> tuple[Reference, ...]:
    """Convert the value of a column to the references of one row.

    Args:
        value: a URI, a mapping with ``bytes`` and ``path`` as Hugging Face ``datasets`` writes images, a list of
            either, or None for none.
        column: name of the column, for error messages.

    Raises:
        RowError: a reference is null within a list, empty, or not usable as text; or there are too many references.
    """
    if value is None:
        return ()
    if isinstance(value, list):
        if len(value) > MAX_REFERENCES:
            raise RowError(f"{column} has {len(value)} images; the limit is {MAX_REFERENCES}")
        parsed = [parse_references(item, column) for item in value]
        if not all(parsed):
            raise RowError(f"{column} {parsed.index(()) + 1} of {len(parsed)} is null; leave it out of the list")
        return tuple(reference for references in parsed for reference in references)
    record: Mapping[str, Any] = {"path": value} if isinstance(value, str) else value
    uri, data = record.get("path"), record.get("bytes")
    if uri is None and data is None:
        return ()
    _check_text(column, uri or "")
    if not uri and data is None:
        raise RowError(f"{column} is an empty text; use null for none")
    return (Reference(uri=uri or None, data=data),)


def _parse_masks(value: Any, references: int) -> tuple[Reference | None, ...]:
    """The masks of a row that has ``references`` references, None for one that may act everywhere.

    Raises:
        RowError: there is not one value for each reference, or a mask is empty or not usable as text.
    """
    values = value if isinstance(value, list) else [value]
    masks = tuple(next(iter(parse_references(each, "reference_masks")), None) for each in values)
    if not any(masks):
        return ()
    if len(masks) != references:
        raise RowError(
            f"reference_masks has {len(masks)} values for {references} references; give each one mask, or null"
        )
    return masks


def _hashed(references: tuple[Reference, ...], values: Mapping[str, Any], column: str) -> tuple[Reference, ...]:
    """The references of a row with the hashes that a column of :data:`HASH_COLUMNS` gives; null gives none.

    Raises:
        RowError: there is not one hash, or null, for each reference, or a hash is none.
    """
    value = values.get(column)
    if value is None:
        return references
    hashes = value if isinstance(value, list) else [value]
    if len(hashes) != len(references):
        raise RowError(f"{column} has {len(hashes)} hashes for {len(references)} images; give each one hash, or null")
    for sha256 in hashes:
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise RowError(f"{column} is {shown(sha256)}; it must be a SHA-256 in 64 hexadecimal digits, or null")
    return tuple(
        dataclasses.replace(reference, sha256=sha256 and sha256.lower())
        for reference, sha256 in zip(references, hashes, strict=True)
    )


def _expected_type(name: str, kind: pa.DataType) -> str | None:
    """The required type of a column, in words; None if ``kind`` is right."""
    kind = plain(kind, of_uuid=pa.string() if name == "sample_id" else pa.binary(16))
    if name in ("prompt", "sample_id", "negative_prompt", "negative_reference", "negative_reference_sha256", "fusion"):
        return None if is_text(kind) else "string"
    if name in ("seed", "pno_steps"):
        return (
            None
            if pt.is_integer(kind) or pt.is_null(kind)
            else "int64 (in pandas, 'Int64' keeps integers beside nulls)"
        )
    if name in ("guidance_scale", "strength", "fusion_lo", "fusion_hi"):
        return None if is_number(kind) else "a number, such as float64"
    if name == "reference_weights":
        numbers = is_list(kind) and is_number(plain(kind.value_type))
        return None if numbers or pt.is_null(kind) else "a list of numbers, such as list<double>"
    if name == "reference_roles":
        return None if is_text(plain(kind.value_type if is_list(kind) else kind)) else "string, or list<string>"
    if name in ("reference_sha256", "lora"):
        return None if is_text(plain(kind.value_type if is_list(kind) else kind)) else "string, or list<string>"
    if name in ("reference", "reference_masks"):
        item = kind.value_type if is_list(kind) else kind
        return None if is_text(plain(item)) or is_image(item) else _REFERENCE_TYPES
    return None


def _reference_kind(kind: pa.DataType) -> str:
    if is_list(plain(kind)):
        return "list"
    return "null" if pt.is_null(plain(kind)) else "single reference"


def _parse_overrides(values: Mapping[str, Any], references: int) -> dict[str, Any]:
    """The overrides of a row that has ``references`` references; nulls are left out.

    Raises:
        RowError: an override is outside its limits.
    """
    given = {name: values[name] for name in OVERRIDES if values.get(name) is not None}
    if given.get("fusion", FUSIONS[0]) not in FUSIONS:
        raise RowError(f"fusion is {shown(given['fusion'])}; it must be one of {', '.join(FUSIONS)}")
    _check_text("negative_prompt", given.get("negative_prompt", ""))
    for name, high in _NUMBERS.items():
        if name in given:
            given[name] = float(_check_number(name, given[name], high))
    if "pno_steps" in given:
        _check_number("pno_steps", given["pno_steps"], MAX_PNO_STEPS)
    if "reference_weights" in given:
        given["reference_weights"] = _check_weights(given["reference_weights"], references)
    if "reference_roles" in given:
        given["reference_roles"] = _check_roles(given["reference_roles"], references)
    if "lora" in given:
        given["lora"] = parse_loras(given["lora"])
    return given


def parse_loras(given: str | Sequence[str | None]) -> tuple[Lora, ...]:
    """The LoRAs of a row. An empty text, or an empty list, is none.

    Raises:
        RowError: one is null within a list, named twice, or not usable; or there are too many.
    """
    texts = [given] if isinstance(given, str) else list(given)
    if texts == [""]:
        return ()
    if len(texts) > MAX_LORAS:
        raise RowError(f"lora has {len(texts)} values; the limit is {MAX_LORAS}")
    loras: dict[str, Lora] = {}
    for text in texts:
        if text is None:
            raise RowError("lora has a null in its list; leave it out of the list")
        _check_text("lora", text)
        try:
            own = parse_lora(text)
        except UsageError as error:
            raise RowError(str(error)) from error
        if own.source in loras:
            raise RowError(f"lora names {shown(own.source)} twice; give it once, with one scale")
        loras[own.source] = own
    return tuple(loras.values())


def _check_weights(weights: Sequence[float | None], references: int) -> tuple[float, ...]:
    numbers = tuple(math.nan if weight is None else float(weight) for weight in weights)
    try:
        reference_shares(numbers, references)
    except UsageError as error:
        raise RowError(str(error)) from error
    return numbers


def _check_roles(given: str | Sequence[str | None], references: int) -> tuple[str | None, ...]:
    """One role for each reference; None for that of the run."""
    roles = (given,) if isinstance(given, str) else tuple(given)
    for role in roles:
        if role is not None and role not in ROLES:
            raise RowError(f"a role in reference_roles is {shown(role)}; it must be one of {', '.join(ROLES)}")
    if len(roles) != references and any(roles):
        raise RowError(
            f"reference_roles has {len(roles)} values for {references} references; give each one role, or null"
        )
    return roles if any(roles) else (None,) * references


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise RowError(f"{name} has a NUL character at position {text.index(chr(0))}; remove it")
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        raise RowError(f"{name} has {size} bytes; the limit is {MAX_TEXT_BYTES}")


def _check_number(name: str, value: Any, high: float) -> Any:
    if not (math.isfinite(value) and 0 <= value <= high):
        raise RowError(f"{name} is {value}; it must be between 0 and {high if isinstance(high, int) else f'{high:g}'}")
    return value
