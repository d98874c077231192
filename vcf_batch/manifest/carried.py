"""The columns that a manifest hands to the outputs: their types and values there, and what is left out."""

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vcf_batch.errors import ManifestError
from vcf_batch.manifest.columns import MANIFEST_COLUMNS, shown

NO_VALUE = (ValueError, OverflowError, pa.ArrowException)
"""Errors that Arrow raises for a value without a counterpart in Python."""
_LIGHT_BYTES = 1 << 16
_TEXT, _UUID = pa.string(), pa.binary(16)
_MANTISSA = {16: 11, 32: 24, 64: 53}
"""Bits of whole numbers that a floating-point type holds exactly, by its width."""

_DIGITS = {8: 3, 16: 5, 32: 10, 64: 19}
"""Decimal digits of the largest whole number, by its bits; ``uint64`` has one more."""


def carried_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns repeated in the outputs, with their types there.

    Columns that hold bytes are left out. Dictionaries, views and extension types become their plain values, UUIDs
    become text, and nanoseconds become microseconds, also within lists and structs. Metadata is dropped. If a column's
    types differ between files, the outputs have a wider type that holds the values of both.

    Args:
        schemas: schema of each file, checked, by file name.

    Raises:
        ManifestError: no type holds a column of two files without a loss.
    """
    left = left_out(schemas)
    merged: pa.Schema | None = None
    plains: dict[str, pa.Schema] = {}
    for file, schema in schemas.items():
        fields = [pa.field(field.name, plain(field.type)) for field in schema if _is_carried(field.name, left)]
        plains[file] = pa.schema(fields)
        try:
            both = [plains[file]] if merged is None else [merged, plains[file]]
            merged = pa.unify_schemas(both, promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise ManifestError(
                f"{file} has columns of other types than the files before it: {error}. Write all files with "
                "the same types"
            ) from error
    merged = merged or pa.schema([])
    for file, schema in plains.items():
        for field in schema:
            wide = merged.field(field.name)
            if field.type != wide.type and loses(field.type, wide.type):
                other = next(name for name, each in plains.items() if each.field(field.name).type != field.type)
                raise ManifestError(
                    f"column {shown(field.name)} is {field.type} in {file} and {plains[other].field(field.name).type} "
                    f"in {other}, and as {wide.type} its values would be rounded. Write all files with the same type"
                )
    return merged


def left_out(schemas: Mapping[str, pa.Schema]) -> dict[str, str]:
    """The columns that are not carried, each with the reason in words.

    Args:
        schemas: see :func:`carried_schema`.

    Raises:
        ManifestError: a column holds bytes in one file and other values in another.
    """
    holding: dict[str, str] = {}
    for file, schema in schemas.items():
        holding |= {
            field.name: holding.get(field.name, file)
            for field in schema
            if field.name not in MANIFEST_COLUMNS and holds_bytes(plain(field.type))
        }
    for name, first in holding.items():
        for file, schema in schemas.items():
            kind = plain(schema.field(name).type)
            if not holds_bytes(kind) and not pt.is_null(kind):
                raise ManifestError(
                    f"column {shown(name)} holds bytes in {first} and is {kind} in {file}. Write all files with the "
                    "same type"
                )
    reasons = {}
    for name, first in holding.items():
        kind = plain(schemas[first].field(name).type)
        item = kind.value_type if is_list(kind) else kind
        reasons[name] = "it holds images" if is_image(item) else "it holds bytes"
    return reasons


def changes(kind: pa.DataType) -> str | None:
    """What carrying changes in the values of a type, in words; None if nothing."""
    if isinstance(kind, pa.UuidType):
        return "UUIDs become text"
    if (pt.is_timestamp(kind) or pt.is_duration(kind) or pt.is_time64(kind)) and kind.unit == "ns":
        return "nanoseconds become microseconds"
    if isinstance(kind, pa.BaseExtensionType):
        return changes(kind.storage_type)
    if pt.is_dictionary(kind):
        return changes(kind.value_type)
    return next(filter(None, (changes(kind.field(index).type) for index in range(kind.num_fields))), None)


def loses(kind: pa.DataType, wide: pa.DataType) -> bool:
    """Whether values of a type change when they are cast to a type that Arrow counts as wider."""
    if pt.is_floating(wide):
        if pt.is_integer(kind):
            return kind.bit_width - pt.is_signed_integer(kind) > _MANTISSA[wide.bit_width]
        return pt.is_decimal(kind)
    if pt.is_integer(wide) and pt.is_integer(kind):
        return kind.bit_width - pt.is_signed_integer(kind) > wide.bit_width - pt.is_signed_integer(wide)
    if pt.is_decimal(wide) and pt.is_integer(kind):
        return wide.precision - wide.scale < _DIGITS[kind.bit_width] + pt.is_uint64(kind)
    if pt.is_struct(wide) and pt.is_struct(kind):
        return any(loses(field.type, wide.field(field.name).type) for field in kind)
    return wide.num_fields == kind.num_fields > 0 and any(
        loses(kind.field(index).type, wide.field(index).type) for index in range(kind.num_fields)
    )


def _is_carried(name: str, left: Mapping[str, str]) -> bool:
    return name not in MANIFEST_COLUMNS and name not in left


def plain(kind: pa.DataType, of_uuid: pa.DataType = _TEXT) -> pa.DataType:
    """The type of a column's values without their encoding, at the resolution of Python's dates (microseconds).

    Args:
        kind: type of the column in the file.
        of_uuid: type of a UUID, at any depth.
    """
    if pt.is_dictionary(kind):
        return plain(kind.value_type, of_uuid)
    if isinstance(kind, pa.UuidType):
        return of_uuid
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type, of_uuid)
    if pt.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pt.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pt.is_time64(kind):
        return pa.time64("us")
    if pt.is_string_view(kind):
        return pa.string()
    if pt.is_struct(kind):
        return pa.struct([field.with_type(plain(field.type, of_uuid)) for field in kind])
    if pt.is_map(kind):
        return pa.map_(plain(kind.key_type, of_uuid), plain(kind.item_type, of_uuid))
    if is_list(kind):
        item = kind.value_field.with_type(plain(kind.value_type, of_uuid))
        if pt.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        return pa.large_list(item) if pt.is_large_list(kind) or pt.is_large_list_view(kind) else pa.list_(item)
    return kind


def _with_uuids(value: Any, kind: pa.DataType) -> Any:
    """A value of a type, as Python has it, with the bytes of UUIDs as their text."""
    if value is None:
        return None
    if isinstance(kind, pa.UuidType):
        return str(uuid.UUID(bytes=value))
    if isinstance(kind, pa.BaseExtensionType):
        return _with_uuids(value, kind.storage_type)
    if pt.is_dictionary(kind):
        return _with_uuids(value, kind.value_type)
    if pt.is_struct(kind):
        return {field.name: _with_uuids(value[field.name], field.type) for field in kind}
    if pt.is_map(kind):
        return [(_with_uuids(key, kind.key_type), _with_uuids(item, kind.item_type)) for key, item in value]
    return [_with_uuids(item, kind.value_type) for item in value] if is_list(kind) else value


def not_carried(kind: pa.DataType) -> str | None:
    """The reason why values of a plain type cannot become Python values, in words; None if they can."""
    if pt.is_timestamp(kind) and kind.tz:
        try:
            pa.scalar(0, kind).as_py()
        except NO_VALUE:
            return f"is in the unknown time zone {shown(kind.tz)}"
    if pt.is_struct(kind) and len({field.name for field in kind}) < kind.num_fields:
        return "has a struct with two fields of one name"
    return next(filter(None, (not_carried(kind.field(index).type) for index in range(kind.num_fields))), None)


def is_number(kind: pa.DataType) -> bool:
    return pt.is_floating(kind) or pt.is_integer(kind) or pt.is_null(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts or nulls."""
    return is_string(kind) or pt.is_null(kind)


def is_string(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    checks = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_list_view, pt.is_large_list_view)
    return any(check(kind) for check in checks)


def is_image(kind: pa.DataType) -> bool:
    """Whether a type is ``struct<bytes, path>``, or a struct of one of the two fields alone."""
    if not pt.is_struct(kind):
        return False
    fields = {kind.field(index).name: plain(kind.field(index).type) for index in range(kind.num_fields)}
    data, path = fields.pop("bytes", pa.null()), fields.pop("path", pa.null())
    return not fields and (pt.is_null(data) or is_binary(data)) and is_text(path)


def is_binary(kind: pa.DataType) -> bool:
    checks = (pt.is_binary, pt.is_large_binary, pt.is_fixed_size_binary, pt.is_binary_view)
    return any(check(kind) for check in checks)


def holds_bytes(kind: pa.DataType) -> bool:
    kind = plain(kind)
    return is_binary(kind) or any(holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def values(
    name: str, column: pa.Array, kind: pa.DataType, left_out: frozenset[int], errors: dict[int, str]
) -> list[Any]:
    """The column's values of type ``kind`` as Python objects, with None at the positions in ``left_out``.

    A value without a counterpart in Python (text that is not UTF-8, a date out of range) becomes None, too, and adds an
    error for its row to ``errors``.
    """

    has_uuids = plain(column.type, _UUID) != plain(column.type)
    target = plain(column.type, _UUID) if has_uuids else kind
    # Every other cast is exact. A time is cut to microseconds; one that then overflows fails its row.
    casting = pc.CastOptions(target, allow_time_truncate=True, allow_invalid_utf8=True)

    def python(part: pa.Array) -> list[Any]:
        values = (part if part.type == target else part.cast(options=casting)).to_pylist()
        return [_with_uuids(value, part.type) for value in values] if has_uuids else values

    if not left_out:
        try:
            return python(column)
        except NO_VALUE:
            pass
    values: list[Any] = [None] * len(column)
    for at in range(len(column)):
        if at not in left_out:
            try:
                (values[at],) = python(column.slice(at, 1))
            except NO_VALUE as error:
                errors.setdefault(at, f"{name} cannot be read: {error}")
    return values


def sizes(column: pa.Array) -> np.ndarray:
    """Approximate number of bytes of each value; 0 for every value of a small column."""
    if pt.is_dictionary(column.type):
        # Not decoded: a dictionary turns a few bytes of indices into values of any length.
        return _filled(pc.take(pa.array(sizes(column.dictionary)), column.indices))
    if is_text(column.type) and not pt.is_null(column.type):
        return _filled(pc.binary_length(column.cast(pa.large_binary())))
    if column.nbytes <= _LIGHT_BYTES:
        return np.zeros(len(column), np.int64)
    return np.array([column.slice(at, 1).nbytes for at in range(len(column))], np.int64)


def _filled(numbers: pa.Array) -> np.ndarray:
    # As a list, because pyarrow loads pandas to make an array of numpy, which takes longer than the rows do.
    return np.array([number or 0 for number in numbers.to_pylist()], np.int64)
