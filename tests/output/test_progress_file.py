"""What a driver tells of its run is a help for whoever looks at it, and never the truth."""

import dataclasses
import json
from pathlib import Path

import pytest

from support import runs
from vcf_batch import storage
from vcf_batch.driver.fault import Fault
from vcf_batch.driver.ledger import Ledger
from vcf_batch.errors import VcfBatchError
from vcf_batch.output import progress_file, receipts
from vcf_batch.output.progress_file import PROGRESS_NAME, look
from vcf_batch.output.sums import RunSums
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A finished run of five shards of two rows."""
    return runs.write_output(runs.write_manifest(tmp_path / "in", 10), tmp_path / "out", 2, failed={3})


def counted(job: Job) -> RunSums:
    """From the receipts alone."""
    found = RunSums()
    for receipt in receipts.read(job.config.output):
        found.add(receipt)
    return found


def seen(job: Job) -> RunSums:
    return look(job.config.output, {job.fingerprint}).totals


def test_only_receipts_that_the_driver_has_not_counted_are_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = Path(job.config.output) / "00004_stats.json"
    data = receipt.read_bytes()
    receipt.unlink()
    Ledger(job)
    receipt.write_bytes(data)
    read: list[str] = []
    real = storage.read_bytes

    def record(url: str, limit: int | None = None) -> bytes:
        read.append(storage.name(url))
        return real(url, limit)

    monkeypatch.setattr(storage, "read_bytes", record)
    found = seen(job)
    assert read == [PROGRESS_NAME, "00004_stats.json"]
    monkeypatch.undo()
    assert found == counted(job)


@pytest.mark.parametrize("damage", ["", "{}", "[]", "[" * 10**6, '{"fingerprint": "f", "totals": {"done": 3}}', None])
def test_what_cannot_be_read_is_done_without(job: Job, damage: str | None) -> None:
    Ledger(job)
    file = Path(job.config.output) / PROGRESS_NAME
    if damage is None:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "of another run"}))
    else:
        file.write_text(damage)
    assert seen(job) == counted(job)


@pytest.mark.parametrize("failing", [[99999], ["x"]])
def test_failed_rows_of_shards_that_are_not_there_are_not_believed(job: Job, failing: list[object]) -> None:
    Ledger(job)
    file = Path(job.config.output) / PROGRESS_NAME
    record = json.loads(file.read_text())
    record["totals"]["failing"] = failing
    file.write_text(json.dumps(record))
    assert seen(job) == counted(job)


@pytest.mark.parametrize("lost", ["00001_stats.json", "00001.tar"])
def test_a_shard_that_is_gone_is_not_counted(job: Job, lost: str) -> None:
    Ledger(job)
    (Path(job.config.output) / lost).unlink()
    found = seen(job)
    assert found == counted(job)
    assert found.done == {0, 2, 3, 4}


def test_shards_that_are_being_replaced_are_read_from_their_receipts(job: Job) -> None:
    """What the driver tells is never older than what it is about to commit."""
    Ledger(job)
    ledger = Ledger(dataclasses.replace(job, redo={1: bytes([0, 1])}))
    told = progress_file.read(job.config.output)
    assert told
    assert told.totals.done == ledger.totals.done == {0, 2, 3, 4}
    assert seen(job).counts == {"success": 9, "rejected": 0, "failed": 1}


def test_the_driver_tells_what_it_commits_and_sets_aside(job: Job) -> None:
    receipts = runs.read_receipts(job.config.output)
    for index in (2, 3):
        (Path(job.config.output) / f"{receipts[index].shard.name}_stats.json").unlink()
    ledger = Ledger(job)
    ledger.set_aside(ShardTask(job.shards[3]), Fault.of(VcfBatchError("no disk"), ""))
    ledger.committed(ShardTask(job.shards[2]), receipts[2])
    told = progress_file.read(job.config.output)
    assert told
    assert told.set_aside == {"00003": "no disk"}
    assert told.totals.done == {0, 1, 2, 4}


def test_nothing_is_written_where_nothing_is_new(job: Job) -> None:
    Ledger(job)
    file = Path(job.config.output) / PROGRESS_NAME
    before = file.stat().st_mtime_ns
    Ledger(job)
    assert file.stat().st_mtime_ns == before
