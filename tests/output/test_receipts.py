"""Which shards exist is what their receipts say, if these can be believed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.runs import read_receipts
from vcf_batch import storage
from vcf_batch.errors import StorageError
from vcf_batch.output import receipts
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import FileEntry, Shard


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3")


def _publish(output: str, index: int, **changes: Any) -> Receipt:
    name = f"{index:05d}"
    shard = Shard(index, index * 2, index * 2 + 2, name)
    files = {"tar": FileEntry(3, "0" * 64), "parquet": FileEntry(2, "1" * 64)}
    receipt = Receipt(shard, "f" * 64, 1, {"success": 2, "rejected": 0, "failed": 0}, files, {}, {})
    for suffix, data in ((".tar", b"tar"), (".parquet", b"pq"), ("_stats.json", receipt.to_json())):
        if (content := changes.get(suffix, data)) is not None:
            storage.publish_bytes(storage.join(output, name + suffix), content)
    return receipt


def test_receipts_that_do_not_match_their_files_count_as_absent(output: str) -> None:
    """A receipt whose files are missing or of another size counts as absent."""
    good = [_publish(output, 0), _publish(output, 100_000)]
    _publish(output, 1, **{".tar": None})
    _publish(output, 2, **{".parquet": None})
    _publish(output, 3, **{".tar": b"longer"})
    _publish(output, 4, **{".parquet": b""})
    _publish(output, 5, **{"_stats.json": good[0].to_json()[:-5]})
    _publish(output, 6, **{"_stats.json": b"[]"})
    _publish(output, 7, **{"_stats.json": b"\xff"})
    _publish(output, 8, **{"_stats.json": good[0].to_json()})
    _publish(output, 9, **{"_stats.json": None})
    for index, changes in enumerate(
        [{"counts": {}}, {"counts": {"success": 3}}, {"timings": {"total": 1}}, {"sampled": 3}], 10
    ):
        record = json.loads(good[0].to_json()) | changes
        _publish(output, index, **{"_stats.json": json.dumps(record).encode()})
    for name in ("x_stats.json", "123_stats.json", "run.json", "00099_stats.json.bak"):
        storage.publish_bytes(storage.join(output, name), good[0].to_json())
    assert read_receipts(output) == {0: good[0], 100_000: good[1]}
    assert [receipt.shard.index for receipt in receipts.read(output)] == [0, 100_000]


TIMINGS = {"total": 2.5, "sample": 1.0, "worker": "a:1", "ended": "2026-01-01T00:00:10+00:00", "generated": 2}
WRONG: dict[str, dict[str, Any]] = {
    "seconds as text": {"timings": TIMINGS | {"total": "2.5"}},
    "a phase as text": {"timings": TIMINGS | {"sample": "quick"}},
    "a phase as a list": {"timings": TIMINGS | {"sample": [1]}},
    "no seconds": {"timings": TIMINGS | {"sample": None}},
    "true seconds": {"timings": TIMINGS | {"sample": True}},
    "seconds NaN": {"timings": TIMINGS | {"total": math.nan}},
    "seconds infinite": {"timings": TIMINGS | {"total": math.inf}},
    "seconds negative": {"timings": TIMINGS | {"total": -1.0}},
    "seconds beyond time": {"timings": TIMINGS | {"total": 1e300}},
    "no date": {"timings": TIMINGS | {"ended": "yesterday"}},
    "a date as number": {"timings": TIMINGS | {"ended": 5}},
    "a date before time": {"timings": TIMINGS | {"ended": "0001-01-01T00:00:00"}},
    "start no date": {"timings": TIMINGS | {"started": ""}},
    "a worker as number": {"timings": TIMINGS | {"worker": 5}},
    "a worker as list": {"timings": TIMINGS | {"worker": []}},
    "timings as list": {"timings": [1]},
    "generated as text": {"timings": TIMINGS | {"generated": "2"}},
    "a device as list": {"device": {"type": ["gpu"]}},
    "a device as text": {"device": "gpu"},
    "several as text": {"device": {"several": "gpu"}},
    "several of texts": {"device": {"several": ["gpu"]}},
    "none of several": {"device": {"several": []}},
    "a mean as text": {"means": {"clip_score": "high"}},
    "a mean NaN": {"means": {"clip_score": math.nan}},
    "means as list": {"means": ["clip_score"]},
    "a bin as text": {"histograms": {"clip_score": {"0.20": "2"}}},
    "a bin without end": {"histograms": {"clip_score": {"low": 2}}},
    "bins of more rows": {"histograms": {"clip_score": {"0.20": 3}}},
    "bins as list": {"histograms": {"clip_score": [2]}},
    "counts as text": {"counts": {"success": "2", "rejected": 0, "failed": 0}},
    "counts as fractions": {"counts": {"success": 1.5, "rejected": 0.5, "failed": 0}},
    "another status": {"counts": {"success": 2, "rejected": 0, "failed": 0, "odd": 0}},
    "attempt as text": {"attempt": "1"},
    "a fingerprint as list": {"fingerprint": []},
    "sampled as text": {"sampled": "2"},
    "sampled at once as text": {"sampled_at_once": "2"},
    "none sampled at once": {"sampled_at_once": 0},
    "a size as text": {"files": {"tar": {"size": "3", "sha256": "0"}, "parquet": {"size": 2, "sha256": "1"}}},
    "a hash as number": {"files": {"tar": {"size": 3, "sha256": 0}, "parquet": {"size": 2, "sha256": "1"}}},
    "a fractional shard": {"shard": {"index": 0, "start": 0.0, "stop": 2.0, "name": "00000"}},
    "a shard elsewhere": {"shard": {"index": 0, "start": 0, "stop": 2, "name": "../00000"}},
    "a shard backwards": {"shard": {"index": 0, "start": 4, "stop": 2, "name": "00000"}},
}
"""What a receipt may not say."""


@pytest.mark.parametrize("case", WRONG)
def test_a_receipt_with_other_values_counts_as_absent(tmp_path: Path, case: str) -> None:
    """Whoever reads a receipt may count with its numbers and show its dates: one with other values is none."""
    record = json.loads(_publish(str(tmp_path), 0).to_json()) | {"timings": TIMINGS}
    assert Receipt.from_json(json.dumps(record).encode()).worker_seconds == 2.5
    data = json.dumps(record | WRONG[case]).encode()
    with pytest.raises(ValueError, match="not a receipt: "):
        Receipt.from_json(data)
    (tmp_path / "00000_stats.json").write_bytes(data)
    assert read_receipts(str(tmp_path)) == {}


def test_a_receipt_nested_without_end_counts_as_absent(tmp_path: Path) -> None:
    _publish(str(tmp_path), 0, **{"_stats.json": b"[" * 1_000_000})
    assert read_receipts(str(tmp_path)) == {}


def test_an_output_that_does_not_exist_has_no_receipts(output: str) -> None:
    assert read_receipts(output) == {}


def test_many_receipts_are_found_with_one_listing(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Receipts as truth: one uncached listing, whatever their number; nothing else is asked about the files."""
    monkeypatch.setattr(receipts, "_RECEIPTS_AT_ONCE", 64)
    for index in range(150):
        _publish(output, index)
    listings: list[str] = []
    listing = storage.list_files

    def noted(url: str) -> dict[str, int]:
        listings.append(url)
        return listing(url)

    monkeypatch.setattr(storage, "list_files", noted)
    for name in ("size", "exists", "list_tree"):
        monkeypatch.delattr(storage, name)
    assert list(read_receipts(output)) == list(range(150))
    assert listings == [output]


def test_a_storage_that_fails_is_not_an_empty_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(str(tmp_path), 0)

    def broken(url: str) -> bytes:
        raise StorageError("down")

    monkeypatch.setattr(storage, "read_bytes", broken)
    with pytest.raises(StorageError):
        read_receipts(str(tmp_path))
