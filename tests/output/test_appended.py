"""Appended rows: they extend a run only where every shard that is there stays as it is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import appended
from vcf_batch.sharding import ShardPlan


def write(folder: Path, name: str, rows: int, **columns: Any) -> None:
    values = {"prompt": [f"{name} {row}" for row in range(rows)], "label": list(range(rows))}
    pq.write_table(pa.table(values | columns), folder / name)


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What the fingerprint covers of a run that has begun over two files with 8 rows in all."""
    write(tmp_path, "b.parquet", 5)
    write(tmp_path, "d.parquet", 3)

    def fields(shard_size: int = 4, limit: int | None = None) -> dict[str, Any]:
        opened = Manifest.open(str(tmp_path), limit)
        return {"manifest_id": opened.identity, "shard_size": shard_size, "limit": limit, "files": opened.versions}

    return fields


def obstacle(fields: dict[str, Any], folder: Path) -> str | None:
    return appended.obstacle(fields, Manifest.open(str(folder), fields["limit"]), fields["files"], fields["limit"])


def test_files_that_come_after_the_others_extend_a_run(begun: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fields, limited = begun(), begun(limit=6, shard_size=5)
    write(tmp_path, "e.parquet", 1)
    write(tmp_path, "f.parquet", 6)
    assert obstacle(fields, tmp_path) is None
    assert obstacle(limited, tmp_path) is None


@pytest.mark.parametrize(
    ("name", "rows", "columns", "shard_size", "reason"),
    [
        ("a.parquet", 4, {}, 4, "comes before one of them: a.parquet is new"),
        ("c.parquet", 4, {}, 4, "comes before one of them: c.parquet is new"),
        ("d.parquet", 4, {}, 4, "existing files have changed, .*: d.parquet has changed: it had .* bytes, and has"),
        ("d.parquet", 3, {"prompt": ["d.parquet 0", "D.parquet 1", "d.parquet 2"]}, 4, "d.parquet has changed"),
        ("e.parquet", 4, {}, 5, r"last shard, 00001 with 3 rows\. .* full \(5 rows\)"),
        ("e.parquet", 99_999, {}, 1, "no further digit"),
        ("e.parquet", 2, {"label": pa.array([1, 2], pa.decimal128(19, 0))}, 4, "types of the output's columns"),
    ],
)
def test_whatever_would_change_a_shard_is_refused(
    begun: Callable[..., dict[str, Any]],
    tmp_path: Path,
    name: str,
    rows: int,
    columns: dict[str, Any],
    shard_size: int,
    reason: str,
) -> None:
    """Extending a run by appending manifest rows is possible only where shards stay the same, else refused."""
    fields = begun(shard_size)
    write(tmp_path, name, rows, **columns)
    assert re.search(reason, obstacle(fields, tmp_path) or "nothing")


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 50))
def test_where_the_last_shard_stays_all_do(rows: int, more: int, shard_size: int) -> None:
    """What is compared is the last shard alone: the others follow from it."""
    before, now = ShardPlan(rows, shard_size), ShardPlan(rows + more, shard_size)
    assert (now[len(before) - 1] == before[-1]) == all(a == b for a, b in zip(before, now, strict=False))
