"""Whole runs on storage that is not a healthy local disk: a real S3 server, and one that fails and fills up."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import runs, s3_server

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import fsspec.config
import ray

from vcf_batch import pool, storage
from vcf_batch.cli import main
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver import failing_shard
from vcf_batch.driver.ledger import Summary
from vcf_batch.errors import Interrupted, StorageError
from vcf_batch.output import progress_file, receipts, run_file
from vcf_batch.storage import retries

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS, SHARD_SIZE, BATCH_SIZE = 24, 4, 2
FAULTY = Path(__file__).parents[1] / "support" / "faulty"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What goes wrong with ``faulty://``. It is full while there is a file of that name."""
    full = tmp_path_factory.mktemp("faults") / "full"
    return {"every": 5, "seed": 1, "pause": 0.001, "full": str(full)}


@pytest.fixture(scope="module", autouse=True)
def cluster(faults: dict[str, Any], s3_endpoint: str) -> Iterator[None]:
    """One node. Its workers and this process, the driver, know both storages."""
    s3 = s3_server.options(s3_endpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTY", json.dumps(faults))
        patch.setenv("FSSPEC_S3", json.dumps(s3))
        patch.setenv("PYTHONPATH", str(FAULTY), prepend=os.pathsep)
        patch.syspath_prepend(str(FAULTY))
        fsspec.register_implementation("faulty", "faulty_storage.FaultyStorage")
        patch.setitem(fsspec.config.conf, "s3", s3)
        patch.setattr(retries, "PAUSE_SECONDS", 0.001)
        patch.setattr(failing_shard, "PAUSES", (0.1, 0.2))
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_manifest(tmp_path_factory.mktemp("manifest"), ROWS)


@pytest.fixture(scope="module")
def generate(model: Path, manifest: Path) -> Callable[[str], Summary]:
    settings: dict[str, Any] = {"model": str(model), "manifest": str(manifest), "shard_size": SHARD_SIZE, **runs.SIZE}
    return lambda output: pool.run(RunConfig(output=output, num_workers=1, batch_size=BATCH_SIZE, **settings))


@pytest.fixture(scope="module")
def undisturbed(model: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Name to bytes of the tars and parquets of a run on a healthy local disk."""
    output = tmp_path_factory.mktemp("undisturbed")
    runs.generate(manifest, output, model, shard_size=SHARD_SIZE, batch_size=BATCH_SIZE)
    assert {row["status"] for row in runs.rows_of(output)} == {"success"}
    return runs.data_files(output)


def data_files(output: str) -> dict[str, bytes]:
    names = sorted(name for name in storage.list_files(output) if name.endswith((".tar", ".parquet")))
    return {name: storage.read_bytes(storage.join(output, name)) for name in names}


def assert_nothing_is_left(output: str) -> None:
    """What a finished run leaves, and nothing else."""
    ends = (*receipts.FILE_SUFFIXES.values(), receipts.RECEIPT_SUFFIX)
    names = {f"{shard:05d}{end}" for shard in range(ROWS // SHARD_SIZE) for end in ends}
    assert set(storage.list_tree(output)) == {*names, run_file.RUN_FILE_NAME, progress_file.PROGRESS_NAME}


def test_a_run_on_s3_that_is_stopped_and_resumed_gives_the_bytes_of_a_local_one(
    s3: str, generate: Callable[[str], Summary], undisturbed: dict[str, bytes]
) -> None:
    """After any mix of faults and reruns the output is byte-identical to an undisturbed run's, through s3fs too."""

    def stop() -> None:
        runs.wait_for(lambda: bool(runs.read_receipts(s3)), 300)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Interrupted):
        generate(s3)
    stopper.join()
    finished = runs.read_receipts(s3)
    assert 0 < len(finished) < ROWS // SHARD_SIZE
    storage.remove(storage.join(s3, f"{min(finished):05d}.parquet"))
    left = ROWS // SHARD_SIZE - len(finished) + 1
    assert generate(s3).resumed_rows == ROWS - left * SHARD_SIZE
    assert data_files(s3) == undisturbed
    assert_nothing_is_left(s3)


def test_storage_that_fails_one_call_in_five_and_then_fills_up_changes_no_byte(
    tmp_path: Path,
    faults: dict[str, Any],
    generate: Callable[[str], Summary],
    undisturbed: dict[str, bytes],
) -> None:
    """Throttling, timeouts and resets are retried with backoff, bounded, and the run completes. Disk full: clear error,
    earlier shards intact, rerun completes."""
    full, output = Path(faults["full"]), tmp_path / "out"

    def fill() -> None:
        runs.wait_for(lambda: bool(list(output.glob("*_stats.json"))), 300)
        full.touch()

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        with pytest.raises(StorageError, match=r"No space left on device(.|\n)*room(.|\n)*rerun the same command"):
            generate(f"faulty://{output}")
    finally:
        filler.join()
        full.unlink(missing_ok=True)
    finished = runs.read_receipts(str(output))
    assert 0 < len(finished) < ROWS // SHARD_SIZE
    for receipt in finished.values():
        for kind, suffix in receipts.FILE_SUFFIXES.items():
            assert storage.digest(f"{output}/{receipt.shard.name}{suffix}") == receipt.files[kind]
    assert generate(f"faulty://{output}").resumed_rows == len(finished) * SHARD_SIZE
    assert runs.data_files(output) == undisturbed
    assert_nothing_is_left(str(output))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("disks cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_local_disk_that_fills_up_and_one_that_is_read_only(
    small_disk: Path, generate: Callable[[str], Summary], undisturbed: dict[str, bytes]
) -> None:
    """Disk full and read-only output: clear error, earlier shards intact, rerun completes. `verify` reads both."""
    output, ballast = small_disk / "out", small_disk / "ballast"

    def fill() -> None:
        runs.wait_for(lambda: bool(list(output.glob("*_stats.json"))), 300)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    filler = threading.Thread(target=fill)
    filler.start()
    with pytest.raises(StorageError, match=r"No space left on the disk(.|\n)*room(.|\n)*rerun the same command"):
        generate(str(output))
    filler.join()
    assert all(undisturbed[name] == data for name, data in runs.data_files(output).items())
    assert 0 < len(runs.read_receipts(str(output))) < ROWS // SHARD_SIZE

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        generate(str(output))
    looked_at = CliRunner().invoke(main, ["verify", str(output)])
    assert looked_at.exit_code == 6, looked_at.output  # unfinished, and nothing damaged

    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    ballast.unlink()
    assert generate(str(output)).counts["success"] == ROWS
    assert runs.data_files(output) == undisturbed
    assert_nothing_is_left(str(output))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    verified = CliRunner().invoke(main, ["verify", str(output), "--regenerate", "1"])
    assert verified.exit_code == 0, verified.output
