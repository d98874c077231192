"""Runs on a real Ray cluster of two nodes on this machine."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch

from support import runs

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.cluster_utils import Cluster

from vcf_batch import pool
from vcf_batch.commands import verify
from vcf_batch.commands.repair import Repair
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver import failing_shard
from vcf_batch.driver.progress import Progress
from vcf_batch.driver.workers import Workers
from vcf_batch.errors import ModelError, RefusedError, StorageError, UsageError
from vcf_batch.output import lease
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.pool import launch, nodes
from vcf_batch.setup import storage_check
from vcf_batch.setup.job import Job

ROOT = Path(__file__).parents[2]
ROWS, SHARD_SIZE, BATCH_SIZE = 40, 4, 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of one CPU each; this process is connected as the driver."""
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
        )
        try:
            nodes.add_node(num_cpus=1)
            ray.init(address=nodes.address, log_to_driver=False)
            yield nodes.address
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_manifest(tmp_path_factory.mktemp("manifest"), ROWS)


@pytest.fixture(scope="module")
def configure(cluster: str, model: Path, manifest: Path) -> Callable[..., RunConfig]:
    def build(output: Path, **options: Any) -> RunConfig:
        settings = {"model": str(model), "manifest": str(manifest), "shard_size": SHARD_SIZE, "batch_size": BATCH_SIZE}
        return RunConfig(**{**settings, **runs.SIZE, "output": str(output), "num_workers": 2, **options})

    return build


@pytest.fixture(scope="module")
def undisturbed(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with two workers on two nodes."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    summary = pool.run(configure(output))
    assert summary.counts == {"success": ROWS, "rejected": 0, "failed": 0}
    return output


def receipts(output: Path) -> list[Receipt]:
    return [receipt for _, receipt in sorted(runs.read_receipts(str(output)).items())]


def test_two_nodes_load_the_model_once_per_worker(undisturbed: Path) -> None:
    """A model loads once per actor."""
    done = receipts(undisturbed)
    assert len(done) == ROWS // SHARD_SIZE
    assert {receipt.timings["model_loads"] for receipt in done} == {1}
    assert 1 <= len({receipt.timings["worker"] for receipt in done}) <= 2
    assert [row["label"] for row in runs.rows_of(undisturbed)] == [f"row {number}" for number in range(ROWS)]
    assert not list(undisturbed.glob("_staging/*"))


def test_the_benchmark_of_the_driver_runs(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    dispatch, plan = importlib.import_module("dispatch"), importlib.import_module("plan")
    for module in (dispatch, plan):
        ray.cloudpickle.register_pickle_by_value(module)  # workers do not find them
    assert all(seconds > 0 for seconds in dispatch.cost_of_a_shard(20, 2))
    share, processor = dispatch.share_at_work(2, 1.0)
    assert share > 0 and processor > 0


def test_one_worker_gives_the_same_bytes(
    undisturbed: Path, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The output does not depend on worker count or arrival order. While one shard is sampled, the next one waits."""
    pool.run(configure(tmp_path / "out", num_workers=1))
    assert runs.data_files(tmp_path / "out") == runs.data_files(undisturbed)
    timings = [receipt.timings for receipt in receipts(tmp_path / "out")]
    assert len({timing["worker"] for timing in timings}) == 1
    assert any(timing["wait_for_turn"] > 0 for timing in timings)


@pytest.mark.slow
def test_a_killed_worker_costs_an_attempt_and_no_byte(
    undisturbed: Path, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The output does not depend on retries."""
    output = tmp_path / "out"
    killed: list[int] = []

    def kill_one() -> None:
        runs.wait_for(lambda: bool(list(output.glob("*_stats.json"))))
        killed.append(int(receipts(output)[0].timings["worker"].rpartition(":")[2]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        summary = pool.run(configure(output, num_workers=1))
    finally:
        killer.join()
    assert killed
    assert summary.counts["success"] == ROWS
    assert runs.data_files(output) == runs.data_files(undisturbed)
    assert len({receipt.timings["worker"] for receipt in receipts(output)}) == 2


def start_driver(config: RunConfig, address: str) -> subprocess.Popen[str]:
    """The command in a process of its own, once two shards are committed."""
    arguments = [
        config.manifest,
        config.output,
        "--model",
        str(config.model),
        "--address",
        address,
        "--num-workers",
        "1",
    ]
    for name in ("shard_size", "batch_size", "height", "width"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    output = Path(config.output)
    before = len(list(output.glob("*_stats.json")))
    driver = subprocess.Popen(
        [sys.executable, "-m", "vcf_batch", "generate", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        runs.wait_for(
            lambda: len(list(output.glob("*_stats.json"))) >= before + 2 or driver.poll() is not None, seconds=90
        )
    except BaseException:
        driver.kill()
        raise
    return driver


@pytest.mark.slow
def test_a_stopped_and_a_killed_driver_are_resumed_by_the_same_command(
    cluster: str, undisturbed: Path, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Rerunning the same command is the resume; two runs, one disturbed and one not, give identical bytes."""
    config = configure(tmp_path / "out")
    output = tmp_path / "out"

    driver = start_driver(config, cluster)
    driver.terminate()
    _, message = driver.communicate(timeout=60)
    assert driver.returncode == 143
    assert "rerun the same command" in message
    assert "Traceback" not in message
    stopped = len(receipts(output))

    driver = start_driver(config, cluster)
    driver.kill()
    driver.communicate(timeout=60)
    killed = len(receipts(output))
    assert 0 < stopped < killed < ROWS // SHARD_SIZE

    summary = pool.run(config)
    assert summary.resumed_rows == killed * SHARD_SIZE
    assert summary.counts["success"] == ROWS
    assert runs.data_files(output) == runs.data_files(undisturbed)
    assert not list(output.glob("_staging/*"))


def test_a_driver_that_lost_the_output_stops_and_commits_nothing_more(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """A driver that was suspended while another took over notices before it commits, and stops with exit code 4."""
    output = tmp_path / "out"
    committed: list[int] = []

    def take_over() -> None:
        runs.wait_for(lambda: bool(list(output.glob("*_stats.json"))))
        (output / lease.LEASE_NAME).write_text('{"pid": 4711, "host": "far"}')
        committed.append(len(receipts(output)))

    taker = threading.Thread(target=take_over)
    taker.start()
    try:
        with pytest.raises(RefusedError, match=r"process 4711 on far.* took over"):
            pool.run(configure(output, num_workers=1))
    finally:
        taker.join()
    # One commit may have been under way.
    assert committed[0] <= len(receipts(output)) <= committed[0] + 1
    assert json.loads((output / lease.LEASE_NAME).read_text())["pid"] == 4711


# `make test` has this without Ray: see
# driver/test_commit_queue.py::test_nothing_is_committed_beside_the_record_of_another_run.
@pytest.mark.slow
def test_a_driver_that_lost_its_run_file_stops_and_commits_nothing_more(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The record of a run is checked before each commit, so that no shard is added to another run."""
    output = tmp_path / "out"
    committed: list[int] = []

    def replace() -> None:
        runs.wait_for(lambda: bool(list(output.glob("*_stats.json"))))
        (output / "run.json").unlink()
        committed.append(len(receipts(output)))

    replacer = threading.Thread(target=replace)
    replacer.start()
    try:
        with pytest.raises(RefusedError, match=r"run\.json is not of this run, \w{12}, any more: it is gone"):
            pool.run(configure(output, num_workers=1))
    finally:
        replacer.join()
    # One commit may have been under way.
    assert committed[0] <= len(receipts(output)) <= committed[0] + 1


def test_a_driver_that_lost_the_output_before_its_nodes_are_checked_is_refused(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes do not see its lease any more. That is no wrong option: exit code 4, not 2."""
    check = nodes.StorageCheck

    def late(job: Job) -> nodes.StorageCheck:
        (tmp_path / "out" / lease.LEASE_NAME).write_text('{"pid": 4711, "host": "far"}')
        return check(job)

    monkeypatch.setattr(nodes, "StorageCheck", late)
    with pytest.raises(RefusedError, match=r"process 4711 on far.* took over"):
        pool.run(configure(tmp_path / "out", num_workers=1))


def test_no_shard_is_begun_before_all_nodes_are_known_to_see_the_storage(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on nodes that do not share the output is refused, also if a worker of another node has loaded before that
    is known. Nothing is generated, and no worker is left."""
    output, ready, bad = tmp_path / "out", tmp_path / "ready", ray.nodes()[-1]["NodeID"]

    def check(job: Job) -> None:
        if ray.get_runtime_context().get_node_id() == bad:
            while not ready.exists():
                time.sleep(0.05)
            raise UsageError("node far does not see the output")

    monkeypatch.setattr(storage_check, "check_storage", check)
    loaded = Workers.loaded

    def note(workers: Workers, *answer: Any) -> bool:
        ready.touch()
        return loaded(workers, *answer)

    monkeypatch.setattr(Workers, "loaded", note)
    with pytest.raises(UsageError, match="node far does not see the output"):
        pool.run(configure(output))
    assert not [*output.glob("0*"), *output.glob("_staging/*")]
    runs.wait_for(lambda: ray.available_resources().get("CPU") == 2)


def test_a_finished_run_does_nothing_again(
    undisturbed: Path, configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes nothing, and does not wait for Ray to start."""
    monkeypatch.setattr(launch, "cluster", lambda _: pytest.fail("Ray was started"))
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    summary = pool.run(configure(undisturbed, num_workers=1))
    assert summary.resumed_rows == ROWS
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


@pytest.mark.usefixtures("restored_torch")
def test_a_repaired_output_is_what_an_undisturbed_run_writes(
    configure: Callable[..., RunConfig], model: Path, tmp_path: Path
) -> None:
    """Failed rows, whose cause is gone, and damaged shards are generated again; the rest is not touched."""
    source = tmp_path / "in"
    references = [f"reference{row % 3}.png" for row in range(11)]
    manifest = str(runs.write_manifest(source, 12, {"reference": [*references, "late.png"]}))
    config = configure(tmp_path / "out", manifest=manifest, num_workers=1, gpus_per_worker=0)
    runs.run_here(config)
    assert [row["status"] for row in runs.rows_of(tmp_path / "out")].count("failed") == 1
    damaged = bytearray((tmp_path / "out" / "00001.tar").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "out" / "00001.tar").write_bytes(damaged)
    (source / "late.png").write_bytes(runs.png(99))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("00000*")}

    opened, notes = Output(config.output), list[str]()
    summary = pool.run(config, lambda: Repair(opened, "status = 'failed'").rows(notes.append))
    assert notes[0].startswith("00001: ")
    assert notes[1:] == ["5 rows in 2 shards are to be generated again"]
    assert (summary.counts["failed"], summary.resumed_rows) == (0, 4 + 3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("00000*")} == before
    assert list(verify.check(opened)) == []
    settings = {"shard_size": SHARD_SIZE, "batch_size": BATCH_SIZE}
    undisturbed = runs.generate(Path(manifest), tmp_path / "undisturbed", model, **settings)
    assert runs.data_files(tmp_path / "out") == runs.data_files(undisturbed)


def test_another_run_in_the_output_is_refused(
    undisturbed: Path, configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A different fingerprint in the same output is refused with both values shown, before Ray is started."""
    monkeypatch.setattr(launch, "cluster", lambda _: pytest.fail("Ray was started"))
    with pytest.raises(RefusedError, match=r"seed: 0 there, 7 now(.|\n)*steps: 4 there, 5 now"):
        pool.run(configure(undisturbed, seed=7, steps=5))


class Stopped(NamedTuple):
    """What a run leaves behind two of whose shards fail for good."""

    output: Path
    error: str
    finished: list[int]
    """The indices of the shards that are finished."""


@pytest.fixture(scope="module")
def stopped(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Something is in the way of two of its files, at first."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    in_the_way = [output / name for name in ("00001.tar", "00007.parquet")]
    for name in in_the_way:
        (name / "in the way").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failing_shard, "PAUSES", (0.1, 0.2))
        with pytest.raises(StorageError) as error:
            pool.run(configure(output, num_workers=1))
    for name in in_the_way:
        shutil.rmtree(name)
    return Stopped(output, str(error.value), [receipt.shard.index for receipt in receipts(output)])


def test_a_shard_that_fails_again_and_again_does_not_stop_the_others(stopped: Stopped) -> None:
    """Trouble of storage fails the attempt, never the row, and never silently; what fails for good is named, and the
    rest completes."""
    named = (
        r"2 of 10 shards failed again and again: 0000[17] \(rows .*\), 0000[17] \(rows .*\)\. The last reason: .*0000"
    )
    assert re.search(rf"{named}(.|\n)*rerun the same command", stopped.error)
    assert stopped.finished == [0, 2, 3, 4, 5, 6, 8, 9]


def test_a_shard_whose_files_are_gone_is_generated_again(
    stopped: Stopped, undisturbed: Path, configure: Callable[..., RunConfig]
) -> None:
    """A receipt whose files are missing or of another size counts as absent. Once the cause is gone, the same command
    does what failed, too."""
    (stopped.output / "00003.tar").unlink()
    (stopped.output / "00005.parquet").write_bytes(b"short")
    summary = pool.run(configure(stopped.output, num_workers=1))
    assert summary.resumed_rows == ROWS - 4 * SHARD_SIZE
    assert runs.data_files(stopped.output) == runs.data_files(undisturbed)


def test_a_reference_whose_storage_is_gone_fails_its_row_in_the_end(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble of storage fails the attempt, never the row: only what repeats marks a row."""
    monkeypatch.setattr(failing_shard, "PAUSES", (0.1, 0.2))
    gone = tmp_path / "gone"
    source = runs.write_manifest(tmp_path / "in", 4, {"reference": [str(gone / "a.png"), None, None, None]})
    config = configure(tmp_path / "out", manifest=str(source), reference_root=(str(gone),), num_workers=1)
    assert pool.run(config).counts == {"success": 3, "rejected": 0, "failed": 1}
    (receipt,) = receipts(tmp_path / "out")
    assert receipt.attempt == 3
    assert "is not there on this machine" in runs.rows_of(tmp_path / "out")[0]["error_message"]


def test_a_model_that_does_not_load_ends_the_run_at_once(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    broken = runs.save_model(tmp_path / "model")
    # Whole files, of a UNet that lacks a weight.
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: own for name, own in tensors.items() if name != "conv_in.weight"}, weights)
    with pytest.raises(
        ModelError, match=r"the unet of .* lacks 1 weights, among them conv_in\.weight; copy the model again"
    ):
        pool.run(configure(tmp_path / "out", model=str(broken), num_workers=1))


@pytest.mark.slow
def test_once_a_worker_has_loaded_a_failed_start_is_its_nodes_trouble(
    undisturbed: Path,
    configure: Callable[..., RunConfig],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trouble of a node fails the attempt, not the run."""
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, message, *_, **__: notes.append(message))
    output, own = tmp_path / "out", shutil.copytree(model, tmp_path / "model")
    weights = own / "unet" / "diffusion_pytorch_model.safetensors"

    def break_for_a_while() -> None:
        runs.wait_for(lambda: bool(list(output.glob("*_stats.json"))))
        weights.rename(own / "elsewhere")
        os.kill(int(receipts(output)[0].timings["worker"].rpartition(":")[2]), signal.SIGKILL)
        runs.wait_for(lambda: any("did not start" in note for note in notes))
        (own / "elsewhere").rename(weights)

    breaker = threading.Thread(target=break_for_a_while)
    breaker.start()
    try:
        pool.run(configure(output, model=str(own), num_workers=1))
    finally:
        breaker.join()
    assert runs.data_files(output) == runs.data_files(undisturbed)


def test_references_outside_the_allowed_places_are_refused_before_a_model_loads(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """When most of the first 1,000 rows would fail by policy, the run is refused before a model loads."""
    source = runs.write_manifest(tmp_path / "in", 4, {"reference": ["/etc/a.png", "/etc/b.png", "/etc/c.png", None]})
    with pytest.raises(UsageError, match=r"3 of the first 4 rows(.|\n)*--reference-root"):
        pool.run(configure(tmp_path / "out", manifest=str(source), model=str(tmp_path / "no model")))
    assert not (tmp_path / "out").exists()
