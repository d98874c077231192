"""``KEY.json``: a row of the parquet as JSON, with the same keys in the same order for every sample.

Every value of a column is null or has the column's JSON type:

=========================== =========================================================================================
integers, booleans, strings as they are (bytes of a string that are not UTF-8 become U+FFFD)
floating point              number; NaN and infinities are null
decimals                    string, in the column's scale: ``"1.500"``
dates, times                string, ISO 8601: ``"2024-02-29"``, ``"23:59:00.000001"``
timestamps                  string, ISO 8601 in the column's unit, ``"2024-02-29T23:59:00.000"``; where the column has a
                            time zone in UTC, ending in ``Z``
durations                   integer, in the column's unit
binary                      string, base64
lists, structs, maps        array; object with every field; array of ``{"key": ..., "value": ...}``
=========================== =========================================================================================
"""

import base64
import json
import math
from typing import Any

import pyarrow as pa


def finite(value: float | None) -> float | None:
    """The number; None for NaN and infinities, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def row_json(batch: pa.RecordBatch) -> bytes:
    """The single row of ``batch`` as compact JSON in UTF-8, encoded as the module's docstring says."""
    row = {name: json_value(column[0]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_value(scalar: pa.Scalar) -> Any:
    """The value as a Python object for ``json.dumps``, encoded as the module's docstring says."""
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
