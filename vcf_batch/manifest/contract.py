"""The manifest's columns and their types, and the conversion of Arrow batches to rows."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vcf_batch import output_columns, sharding
from vcf_batch.config import FUSIONS, MAX_GUIDANCE_SCALE, MAX_PNO_STEPS, MAX_SEED, MAX_STRENGTH, reference_shares
from vcf_batch.errors import ManifestError, RowError, UsageError, redact
from vcf_batch.records import OVERRIDES, Reference, Row

MANIFEST_COLUMNS = ("prompt", "reference", "negative_reference", "sample_id", "seed", *OVERRIDES)
"""Columns with a meaning for the run; every other column is carried through to the outputs."""

HASH_COLUMNS = {"reference_sha256": "reference", "negative_reference_sha256": "negative_reference"}
"""Columns with the hashes of the images in another column. They are carried through, too."""

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
_NO_VALUE = (ValueError, OverflowError, pa.ArrowException)
"""Errors that Arrow raises for a value without a counterpart in Python."""
_LIGHT_BYTES = 1 << 16
_PROBLEMS_SHOWN = 10
_REFERENCE_TYPES = "string, struct<bytes: binary, path: string>, or a list of either"


def check_schema(file: str, schema: pa.Schema, first_file: str, first_schema: pa.Schema) -> None:
    """Check one file's columns against the contract, and against the manifest's first file.

    Raises:
        ManifestError: one error that lists every problem, with file, column, actual and required type.
    """
    names = schema.names
    problems = [f"column {shown(name)} occurs {count} times" for name, count in Counter(names).items() if count > 1]
    if "prompt" not in names:
        alike = [name for name in names if name.strip().lower() == "prompt"]
        problems.append(
            f"column 'prompt' is missing; rename {alike[0]!r}"
            if alike
            else f"column 'prompt' is missing; the file has: {_cut(', '.join(names)) or 'no columns'}"
        )
    for field in schema:
        name, is_ours = shown(field.name), field.name in MANIFEST_COLUMNS
        if expected := _expected_type(field.name, field.type):
            problems.append(f"column {name} is {_cut(str(field.type))}; it must be {expected}")
        elif not is_ours and field.name in output_columns.COLUMNS:
            problems.append(f"column {name} would collide with the output's own; rename it")
        elif not is_ours and (obstacle := _not_carried(_plain(field.type))):
            problems.append(
                f"column {name} {obstacle}, which cannot be carried through; change its type or leave it out"
            )
    for name, column in HASH_COLUMNS.items():
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
    if not problems and "reference" in names:
        kinds = [_reference_kind(each.field("reference").type) for each in (schema, first_schema)]
        if "null" not in kinds and kinds[0] != kinds[1]:
            problems.append(f"column 'reference' is a {kinds[0]}, but in {first_file} a {kinds[1]}; make them the same")
    if problems:
        more = [f"and {len(problems) - _PROBLEMS_SHOWN} more"] if len(problems) > _PROBLEMS_SHOWN else []
        lines = [f"\n  {line}" for line in problems[:_PROBLEMS_SHOWN] + more]
        raise ManifestError(f"{file} breaks the manifest contract:{''.join(lines)}")


def has_reference_lists(schema: pa.Schema) -> bool:
    """Whether rows of a checked schema may have several references."""
    return "reference" in schema.names and _reference_kind(schema.field("reference").type) == "list"


def carried_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns repeated in the outputs, with their types there.

    Columns that hold bytes are left out. Dictionaries, views and extension types become their plain values, and
    nanoseconds become microseconds, also within lists and structs. Metadata is dropped. If a column's types differ
    between files, the outputs have a wider type that holds both.

    Args:
        schemas: schema of each file, checked, by file name.

    Raises:
        ManifestError: no type holds a column of two files.
    """
    merged: pa.Schema | None = None
    for file, schema in schemas.items():
        fields = [pa.field(field.name, _plain(field.type)) for field in schema if field.name not in MANIFEST_COLUMNS]
        carried = pa.schema([field for field in fields if not _holds_bytes(field.type)])
        try:
            merged = carried if merged is None else pa.unify_schemas([merged, carried], promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise ManifestError(
                f"{file} has columns of other types than the files before it: {error}. Write all files with "
                "the same types"
            ) from error
    return merged or pa.schema([])


def parse_rows(batch: pa.RecordBatch, first_row: int, run_seed: int, carried: pa.Schema) -> list[Row]:
    """Convert one batch of a manifest's columns to rows.

    Args:
        batch: the manifest's columns among :data:`MANIFEST_COLUMNS`, and the columns of ``carried``.
        first_row: number of the first row in the manifest.
        run_seed: seed of the run; rows without a seed derive theirs from it.
        carried: see :func:`carried_schema`.

    Raises:
        ManifestError: a sample id is null or not safe.
    """
    weights = sum((_sizes(batch[name]) for name in carried.names), np.zeros(batch.num_rows, np.int64))
    too_heavy = np.flatnonzero(weights > MAX_CARRIED_BYTES).tolist()
    errors = {at: f"the carried columns have {weights[at]} bytes; the limit is {MAX_CARRIED_BYTES}" for at in too_heavy}
    columns: dict[str, list[Any]] = {}
    kinds = dict(zip(carried.names, carried.types, strict=True))
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind, left_out = kinds.get(name, _plain(column.type)), too_heavy
        if name not in kinds:
            sizes = _sizes(column) if _is_text(kind) else np.zeros(0)
            left_out = np.flatnonzero(sizes > MAX_TEXT_BYTES).tolist()
            errors = {at: f"{name} has {sizes[at]} bytes; the limit is {MAX_TEXT_BYTES}" for at in left_out} | errors
        columns[name] = _values(name, column, kind, frozenset(left_out), errors)
    rows = []
    for at in range(batch.num_rows):
        values = {name: column[at] for name, column in columns.items()}
        number = first_row + at
        key = values.get("sample_id", f"{number:09d}")
        if key is None or not re.fullmatch(SAFE_ID, key):
            raise ManifestError(
                f"column 'sample_id' of row {number} is {shown(key)}, which is not a safe id; an id is 1 to 128 of the "
                "characters A-Z a-z 0-9 _ -"
            )
        prompt, seed, error = values["prompt"] or "", sharding.derive_seed(run_seed, key), errors.get(at)
        references: tuple[Reference, ...] = ()
        negative: tuple[Reference, ...] = ()
        overrides: dict[str, Any] = {}
        try:
            if error is None:
                _check_text("prompt", prompt)
                if not prompt.strip():
                    raise RowError("prompt is empty")
                references = _hashed(parse_references(values.get("reference")), values, "reference_sha256")
                negative = parse_references(values.get("negative_reference"), "negative_reference")
                negative = _hashed(negative, values, "negative_reference_sha256")
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
                seed=seed,
                overrides=overrides,
                carried={name: values[name] for name in carried.names},
                error=error,
            )
        )
    return rows


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


def shown(value: Any) -> str:
    """A value as error messages show it: redacted, and at most 60 characters."""
    return _cut(redact(repr(value.decode(errors="replace") if isinstance(value, bytes) else value)), 60)


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _expected_type(name: str, kind: pa.DataType) -> str | None:
    """The required type of a column, in words; None if ``kind`` is right."""
    kind = _plain(kind)
    if name in ("prompt", "sample_id", "negative_prompt", "negative_reference", "negative_reference_sha256", "fusion"):
        return None if _is_text(kind) else "string"
    if name in ("seed", "pno_steps"):
        return (
            None
            if pt.is_integer(kind) or pt.is_null(kind)
            else "int64 (in pandas, 'Int64' keeps integers beside nulls)"
        )
    if name in ("guidance_scale", "strength", "fusion_lo", "fusion_hi"):
        return None if _is_number(kind) else "a number, such as float64"
    if name == "reference_weights":
        numbers = _is_list(kind) and _is_number(_plain(kind.value_type))
        return None if numbers or pt.is_null(kind) else "a list of numbers, such as list<double>"
    if name == "reference_sha256":
        return None if _is_text(_plain(kind.value_type if _is_list(kind) else kind)) else "string, or list<string>"
    if name == "reference":
        item = kind.value_type if _is_list(kind) else kind
        return None if _is_text(_plain(item)) or _is_image(item) else _REFERENCE_TYPES
    return None


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values without their encoding, at the resolution of Python's dates (microseconds)."""
    if pt.is_dictionary(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pt.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pt.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pt.is_time64(kind):
        return pa.time64("us")
    if pt.is_string_view(kind):
        return pa.string()
    if pt.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pt.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if _is_list(kind):
        item = kind.value_field.with_type(_plain(kind.value_type))
        if pt.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        return pa.large_list(item) if pt.is_large_list(kind) or pt.is_large_list_view(kind) else pa.list_(item)
    return kind


def _not_carried(kind: pa.DataType) -> str | None:
    """The reason why values of a plain type cannot become Python values, in words; None if they can."""
    if pt.is_timestamp(kind) and kind.tz:
        try:
            pa.scalar(0, kind).as_py()
        except _NO_VALUE:
            return f"is in the unknown time zone {shown(kind.tz)}"
    if pt.is_struct(kind) and len({field.name for field in kind}) < kind.num_fields:
        return "has a struct with two fields of one name"
    return next(filter(None, (_not_carried(kind.field(index).type) for index in range(kind.num_fields))), None)


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_floating(kind) or pt.is_integer(kind) or pt.is_null(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_null(kind)


def _is_list(kind: pa.DataType) -> bool:
    checks = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_list_view, pt.is_large_list_view)
    return any(check(kind) for check in checks)


def _is_image(kind: pa.DataType) -> bool:
    """Whether a type is ``struct<bytes, path>``, or a struct of one of the two fields alone."""
    if not pt.is_struct(kind):
        return False
    fields = {kind.field(index).name: _plain(kind.field(index).type) for index in range(kind.num_fields)}
    data, path = fields.pop("bytes", pa.null()), fields.pop("path", pa.null())
    return not fields and (pt.is_null(data) or _is_binary(data)) and _is_text(path)


def _is_binary(kind: pa.DataType) -> bool:
    checks = (pt.is_binary, pt.is_large_binary, pt.is_fixed_size_binary, pt.is_binary_view)
    return any(check(kind) for check in checks)


def _holds_bytes(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return _is_binary(kind) or any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _reference_kind(kind: pa.DataType) -> str:
    if _is_list(_plain(kind)):
        return "list"
    return "null" if pt.is_null(_plain(kind)) else "single reference"


def _sizes(column: pa.Array) -> np.ndarray:
    """Approximate number of bytes of each value; 0 for every value of a small column."""
    if pt.is_dictionary(column.type):
        # Not decoded: a dictionary turns a few bytes of indices into values of any length.
        return _filled(pc.take(pa.array(_sizes(column.dictionary)), column.indices))
    if _is_text(column.type) and not pt.is_null(column.type):
        return _filled(pc.binary_length(column.cast(pa.large_binary())))
    if column.nbytes <= _LIGHT_BYTES:
        return np.zeros(len(column), np.int64)
    return np.array([column.slice(at, 1).nbytes for at in range(len(column))], np.int64)


def _filled(numbers: pa.Array) -> np.ndarray:
    return numbers.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _values(
    name: str, column: pa.Array, kind: pa.DataType, left_out: frozenset[int], errors: dict[int, str]
) -> list[Any]:
    """The column's values of type ``kind`` as Python objects, with None at the positions in ``left_out``.

    A value without a counterpart in Python (text that is not UTF-8, a date out of range) becomes None, too, and adds an
    error for its row to ``errors``.
    """

    def python(part: pa.Array) -> list[Any]:
        return (part if part.type == kind else part.cast(kind, safe=False)).to_pylist()

    if not left_out:
        try:
            return python(column)
        except _NO_VALUE:
            pass
    values: list[Any] = [None] * len(column)
    for at in range(len(column)):
        if at not in left_out:
            try:
                (values[at],) = python(column.slice(at, 1))
            except _NO_VALUE as error:
                errors.setdefault(at, f"{name} cannot be read: {error}")
    return values


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
    return given


def _check_weights(weights: Sequence[float | None], references: int) -> tuple[float, ...]:
    numbers = tuple(math.nan if weight is None else float(weight) for weight in weights)
    try:
        reference_shares(numbers, references)
    except UsageError as error:
        raise RowError(str(error)) from error
    return numbers


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
