"""Faults of workers, nodes and drivers on a real Ray cluster of two nodes on this machine (docs/reliability.md)."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import runs

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray.cluster_utils import Cluster

from support import faults
from vcf_batch import pool
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver import bisection, failing_shard, heartbeats, quarantine, workers
from vcf_batch.driver.progress import Progress
from vcf_batch.errors import VcfBatchError
from vcf_batch.output import commits
from vcf_batch.output.receipts import Receipt
from vcf_batch.pool import ray_cluster

ray.cloudpickle.register_pickle_by_value(faults)
"""Workers cannot import what lies beside the tests."""

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS, SHARD_SIZE, BATCH_SIZE = 16, 4, 2

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU; this process is connected as the driver."""
    with tempfile.TemporaryDirectory(prefix="vf", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder}
        )
        try:
            for address in ("127.0.0.2", "127.0.0.3"):
                nodes.add_node(num_cpus=1, node_ip_address=address)
            ray.init(address=nodes.address, log_to_driver=False)
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the run tells the user."""
    found: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, message, *_, **__: found.append(message))
    return found


@pytest.fixture
def configure(cluster: Cluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Runs over a manifest of this test's own, whose workers obey orders beside it."""
    monkeypatch.setattr(ray_cluster, "Actor", faults.faulty_actor(str(tmp_path / "in" / "manifest.parquet")))
    monkeypatch.setattr(failing_shard, "PAUSES", (0.1, 0.2))

    def build(output: str = "out", columns: dict[str, list[Any]] | None = None, **options: Any) -> RunConfig:
        manifest = tmp_path / "in" / "manifest.parquet"
        if not manifest.exists():
            runs.write_manifest(tmp_path / "in", ROWS, columns)
        settings = {"model": str(model), "manifest": str(manifest), "shard_size": SHARD_SIZE, "batch_size": BATCH_SIZE}
        return RunConfig(
            **{**settings, **runs.SIZE, "output": str(tmp_path / output), "num_workers": 2, "gpus_per_worker": 0}
            | options
        )

    return build


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    manifest = runs.write_manifest(folder / "in", ROWS)
    return runs.generate(manifest, folder / "out", model, shard_size=SHARD_SIZE, batch_size=BATCH_SIZE)


def order(config: RunConfig, *names: str) -> Path:
    folder = faults.orders(config.manifest)
    faults.give(folder, *names)
    return folder


def orders_left(config: RunConfig) -> list[str]:
    return sorted(path.name for path in faults.orders(config.manifest).iterdir())


# With half a file in scratch, and with staged files, by one worker. The other phases leave no more than those do;
# `make test-all` has them all, with two workers.
@pytest.mark.parametrize(
    ("phases", "num_workers"),
    [(("tar", "staged"), 1), pytest.param(faults.WORKER_PHASES, 2, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_workers_killed_in_every_phase_cost_no_byte(
    phases: tuple[str, ...],
    num_workers: int,
    undisturbed: Path,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker may be killed at any moment: loading, sampling, scoring, writing the tar or the parquet, before the
    files are staged, after it, and when its shard is committed. The output is that of an undisturbed run."""
    # All of it may happen to one shard, which shall not be looked into for that.
    monkeypatch.setattr(failing_shard, "PAUSES", (0.1,) * len(faults.WORKER_PHASES))
    config = configure(num_workers=num_workers)
    folder = order(config, *(f"{phase}.kill" for phase in phases))
    (folder / "pids").mkdir()
    commit, receipts = commits.commit, list[Receipt]()

    def commit_while_workers_die(*given: Any) -> Receipt:
        """The first time: before its files are moved, and after its receipt is written."""
        if not receipts:
            kill_workers()
        receipt = commit(*given)
        if not receipts:
            kill_workers()
        receipts.append(receipt)
        return receipt

    def kill_workers() -> None:
        for worker in faults.workers(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    monkeypatch.setattr(commits, "commit", commit_while_workers_die)
    pool.run(config)
    assert len(receipts) == ROWS // SHARD_SIZE
    assert orders_left(config) == ["pids"]
    assert runs.data_files(Path(config.output)) == runs.data_files(undisturbed)
    assert not list(Path(config.output).glob("_staging/*"))


def test_a_worker_that_dies_with_two_shards_blames_neither(
    undisturbed: Path, configure: Configure, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the shards did it shows when each is tried alone: that costs neither of them one of its attempts."""
    monkeypatch.setattr(failing_shard, "PAUSES", ())  # a shard that is blamed is searched at once
    config = configure(num_workers=1)
    order(config, "sample.kill")
    pool.run(config)
    repeated = [note for note in notes if "is repeated alone" in note]
    tried = {receipt.shard.name: receipt.attempt for receipt in runs.read_receipts(config.output).values()}
    again = [name for name, attempt in tried.items() if attempt == 2]
    assert len(again) == len(repeated) == 2
    assert all(any(f"shard {name} " in note for note in repeated) for name in again)
    assert max(tried.values()) == 2
    assert runs.data_files(Path(config.output)) == runs.data_files(undisturbed)


def failed_rows(config: RunConfig) -> dict[int, str]:
    """Number and error message of the rows that failed."""
    rows = runs.rows_of(Path(config.output))
    return {number: row["error_message"] for number, row in enumerate(rows) if row["status"] == "failed"}


def prompts(**orders: str) -> dict[str, list[Any]]:
    """The usual prompts, but for some rows: ``row5="kill"``."""
    usual = [runs.PROMPTS[row % len(runs.PROMPTS)] for row in range(ROWS)]
    for name, action in orders.items():
        row = int(name.removeprefix("row"))
        usual[row] = f"{action} {usual[row]}"
    return {"prompt": usual}


def check_that_only_these_fail(config: RunConfig, undisturbed: Path, failed: dict[int, str]) -> None:
    """Every other row has the bytes that it has in a run where nothing happened."""
    found, expected = failed_rows(config), runs.rows_of(undisturbed)
    assert found.keys() == failed.keys()
    assert all(part in found[row] for row, part in failed.items())
    rows = runs.rows_of(Path(config.output))
    assert [row for number, row in enumerate(rows) if number not in failed] == [
        row for number, row in enumerate(expected) if number not in failed
    ]


def test_a_row_that_kills_its_worker_fails_alone(
    undisturbed: Path, configure: Configure, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kills its worker again and again is recorded as failed with the reason, and the rest completes, at the same
    bytes. (Fewer repetitions than in earnest: driver/test_failing_shard.py has those.)"""
    monkeypatch.setattr(failing_shard, "PAUSES", (0.0,))
    monkeypatch.setattr(bisection, "REPEATS", 1)
    config = configure(columns=prompts(row7="kill"), max_failed=1.0, num_workers=1)
    assert pool.run(config).counts == {"success": ROWS - 1, "rejected": 0, "failed": 1}
    check_that_only_these_fail(config, undisturbed, {7: "the process of the worker that generates this row dies"})
    assert any(note.startswith("row 7 is recorded as failed") for note in notes)


@pytest.mark.slow
def test_rows_that_kill_hang_and_raise_fail_alone(undisturbed: Path, configure: Configure, notes: list[str]) -> None:
    """Several culprits of every kind, two of them in one shard."""
    columns = prompts(row0="kill", row6="fail", row7="kill", row13="hang")
    config = configure(columns=columns, stall_timeout=60.0)
    pool.run(config)
    check_that_only_these_fail(
        config,
        undisturbed,
        {0: "dies", 6: "fails with ZeroDivisionError; so it was", 7: "dies", 13: "gives no sign of life"},
    )
    assert not any("left out" in note for note in notes)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(
    undisturbed: Path, configure: Configure, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray never notices a hang, nor a frozen process: a worker that gives no heartbeat is killed and its shard done
    again."""
    monkeypatch.setattr(failing_shard, "PAUSES", (0.1,) * 9)  # a busy machine may seem to hang
    config = configure(stall_timeout=8.0)
    pids = order(config, "sample.hang", "score.stop") / "pids"
    pids.mkdir()
    pool.run(config)
    stalls = sum("no heartbeat for 8 s" in note for note in notes)
    assert stalls >= 2
    # While one hangs, no others are started for the shard that waits behind it.
    assert len([*pids.iterdir()]) <= 2 + stalls
    assert runs.data_files(Path(config.output)) == runs.data_files(undisturbed)


@pytest.mark.slow
def test_a_worker_that_hangs_before_it_says_where_it_is_is_replaced(
    undisturbed: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell it from one that waits for a machine, so a worker that has not come up for long is asked for
    again. It counts as no failure."""
    monkeypatch.setattr(heartbeats, "LOAD_SECONDS", 0.0)
    config = configure(num_workers=1, stall_timeout=30.0)
    order(config, "init.hang")
    pool.run(config)
    assert not orders_left(config)
    assert runs.data_files(Path(config.output)) == runs.data_files(undisturbed)


def workers_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


@pytest.mark.parametrize("what", ["init", *(pytest.param(step, marks=pytest.mark.slow) for step in ("load", "run"))])
def test_a_bad_node_is_left_out_and_nobody_is_blamed(
    what: str, undisturbed: Path, configure: Configure, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node on which three attempts in a row fail while others succeed gets no more work; its failures count against
    no shard and no row."""
    monkeypatch.setattr(workers, "CAPACITY_SECONDS", 0.5)
    config = configure(num_workers=None, shard_size=1, batch_size=1)
    bad = workers_nodes()[0]
    hold = order(config, f"no-{what}-on-{bad}", "hold") / "hold"

    def release() -> None:
        runs.wait_for(lambda: sum("as ordered" in note for note in notes) >= quarantine.FAILURES, seconds=300)
        hold.unlink()

    releaser = threading.Thread(target=release)
    releaser.start()
    assert pool.run(config).counts["success"] == ROWS
    releaser.join()
    (left_out,) = [note for note in notes if "left out" in note]
    assert bad in left_out


@pytest.mark.slow
def test_where_memory_is_too_small_batches_shrink_on_request(configure: Configure, notes: list[str]) -> None:
    """Out of GPU memory: tried again in a fresh process; then, if allowed, with fewer rows at once, which the receipt
    tells. (Simulated: the order is a limit on the rows of a batch.)"""
    config = configure(allow_smaller_batches=True, limit=SHARD_SIZE, num_workers=1)
    (faults.orders(config.manifest) / "rows-in-memory").write_text("1")
    assert pool.run(config).counts["success"] == SHARD_SIZE
    (receipt,) = runs.read_receipts(config.output).values()
    assert (receipt.sampled_at_once, receipt.attempt) == (1, 3)
    assert sum("out of GPU memory with 2 images of 32x32" in note for note in notes) == 2


@pytest.mark.slow
def test_where_memory_is_too_small_the_remedy_is_told(
    undisturbed: Path, configure: Configure, notes: list[str]
) -> None:
    """Without the option no byte changes: the shard is set aside, and the error names the option. It is not content:
    the same command with it goes on."""
    config = configure()
    folder = faults.orders(config.manifest)
    (folder / "rows-in-memory").write_text("1")
    with pytest.raises(VcfBatchError, match=r"4 of 4 shards failed again and again(.|\n)*--allow-smaller-batches"):
        pool.run(config)
    (folder / "rows-in-memory").unlink()
    pool.run(config.replace(allow_smaller_batches=True))
    assert runs.data_files(Path(config.output)) == runs.data_files(undisturbed)


def start(config: RunConfig, cluster: Cluster) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    arguments = [config.manifest, config.output, "--model", config.model, "--address", cluster.address]
    for name in ("shard_size", "batch_size", "height", "width", "num_workers", "gpus_per_worker"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return subprocess.Popen(
        [sys.executable, faults.__file__, "generate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(driver: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = driver.communicate(timeout=600)
    return driver.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("step", ["commit", "first file", "both files", "receipt"])
def test_a_driver_killed_between_the_steps_of_a_commit_is_resumed(
    step: str, cluster: Cluster, undisturbed: Path, configure: Configure
) -> None:
    """A shard without a receipt does not exist: the same command does it again; with one it stays."""
    config = configure(num_workers=1)
    order(config, f"{step}.kill")
    code, _ = ended(start(config, cluster))
    assert code == -signal.SIGKILL
    output = Path(config.output)
    assert len(list(output.glob("*_stats.json"))) == (step == "receipt")
    assert (
        len(list(output.glob("0*.tar"))) + len(list(output.glob("0*.parquet")))
        == ({"commit": 0, "first file": 1, "both files": 2, "receipt": 2}[step])
    )
    assert pool.run(config).resumed_rows == (SHARD_SIZE if step == "receipt" else 0)
    assert runs.data_files(output) == runs.data_files(undisturbed)
    assert sorted(path.name for path in output.iterdir() if path.suffix not in (".tar", ".parquet")) == [
        *(f"{number:05d}_stats.json" for number in range(ROWS // SHARD_SIZE)),
        "_progress.json",
        "run.json",
    ]


@pytest.mark.slow
def test_ctrl_c_twice_ends_a_run_at_once(cluster: Cluster, undisturbed: Path, configure: Configure) -> None:
    """Once: finished shards are kept, and the message says how to go on. Twice: without waiting for anything."""
    config = configure(num_workers=1)
    for signals, code in ((1, 130), (2, 130)):
        order(config, "sample.hang")
        driver = start(config, cluster)
        runs.wait_for(lambda: not orders_left(config), seconds=300)
        for _ in range(signals):
            driver.send_signal(signal.SIGINT)
        found, output = ended(driver)
        assert found == code
        assert "rerun the same command" in output
        assert "Traceback" not in output
    pool.run(config)
    assert runs.data_files(Path(config.output)) == runs.data_files(undisturbed)


@pytest.mark.slow
def test_nodes_may_come_and_go(
    cluster: Cluster, configure: Configure, notes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is lost costs its shards an attempt that does not count; a node that joins gets work."""
    monkeypatch.setattr(workers, "CAPACITY_SECONDS", 0.5)
    config = configure(num_workers=None, shard_size=1, batch_size=1)
    pool.run(configure(output="alone", shard_size=1, batch_size=1))
    failure: list[BaseException] = []

    def work() -> None:
        try:
            pool.run(config)
        except BaseException as error:
            failure.append(error)

    # Three workers stand still; all their nodes go, and two others come.
    before = [*cluster.worker_nodes, cluster.add_node(num_cpus=1)]
    order(config, *(f"sample.hang.{number}" for number in range(len(before))))
    run = threading.Thread(target=work)
    run.start()
    runs.wait_for(lambda: not orders_left(config), seconds=300)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    for node in before:
        cluster.remove_node(node)
    run.join()
    assert not failure
    assert runs.data_files(Path(config.output)) == runs.data_files(tmp_path / "alone")
    assert {receipt.attempt for receipt in runs.read_receipts(config.output).values()} == {1, 2}
