"""How a run stands, from its output alone."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import runs
from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.driver.ledger import Ledger
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output import lease, receipts
from vcf_batch.report import status
from vcf_batch.setup.job import Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Five shards of two rows, of which the first two and the last are done, by two workers at two rows in 4 s."""
    job = runs.write_output(runs.write_manifest(tmp_path / "in", 10), tmp_path / "out", 2, failed={1, 8})
    for number, receipt in runs.read_receipts(job.config.output).items():
        ended = (datetime.now(UTC) - timedelta(seconds=number)).isoformat()
        timings = {"ended": ended, "total": 4.0, "sample": 3.0, "worker": f"host:{number % 2}"}
        told = dataclasses.replace(receipt, timings=timings, device={"type": "gpu"})
        storage.publish_bytes(storage.join(job.config.output, f"{receipt.shard.name}_stats.json"), told.to_json())
    for name in ("00002", "00003"):
        (tmp_path / "out" / f"{name}_stats.json").unlink()
    return job


def files(output: str) -> Mapping[str, Any]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(output).iterdir() if path.is_file()
    }


def test_an_unfinished_run_is_told_from_its_output_alone(job: Job, tmp_path: Path) -> None:
    """Neither the manifest nor the references need to be there, and nothing is written."""
    (tmp_path / "in" / "manifest.parquet").unlink()
    before = files(job.config.output)
    found = status.read(job.config.output)
    assert (found.state, found.rows, found.shards, len(found.totals.done)) == ("stopped", 10, 5, 3)
    assert found.totals.counts == {"success": 4, "rejected": 0, "failed": 2}
    assert found.totals.rate == 1
    assert found.seconds_left == 4
    assert [(cause.status, cause.count, cause.text) for cause in found.causes] == [("failed", 2, "no")]
    assert files(job.config.output) == before


def test_the_files_of_a_large_run_at_work_are_not_listed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counts are those that its driver has told. If a shard that was counted is damaged, all are looked at."""
    Ledger(job)
    assert status.read(job.config.output).files_listed
    monkeypatch.setattr(status, "MOST_LISTED", 4)
    listed = status.read(job.config.output)
    assert listed.files_listed, "nobody is at work"
    with lease.hold(job.config.output):
        found = status.read(job.config.output)
        assert not found.files_listed
        assert "not listed" in str(found)
        assert (found.state, found.totals, found.causes) == ("running", listed.totals, listed.causes)
        (Path(job.config.output) / "00000.parquet").unlink()  # it has a row that failed
        damaged = status.read(job.config.output)
        assert (damaged.files_listed, [*damaged.damaged]) == (True, ["00000"])


def test_a_run_at_work_names_its_owner(job: Job) -> None:
    with lease.hold(job.config.output):
        found = status.read(job.config.output)
    assert found.state == "running"
    assert found.owner
    assert found.owner.alive
    assert "running, 6 of 10 rows (60%), 3 of 5 shards" in str(found)
    assert "left at this rate" in str(found)


def test_a_run_that_died_is_told_from_one_at_work(job: Job) -> None:
    """Though its lease is there still."""
    code = "import os, sys; from vcf_batch.output import lease; lease.Lease(sys.argv[1]).acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, job.config.output], check=False)
    found = status.read(job.config.output)
    assert found.state == "stopped"
    assert found.owner
    assert not found.owner.alive
    assert "it has died: rerun its command to resume" in str(found)


def test_the_command_tells_people_and_programs(job: Job) -> None:
    told = CliRunner().invoke(main, ["status", job.config.output])
    assert told.exit_code == 0
    assert "stopped, 6 of 10 rows" in told.output
    assert "2 x no" in told.output
    assert "  fusion    concat, strength 1\n" in told.output
    record = json.loads(CliRunner().invoke(main, ["status", job.config.output, "--json"]).output)
    assert record["state"] == "stopped"
    assert (record["fusion"], record["strength"]) == ("concat", 1.0)
    assert record["rows"] == {"total": 10, "success": 4, "rejected": 0, "failed": 2}
    assert record["shards"] == {"total": 5, "done": 3, "retried": 0}
    assert record["devices"] == {"gpu": {"rows": 6, "rows_per_worker_second": 0.5}}
    assert record["device_busy"] == 0.75


def test_the_model_is_told_and_the_embedded_one_by_what_it_is(job: Job, tmp_path: Path) -> None:
    assert "  model     m\n" in str(status.read(job.config.output))
    told = status.read(job.config.output).to_dict()
    assert (told["model"], told["embedded_test_model"]) == ("m", False)
    job = runs.write_output(runs.write_manifest(tmp_path / "x", 4), tmp_path / "y", 2, model="tiny")
    assert "  model     tiny (embedded test model)\n" in str(status.read(job.config.output))
    told = status.read(job.config.output).to_dict()
    assert (told["model"], told["embedded_test_model"]) == ("tiny", True)


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    job = runs.write_output(runs.write_manifest(tmp_path / "in", 4), tmp_path / "out", 2)
    found = status.read(job.config.output)
    assert (found.state, found.owner, found.seconds_left) == ("finished", None, None)
    assert "4 of 4 rows (100%)" in str(found)


def test_a_run_without_a_finished_shard_is_told_too(job: Job) -> None:
    for name in [name for name in files(job.config.output) if name.endswith(receipts.RECEIPT_SUFFIX)]:
        (Path(job.config.output) / name).unlink()
    found = status.read(job.config.output)
    assert "stopped, 0 of 10 rows (0%), 0 of 5 shards" in str(found)
    assert found.to_dict()["rows_per_second"] is None


def test_what_is_no_run_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        status.read(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(DamageFound, match="missing"):
        status.read(job.config.output)


@pytest.mark.parametrize("counted", [True, False])
def test_a_shard_whose_file_has_another_size_is_damaged_and_not_finished(job: Job, counted: bool) -> None:
    """Whether the driver has counted it or not."""
    if counted:
        Ledger(job)
    tar = Path(job.config.output, "00001.tar")
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        file.truncate(1000)
    Path(job.config.output, "00004.parquet").unlink()
    found = status.read(job.config.output)
    assert found.totals.done == {0}
    reason = f"00001.tar has 1000 bytes, its receipt says {size}"
    assert found.to_dict()["damaged"] == {"00001": reason, "00004": "00004.parquet is missing"}
    assert "stopped, 2 of 10 rows (20%), 1 of 5 shards, 2 damaged" in str(found)
    assert f"  damaged   00001: {reason}\n" in str(found)
