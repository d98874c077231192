"""What receipts add up to: as said, in any order, read back as written."""

import json
from typing import Any

import pytest

from vcf_batch.output import sums
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.sums import RunSums
from vcf_batch.records import FileEntry, Shard


def receipt(index: int, worker: str, ended: int, seconds: float, failed: int = 0, **timings: Any) -> Receipt:
    """Of a shard of ten rows that ended so many seconds after midnight."""
    shard = Shard(index, 10 * index, 10 * index + 10, f"{index:05d}")
    told = {"worker": worker, "ended": f"2026-01-01T00:{ended // 60:02d}:{ended % 60:02d}+00:00", "total": seconds}
    counts = {"success": 10 - failed, "rejected": 0, "failed": failed}
    files = {"tar": FileEntry(100, "0"), "parquet": FileEntry(10, "1")}
    means = {"clip_score": 0.1 * (index + 1), "lpips": None}
    return Receipt(shard, "f", 1 + index % 2, counts, files, {"type": "gpu"}, told | {"sample": 5.0} | timings, means)  # type: ignore[arg-type]


def test_receipts_add_up() -> None:
    found = RunSums()
    for number in range(2):
        found.add(receipt(number, "a:1", 100 * (number + 1), 10, failed=5 * number))
    assert (found.counts, found.retried, found.bytes, found.done) == (
        {"success": 15, "rejected": 0, "failed": 5},
        1,
        220,
        {0, 1},
    )
    assert (found.worker_seconds, found.phases, found.devices) == (20, {"sample": 10}, {"gpu": 20})
    assert found.means == {"clip_score": pytest.approx((10 * 0.1 + 5 * 0.2) / 15)}
    assert found.failing == [1]


def test_the_rate_is_that_of_the_workers_at_work() -> None:
    """A worker that ended long before the others, or an earlier shard of one, says nothing of what is to come."""
    found = RunSums()
    for told in [
        receipt(3, "b:1", 600, 20),
        receipt(0, "gone:1", 10, 1),
        receipt(1, "a:1", 100, 1),
        receipt(2, "a:1", 590, 10),
    ]:
        found.add(told)
    assert set(found.at_work) == {"a:1", "b:1"}
    assert found.rate == pytest.approx(10 / 10 + 10 / 20)


def test_rows_that_a_repair_kept_took_no_time() -> None:
    found = RunSums()
    found.add(receipt(0, "a:1", 10, 2, generated=1))
    assert (found.rate, found.generated, found.counts.total()) == (0.5, 1, 10)


def test_a_worker_that_has_two_shards_under_way_is_not_counted_twice() -> None:
    found = RunSums()
    found.add(receipt(0, "a:1", 10, 9, wait_for_turn=4.0))
    assert (found.rate, found.worker_seconds) == (2, 5)


def test_receipts_without_timings_have_no_rate() -> None:
    found = RunSums()
    found.add(Receipt(Shard(0, 0, 2, "00000"), "f", 1, {"success": 2}, {}, {}, {}))
    assert (found.rate, found.latest, found.generated, found.means) == (None, None, 0, {})


def test_what_is_kept_does_not_grow_with_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "MAX_WORKERS", 4)
    found = RunSums()
    for number in range(12):
        found.add(receipt(number, f"spot:{number}", 290 * number, 1))
    assert len(found.workers) <= 4


def test_totals_are_read_back_as_written() -> None:
    found = RunSums()
    for number in (0, 1, 2, 7):
        found.add(receipt(number, f"a:{number % 2}", number, 10, failed=number))
    record = json.loads(json.dumps(found.to_dict()))
    assert record["done"] == [[0, 3], [7, 8]]
    assert RunSums.from_dict(record) == found


def test_device_types_are_counted() -> None:
    """A shard that a repair generated on another device has several, which count as two at least."""
    found = RunSums()
    assert found.device_types == 0
    found.devices["gpu"] += 5
    assert found.device_types == 1
    found.devices["several"] += 1
    assert found.device_types == 2
    found.devices |= {"gpu #1": 1, "gpu #2": 1}
    assert found.device_types == 3
