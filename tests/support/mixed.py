"""Outputs with everything that readers stumble on: nulls that come before values, and a shard without an image."""

import datetime as dt
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from support import runs
from vcf_batch.setup.job import Job

ROWS, SHARD_SIZE = 24, 6
FAILED = frozenset({*range(6, 12), 20})
"""Rows that failed: those of the second shard, and one more."""
REJECTED = frozenset({3, 18})


LAST: Mapping[str, Any] = {
    "label": "a label",
    "rating": 0.5,
    "half": 1.5,
    "count": 7,
    "big": 2**63 - 1,
    "good": True,
    "price": "1.500",
    "day": "2024-02-29",
    "clock": "23:59:00.000001",
    "taken": "2024-02-29T23:59:00.000",
    "taken_at": "2024-02-29T23:59:00.000Z",
    "took": 2000,
    "tags": ["a", None],
    "pair": [1.0, 2.0],
    "place": {"lat": 1.5, "name": None},
    "boxes": [{"x": 1, "y": None}],
    "extra": [{"key": "a", "value": 1}],
    "nothing": None,
}
"""The carried columns of the last row, as a reader that knows their types gives them."""


def carried() -> Mapping[str, Any]:
    """Columns of many types by name. Each is null up to the last shard, where one row has a value."""
    values: dict[str, tuple[pa.DataType, Any]] = {
        "label": (pa.string(), "a label"),
        "rating": (pa.float32(), 0.5),
        "half": (pa.float16(), 1.5),
        "count": (pa.int8(), 7),
        "big": (pa.uint64(), 2**63 - 1),
        "good": (pa.bool_(), True),
        "price": (pa.decimal128(9, 3), Decimal("1.500")),
        "day": (pa.date32(), dt.date(2024, 2, 29)),
        "clock": (pa.time64("us"), dt.time(23, 59, 0, 1)),
        "taken": (pa.timestamp("ms"), dt.datetime(2024, 2, 29, 23, 59)),
        "taken_at": (pa.timestamp("ms", "Europe/Berlin"), dt.datetime(2024, 2, 29, 23, 59, tzinfo=dt.UTC)),
        "took": (pa.duration("ms"), dt.timedelta(seconds=2)),
        "tags": (pa.list_(pa.string()), ["a", None]),
        "pair": (pa.list_(pa.float32(), 2), [1.0, 2.0]),
        "place": (pa.struct({"lat": pa.float64(), "name": pa.string()}), {"lat": 1.5, "name": None}),
        "boxes": (pa.list_(pa.struct({"x": pa.int32(), "y": pa.int32()})), [{"x": 1, "y": None}]),
        "extra": (pa.map_(pa.string(), pa.int32()), [("a", 1)]),
        "nothing": (pa.null(), None),
    }
    return {name: pa.array([None] * (ROWS - 1) + [value], kind) for name, (kind, value) in values.items()}


def write(folder: Path, image_format: str = "png", triplets: bool = False, **columns: Any) -> Job:
    """Write an output of four shards into ``folder``/out: text-only rows first, rejected rows, one shard that failed
    whole, and :func:`carried` columns. Rows of triplets have references."""
    first_shards = 18 if not triplets else 0
    references = [None if row < first_shards else f"reference{row % 3}.png" for row in range(ROWS)]
    manifest = runs.write_manifest(folder / "in", ROWS, {"reference": references, **carried(), **columns})
    return runs.write_output(
        manifest,
        folder / "out",
        SHARD_SIZE,
        FAILED,
        rejected=REJECTED,
        image_format=image_format,
        triplets=triplets,
    )
