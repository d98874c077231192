"""``KEY.json``: a row of the parquet as JSON, with its keys in the order of the columns.

A column that is null is left out, and so is a null field of an object, at any depth. A null in an array stays, because
the values after it have their place. So every key that is there has its column's JSON type (:func:`json_type`):

=========================== =========================================================================================
integers, booleans, strings as they are (bytes of a string that are not UTF-8 become U+FFFD)
floating point              number; NaN and infinities count as null
decimals                    string, in the column's scale: ``"1.500"``
dates, times                string, ISO 8601: ``"2024-02-29"``, ``"23:59:00.000001"``
timestamps                  string, ISO 8601 in the column's unit, ``"2024-02-29T23:59:00.000"``; where the column has a
                            time zone in UTC, ending in ``Z``
durations                   integer, in the column's unit
binary                      string, base64
lists, structs, maps        array; object; array of ``{"key": ..., "value": ...}``
=========================== =========================================================================================
"""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from vcf_batch.manifest.carried import is_list


def finite(value: float | None) -> float | None:
    """The number; None for NaN and infinities, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def row_json(batch: pa.RecordBatch) -> bytes:
    """The single row of ``batch`` as compact JSON in UTF-8, encoded as the module's docstring says."""
    return json_text(json_values(batch))


def json_values(batch: pa.RecordBatch) -> dict[str, Any]:
    """The values of the single row of ``batch`` by column, nulls included, each as :func:`json_value` gives it."""
    return {name: json_value(column[0]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def json_text(values: Mapping[str, Any]) -> bytes:
    """The row with these values as compact JSON in UTF-8, without nulls."""
    return json.dumps(_without_nulls(values), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def json_type(kind: pa.DataType) -> pa.DataType:
    """The Arrow type of a column's values as they are in the JSON: of ``timestamp`` it is ``string``."""
    if pt.is_struct(kind):
        return pa.struct([pa.field(field.name, json_type(field.type)) for field in kind])
    if pt.is_map(kind):
        return pa.list_(pa.struct({"key": json_type(kind.key_type), "value": json_type(kind.item_type)}))
    if is_list(kind):
        return pa.list_(json_type(kind.value_type))
    if isinstance(kind, pa.BaseExtensionType):
        return json_type(kind.storage_type)
    if pt.is_dictionary(kind):
        return json_type(kind.value_type)
    if pt.is_duration(kind):
        return pa.int64()
    is_itself = pt.is_boolean(kind) or pt.is_integer(kind) or pt.is_floating(kind) or pt.is_null(kind)
    return kind if is_itself else pa.string()


def json_value(scalar: pa.Scalar) -> Any:
    """The value as a Python object for ``json.dumps``, encoded as the module's docstring says, nulls included."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(scalar, (pa.ExtensionScalar, pa.DictionaryScalar)):
        return json_value(scalar.value)
    if isinstance(scalar, pa.StructScalar):
        return {field.name: json_value(scalar[position]) for position, field in enumerate(kind)}
    if isinstance(scalar, pa.ListScalar):
        return [json_value(value) for value in scalar.values]
    if isinstance(scalar, pa.StringScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
    if isinstance(scalar, pa.BinaryScalar):
        return base64.b64encode(scalar.as_py()).decode()
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return scalar.as_py()
    if pa.types.is_floating(kind):
        return finite(float(scalar.as_py()))
    if pa.types.is_duration(kind):
        return scalar.value
    if pa.types.is_timestamp(kind):
        utc = scalar.cast(pa.timestamp(kind.unit, "UTC")) if kind.tz else scalar
        return utc.cast(pa.string()).as_py().replace(" ", "T", 1)
    return scalar.cast(pa.string()).as_py()
