"""Finished shards are committed beside the loop that hands them in."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import runs
from vcf_batch import storage
from vcf_batch.driver import failing_shard
from vcf_batch.driver.commit_queue import COMMITS_AT_ONCE, MAX_PENDING, CommitQueue, Finished
from vcf_batch.driver.ledger import Ledger
from vcf_batch.errors import RefusedError, StorageError, VcfBatchError
from vcf_batch.output import commits, lease, receipts, run_file
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import Status
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.storage import drivers

Outcome = tuple[str, BaseException | None]


class Run:
    """Three shards of two rows that are generated and staged, and a driver that owns the output."""

    def __init__(self, job: Job) -> None:
        self.output, self.fingerprint = job.config.output, job.fingerprint
        self.expected = runs.data_files(Path(self.output))
        self.finished = []
        for receipt in runs.read_receipts(self.output).values():
            name = receipt.shard.name
            staged = {
                kind: f"{commits.STAGING}/{name}/{name}{suffix}" for kind, suffix in receipts.FILE_SUFFIXES.items()
            }
            Path(self.output, commits.STAGING, name).mkdir(parents=True)
            for kind, path in staged.items():
                storage.move(
                    storage.join(self.output, name + receipts.FILE_SUFFIXES[kind]), storage.join(self.output, path)
                )
            storage.remove(storage.join(self.output, name + receipts.RECEIPT_SUFFIX))
            self.finished.append(Finished(ShardTask(receipt.shard), "node", receipt, staged))
        self.ledger = Ledger(job)
        self.notes: list[str] = []
        self.queue: CommitQueue

    def commit(self, *finished: Finished) -> list[Outcome]:
        """Hand in shards and wait for what becomes of all that are pending."""
        for each in finished:
            self.queue.add(each)
        outcomes: list[Outcome] = []
        while len(self.queue):
            for each, error in self.queue.outcomes():
                outcomes.append((each.task.shard.name, error))
                if error is None:
                    self.ledger.committed(each.task, each.receipt)
                else:
                    self.ledger.left -= 1
            time.sleep(0.01)
        return outcomes

    def blamed(self, number: int) -> Finished:
        """A shard, as if all of its rows killed their workers."""
        finished = self.finished[number]
        verdicts = dict.fromkeys(range(finished.task.shard.start, finished.task.shard.stop), "it dies")
        counts: dict[Status, int] = {"success": 0, "rejected": 0, "failed": 2}
        return dataclasses.replace(
            finished,
            task=dataclasses.replace(finished.task, verdicts=verdicts),
            receipt=dataclasses.replace(finished.receipt, counts=counts, sampled=0),
        )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(failing_shard, "PAUSES", (0.05, 0.1))
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    prepared = Run(runs.write_output(runs.write_manifest(tmp_path / "in", 6), tmp_path / "out", 2))

    def note(message: str, *_: object, **__: object) -> None:
        prepared.notes.append(message)

    with (
        lease.hold(prepared.output) as held,
        CommitQueue(
            prepared.output,
            held,
            prepared.ledger,
            note,
            time.monotonic,
            ThreadPoolExecutor(1),
            lambda: run_file.check_stays(prepared.output, prepared.fingerprint),
        ) as prepared.queue,
    ):
        yield prepared


def test_shards_are_committed_in_the_order_in_which_they_come(run: Run) -> None:
    first, second, third = run.finished
    assert run.commit(third, first, second) == [("00002", None), ("00000", None), ("00001", None)]
    assert runs.data_files(Path(run.output)) == run.expected
    assert runs.read_receipts(run.output) == {each.receipt.shard.index: each.receipt for each in run.finished}
    assert not list(Path(run.output, commits.STAGING).iterdir())


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_commit_that_fails_is_repeated_with_the_files_that_are_staged(run: Run, kind: str) -> None:
    """Trouble of the storage costs no second computation, wherever it comes; the other shards do not wait for it."""
    obstacle = Path(run.output, f"00000{receipts.FILE_SUFFIXES[kind]}")
    (obstacle / "in the way").mkdir(parents=True)
    for finished in run.finished:
        run.queue.add(finished)
    runs.wait_for(lambda: bool([*run.queue.outcomes()]) and bool(run.notes))
    (obstacle / "in the way").rmdir()
    obstacle.rmdir()
    assert ("00000", None) in run.commit()
    assert "its commit failed and is repeated: cannot" in run.notes[0]
    assert runs.data_files(Path(run.output)) == run.expected
    assert len(runs.read_receipts(run.output)) == 3


def test_a_commit_that_always_fails_is_given_up(run: Run) -> None:
    Path(run.output, "00000.tar", "in the way").mkdir(parents=True)
    (outcome,) = run.commit(run.finished[0])
    assert isinstance(outcome[1], StorageError)
    assert len(run.notes) == len(failing_shard.PAUSES)


def test_a_shard_whose_staged_files_are_gone_is_generated_again(run: Run) -> None:
    commits.discard(run.output, run.finished[0].staged)
    (outcome,) = run.commit(run.finished[0])
    assert isinstance(outcome[1], commits.StagedFilesLost)
    assert not run.notes


def test_nothing_is_committed_once_the_lease_is_lost(run: Run) -> None:
    """The driver alone commits, and asks before each commit whether it still owns the output."""
    Path(run.output, lease.LEASE_NAME).write_text('{"pid": 4711, "host": "far"}')
    (outcome,) = run.commit(run.finished[0])
    assert isinstance(outcome[1], RefusedError)
    assert not runs.read_receipts(run.output)


def test_nothing_is_committed_beside_the_record_of_another_run(run: Run) -> None:
    """The driver asks before each commit whether run.json is still that of its run."""
    document = run_file.read_document(run.output)
    assert document
    run_file.write(run.output, run_file.document({**document["fields"], "seed": 9}, {}), replaces=True)
    (outcome,) = run.commit(run.finished[0])
    assert isinstance(outcome[1], RefusedError)
    assert "not of this run" in str(outcome[1])
    assert not runs.read_receipts(run.output)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_a_shard_of_blamed_rows_alone_has_the_same_fate_in_any_order(run: Run, order: tuple[int, ...]) -> None:
    """Where every row of a shard is blamed, a sample of any other shard shows that workers are healthy."""
    handed_in = [run.blamed(0), *run.finished[1:]]
    assert dict(run.commit(*(handed_in[number] for number in order))) == dict.fromkeys(("00000", "00001", "00002"))


def test_where_every_row_of_a_run_is_blamed_no_verdict_is_recorded(run: Run) -> None:
    """Only what repeats on a healthy worker marks a row."""
    outcomes = run.commit(*map(run.blamed, range(3)))
    assert [name for name, _ in outcomes] == ["00000", "00001", "00002"]
    assert all(isinstance(error, VcfBatchError) and "2 rows seem to kill" in str(error) for _, error in outcomes)
    assert not runs.read_receipts(run.output)


def test_samples_that_miss_their_gates_show_that_workers_are_healthy(run: Run) -> None:
    """A run of which every sample is rejected records its blamed rows like any other."""
    blamed = run.blamed(0)
    counts: dict[Status, int] = {"success": 0, "rejected": 1, "failed": 1}
    receipt = dataclasses.replace(blamed.receipt, counts=counts, sampled=1)
    assert run.commit(dataclasses.replace(blamed, receipt=receipt)) == [("00000", None)]


def test_rows_that_are_rejected_before_they_are_sampled_show_nothing_of_their_worker(run: Run) -> None:
    """A triplet without a reference says nothing of workers that all other rows of the run seem to kill."""
    blamed = run.blamed(0)
    counts: dict[Status, int] = {"success": 0, "rejected": 1, "failed": 1}
    unsampled = dataclasses.replace(blamed, receipt=dataclasses.replace(blamed.receipt, counts=counts))
    outcomes = run.commit(unsampled, run.blamed(1), run.blamed(2))
    assert all(isinstance(error, VcfBatchError) for _, error in outcomes)
    assert not runs.read_receipts(run.output)


class Counted(Executor):
    """Threads that carry out commits. ``peak`` is the number that were under way side by side, at most."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(8)
        self._lock = threading.Lock()
        self._number = self.peak = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def counted() -> Any:
            with self._lock:
                self._number += 1
                self.peak = max(self.peak, self._number)
            try:
                time.sleep(0.1)  # others begin meanwhile, if they may
                return fn(*args, **kwargs)
            finally:
                with self._lock:
                    self._number -= 1

        return self._threads.submit(counted)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


def test_commits_are_under_way_side_by_side(run: Run) -> None:
    """A commit takes seconds on an object store, and a thousand workers finish two shards a second."""
    run.queue._executor = executor = Counted()
    assert {name for name, error in run.commit(*run.finished) if error is None} == {"00000", "00001", "00002"}
    assert executor.peak == 3
    assert runs.data_files(Path(run.output)) == run.expected


def test_commits_leave_connections_for_heartbeats() -> None:
    """A lease whose heartbeat waits for commits that hang would be taken over."""
    assert COMMITS_AT_ONCE < drivers._CONNECTIONS


def test_a_storage_in_trouble_is_asked_for_one_commit_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is down for a while does not use up the tries of every finished shard."""
    commit, is_down = commits.commit, True

    def fails(*given: Any) -> Receipt:
        if is_down:
            raise StorageError("the storage is down")
        return commit(*given)

    monkeypatch.setattr(commits, "commit", fails)
    monkeypatch.setattr(failing_shard, "PAUSES", (0.0,) * 9)
    for finished in run.finished:
        run.queue.add(finished)
    runs.wait_for(lambda: not [*run.queue.outcomes()] and len(run.notes) >= 3)
    run.queue._executor = executor = Counted()
    runs.wait_for(lambda: not [*run.queue.outcomes()] and len(run.notes) >= 6)
    assert executor.peak == 1
    is_down = False
    assert [error for _, error in run.commit()] == [None] * 3


def test_what_is_staged_is_bounded(run: Run) -> None:
    """Where the storage is slower than the workers, they wait."""
    for finished in run.finished * (MAX_PENDING // 3):
        run.queue.add(finished)
    assert not run.queue.is_full
    run.queue.add(run.finished[0])
    run.queue.add(run.finished[0])
    assert run.queue.is_full


def test_of_an_attempt_at_a_shard_that_was_there_nothing_is_recorded(run: Run) -> None:
    """A listing that lags behind did not show the shard, and the row that the attempt blames has its sample."""
    there = run.finished[0]
    run.commit(there)
    staged = {kind: f"{commits.STAGING}/again/00000{suffix}" for kind, suffix in receipts.FILE_SUFFIXES.items()}
    for path in staged.values():
        storage.publish_bytes(storage.join(run.output, path), run.expected[storage.name(path)])
    blamed = dataclasses.replace(
        there,
        task=dataclasses.replace(there.task, verdicts={0: "it dies"}),
        receipt=dataclasses.replace(there.receipt, attempt=2),
        staged=staged,
    )
    run.queue.add(blamed)
    found: list[tuple[Finished, BaseException | None]] = []
    while not found:
        found += run.queue.outcomes()
        time.sleep(0.01)
    ((finished, error),) = found
    assert (error, finished.receipt, finished.task.verdicts) == (None, there.receipt, {})
    assert runs.read_receipts(run.output) == {0: there.receipt}
