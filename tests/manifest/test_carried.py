"""Carried columns come out with the values that went in, or are refused or named before the run."""

import datetime
import decimal
import itertools
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import ManifestError
from vcf_batch.manifest.carried import carried_schema, loses
from vcf_batch.manifest.manifest import Manifest

LARGE = 9007199254740993
"""The first whole number that a double does not hold."""


def opened(folder: Path, *columns: Any) -> Manifest:
    folder.mkdir(exist_ok=True)
    for number, column in enumerate(columns):
        pq.write_table(pa.table({"prompt": ["a"] * len(column), "x": column}), folder / f"{number}.parquet")
    return Manifest.open(str(folder))


@pytest.mark.parametrize(
    ("one", "other", "wide"),
    [
        (pa.int64(), pa.float64(), "double"),
        (pa.uint64(), pa.int64(), "int64"),
        (pa.uint64(), pa.float64(), "double"),
        (pa.decimal128(10, 2), pa.float64(), "double"),
        (pa.int64(), pa.decimal128(3, 2), "decimal"),
        (pa.int8(), pa.decimal128(3, 1), "decimal"),
        (pa.list_(pa.int64()), pa.list_(pa.float64()), "list"),
        (pa.struct({"a": pa.int64()}), pa.struct({"a": pa.float64()}), "struct"),
        (pa.map_(pa.string(), pa.int64()), pa.map_(pa.string(), pa.float64()), "map"),
    ],
    ids=str,
)
def test_a_widening_that_rounds_is_refused_with_file_and_column(
    one: pa.DataType, other: pa.DataType, wide: str
) -> None:
    for first, second in itertools.permutations((one, other)):
        schemas = {"a.parquet": pa.schema({"x": first}), "b.parquet": pa.schema({"x": second})}
        with pytest.raises(
            ManifestError, match=rf"column 'x' is .* in [ab]\.parquet .* in [ab]\.parquet, and as {wide}"
        ):
            carried_schema(schemas)


def test_widenings_that_keep_every_value_are_made(tmp_path: Path) -> None:
    kinds = [(pa.int32(), pa.float64()), (pa.int16(), pa.float32()), (pa.uint32(), pa.int64()), (pa.null(), pa.int64()),
             (pa.decimal128(5, 2), pa.decimal128(9, 4)), (pa.string(), pa.large_string())]  # fmt: skip
    assert not any(loses(*pair) for pair in kinds)
    rows = opened(tmp_path / "m", pa.array([7], pa.int32()), pa.array([0.5])).rows(0, 2, 0)
    assert [row.carried["x"] for row in rows] == [7.0, 0.5]
    rows = opened(tmp_path / "n", pa.array([LARGE]), pa.array([7], pa.int8())).rows(0, 2, 0)
    assert [row.carried["x"] for row in rows] == [LARGE, 7]


def test_uuids_are_carried_as_text_at_any_depth(tmp_path: Path) -> None:
    one, two = uuid.uuid4(), uuid.uuid4()
    flat = pa.array([one.bytes, None], pa.uuid())
    assert [row.carried["x"] for row in opened(tmp_path / "flat", flat).rows(0, 2, 0)] == [str(one), None]
    found = opened(tmp_path / "flat", flat)
    assert (found.carried_schema.field("x").type, found.remarks) == (pa.string(), {"x": "UUIDs become text"})
    ids = pa.array([one.bytes, two.bytes], pa.uuid())
    lists = pa.ListArray.from_arrays([0, 2, 2], ids)
    structs = pa.StructArray.from_arrays([ids, pa.array([1001, 2], pa.timestamp("ns"))], ["id", "at"])
    assert [row.carried["x"] for row in opened(tmp_path / "lists", lists).rows(0, 2, 0)] == [[str(one), str(two)], []]
    epoch = datetime.datetime(1970, 1, 1)
    assert [row.carried["x"] for row in opened(tmp_path / "structs", structs).rows(0, 2, 0)] == [
        {"id": str(one), "at": epoch + datetime.timedelta(microseconds=1)},
        {"id": str(two), "at": epoch},
    ]


def test_uuids_are_ids(tmp_path: Path) -> None:
    """A column of UUIDs may be the ids of samples, as their text. Prompts are no UUIDs."""
    ids = [uuid.uuid4(), uuid.uuid4()]
    column = pa.array([each.bytes for each in [*ids, ids[0]]], pa.uuid())
    found = opened(tmp_path / "m", column)
    assert [row.key for row in Manifest.open(found.url, 2, mapped={"sample_id": "x"}).rows(0, 2, 0)] == [*map(str, ids)]
    with pytest.raises(ManifestError, match=rf"column 'x': 1 row is repeated .*'{ids[0]}'"):
        Manifest.open(found.url, mapped={"sample_id": "x"}).check()
    with pytest.raises(ManifestError, match=r"'x' is extension<arrow\.uuid>; it must be string"):
        Manifest.open(found.url, mapped={"reference": "x"})


def test_what_is_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"1", "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    assert opened(tmp_path / "image", images).left_out == {"x": "it holds images"}
    assert opened(tmp_path / "bytes", pa.array([b"1"])).left_out == {"x": "it holds bytes"}
    mixed = opened(tmp_path / "null", pa.nulls(1), pa.array([b"1"]))
    assert (mixed.left_out, mixed.rows(1, 2, 0)[0].error) == ({"x": "it holds bytes"}, None)
    with pytest.raises(ManifestError, match=r"'x' holds bytes in 1\.parquet and is string in 0\.parquet"):
        opened(tmp_path / "mixed", pa.array(["1"]), pa.array([b"1"]))


def test_a_time_that_overflows_its_wider_unit_fails_its_row(tmp_path: Path) -> None:
    """It came out as another time."""
    far, near = pa.array([2**61], pa.timestamp("ms")), pa.array([1], pa.timestamp("us"))
    first, second = opened(tmp_path / "m", far, near).rows(0, 2, 0)
    assert (first.error or "").startswith("x cannot be read") and second.error is None
    remarked = opened(tmp_path / "ns", pa.array([1001], pa.timestamp("ns")))
    assert remarked.remarks == {"x": "nanoseconds become microseconds"}


def test_large_numbers_are_carried_exactly(tmp_path: Path) -> None:
    for value, kind in ((LARGE, pa.int64()), (2**64 - 1, pa.uint64()), (decimal.Decimal("0.10"), pa.decimal128(38, 2))):
        dictionary = pa.array([value], kind).dictionary_encode()
        for column in (pa.array([value], kind), dictionary):
            assert opened(tmp_path / str(kind), column).rows(0, 1, 0)[0].carried["x"] == value
