"""What a driver tells of its run is a help for whoever looks at it, and never the truth."""

import dataclasses
import json
from pathlib import Path

import pytest

from support import runs
from vcf_batch import storage
from vcf_batch.commands.verify import check
from vcf_batch.driver.fault import Fault
from vcf_batch.driver.ledger import Ledger
from vcf_batch.errors import VcfBatchError
from vcf_batch.output import progress_file, receipts
from vcf_batch.output.output import Output
from vcf_batch.output.progress_file import PROGRESS_NAME, glance, look
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
    return look(job.config.output, {job.fingerprint}, job.shards).totals


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read whole from here on."""
    names: list[str] = []
    real = storage.read_bytes

    def record(url: str, limit: int | None = None) -> bytes:
        names.append(storage.name(url))
        return real(url, limit)

    monkeypatch.setattr(storage, "read_bytes", record)
    return names


def receipt_file(job: Job, index: int) -> Path:
    return Path(job.config.output) / f"0000{index}_stats.json"


def told_but_for_the_last(job: Job) -> None:
    """Have a driver tell of the shards, but for the last one, which is there too."""
    data = receipt_file(job, 4).read_bytes()
    receipt_file(job, 4).unlink()
    Ledger(job)
    receipt_file(job, 4).write_bytes(data)


def test_only_receipts_that_the_driver_has_not_counted_are_read(job: Job, files_read: list[str]) -> None:
    told_but_for_the_last(job)
    files_read.clear()
    found = seen(job)
    assert files_read == [PROGRESS_NAME, "00004_stats.json"]
    assert found == counted(job)


def test_a_run_that_goes_on_reads_only_receipts_that_its_last_driver_has_not_counted(
    job: Job, files_read: list[str]
) -> None:
    receipt_file(job, 3).unlink()
    told_but_for_the_last(job)
    files_read.clear()
    ledger = Ledger(job)
    assert [name for name in files_read if name != PROGRESS_NAME] == ["00004_stats.json"]
    assert (ledger.left, ledger.totals) == (1, counted(job))


def test_what_a_driver_tells_while_it_commits_is_believed_by_the_next_one(job: Job, files_read: list[str]) -> None:
    there = runs.read_receipts(job.config.output)
    for index in (1, 2, 3):
        receipt_file(job, index).unlink()
    clock = [0.0]
    ledger = Ledger(job, lambda: clock[0])
    for index in (2, 3):
        receipt_file(job, index).write_bytes(there[index].to_json())
        clock[0] += 11
        ledger.committed(ShardTask(job.shards[index]), there[index])
    files_read.clear()
    again = Ledger(job)
    assert set(files_read) == {PROGRESS_NAME}
    assert (again.left, again.totals) == (1, counted(job))


def test_what_was_committed_is_told_within_ten_seconds_though_nothing_more_is_committed(job: Job) -> None:
    there = runs.read_receipts(job.config.output)
    for index in range(5):
        receipt_file(job, index).unlink()
    clock = [0.0]
    ledger = Ledger(job, lambda: clock[0])
    clock[0] = 1800.0
    for index in range(4):
        receipt_file(job, index).write_bytes(there[index].to_json())
        clock[0] += 0.2
        ledger.committed(ShardTask(job.shards[index]), there[index])
    clock[0] += 10
    ledger.tell_if_due()
    told = glance(job.config.output, {job.fingerprint}, job.shards)
    assert told
    assert told.totals.done == {0, 1, 2, 3}


def test_devices_are_known_without_the_receipts_that_name_them(job: Job, files_read: list[str]) -> None:
    for receipt in runs.read_receipts(job.config.output).values():
        one = {"type": "GPU", "precision": f"tf{receipt.shard.index % 2}"}
        device = {"several": [one, {}]} if receipt.shard.index == 4 else one
        told = dataclasses.replace(receipt, device=device)
        receipt_file(job, receipt.shard.index).write_bytes(told.to_json())
    receipt_file(job, 3).unlink()
    first = Ledger(job).devices
    files_read.clear()
    assert Ledger(job).devices == first
    assert set(files_read) == {PROGRESS_NAME}
    assert [device["precision"] for device in first.values()] == ["tf0", "tf1"]


@pytest.mark.parametrize("file", ["00001_stats.json", "00001.tar", "00001.parquet"])
def test_every_receipt_is_read_where_a_file_has_another_size(job: Job, files_read: list[str], file: str) -> None:
    """Though all files together have as many bytes."""
    Ledger(job)
    folder = Path(job.config.output)
    other = folder / file.replace("00001", "00002")
    other.write_bytes(other.read_bytes() + b" ")
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    files_read.clear()
    found = seen(job)
    assert {name for name in files_read if name.endswith("_stats.json")} >= {f"0000{n}_stats.json" for n in range(5)}
    assert found == counted(job)
    assert 1 not in found.done


@pytest.mark.parametrize("damage", ["zeros", "a byte", "another run", "other rows"])
def test_a_receipt_damaged_within_its_size_is_found_before_a_run_counts_as_finished(job: Job, damage: str) -> None:
    Ledger(job)
    data = receipt_file(job, 1).read_bytes()
    other = data.replace(job.fingerprint.encode(), b"0" * len(job.fingerprint))
    rows = data.replace(b'"start": 2', b'"start": 4').replace(b'"stop": 4', b'"stop": 6')
    assert rows != data
    every = {"zeros": bytes(len(data)), "a byte": b"z" + data[1:], "another run": other, "other rows": rows}
    damaged = every[damage]
    receipt_file(job, 1).write_bytes(damaged)
    assert Ledger(job).left == 1


def test_while_shards_are_left_a_receipt_damaged_within_its_size_is_found_by_verify_alone(job: Job) -> None:
    receipt_file(job, 3).unlink()
    Ledger(job)
    receipt_file(job, 1).write_bytes(bytes(receipt_file(job, 1).stat().st_size))
    assert Ledger(job).left == 1, "the one that is missing"
    damage = [finding for finding in check(Output(job.config.output)) if finding.is_damage]
    assert [finding.shard and finding.shard.name for finding in damage] == ["00001"]


def test_counts_are_glanced_at_without_a_look_at_the_files(job: Job, files_read: list[str]) -> None:
    told_but_for_the_last(job)
    files_read.clear()
    found = glance(job.config.output, {job.fingerprint}, job.shards)
    assert found
    assert (found.totals.done, files_read) == ({0, 1, 2, 3}, [PROGRESS_NAME])
    assert glance(job.config.output, {"of another run"}, job.shards) is None
    fewer = [*job.shards][:3]
    assert glance(job.config.output, {job.fingerprint}, fewer) is None, "it counts shards that the run does not have"


def test_shards_beyond_the_run_are_not_counted(job: Job) -> None:
    """Such as those of a longer run, whose receipts somebody has copied."""
    Ledger(job)
    found = look(job.config.output, {job.fingerprint}, [*job.shards][:3])
    assert found.totals.done == {0, 1, 2}


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


def test_counts_with_an_odd_fingerprint_are_not_believed(job: Job) -> None:
    Ledger(job)
    file = Path(job.config.output) / PROGRESS_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": []}))
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
