"""The loop that hands shards to workers, has the results committed, and decides what follows a failure."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.cluster import Answer, Cluster, Heartbeat, Loaded, Request, WorkerHandle
from vcf_batch.driver.commit_queue import CommitQueue, Finished
from vcf_batch.driver.device_types import DeviceTypes
from vcf_batch.driver.fault import Fault
from vcf_batch.driver.heartbeats import Watch
from vcf_batch.driver.ledger import Ledger
from vcf_batch.driver.progress import Progress, plural
from vcf_batch.driver.shard_queue import ShardQueue
from vcf_batch.driver.workers import Workers
from vcf_batch.errors import RefusedError, StorageError, Unfinished, UsageError, VcfBatchError, redact
from vcf_batch.output.commits import StagedFilesLost
from vcf_batch.output.receipts import Receipt
from vcf_batch.setup.shard_task import ShardTask

SHARDS_AT_ONCE = 2
"""Number of shards that one worker has. While one is sampled, the next one's first references are read, or the last
one's files are staged."""

ANSWER_SECONDS = 1.0
"""Longest wait for an answer, in seconds, before the loop turns to commits, silent workers and the display."""

WAITING_SECONDS = 30.0
"""Seconds without a ready worker after which the user is told what the run waits for."""


class Work(Protocol):
    """What the loop knows of its work, such as a :class:`vcf_batch.setup.job.Job`."""

    @property
    def config(self) -> RunConfig:
        """Settings of the workers."""

    @property
    def profiled(self) -> int | None:
        """See :attr:`vcf_batch.setup.job.Job.profiled`."""


class Exporter(Protocol):
    """Receiver of a run's figures, such as :class:`vcf_batch.pool.prometheus.PrometheusExporter`."""

    def committed(self, receipt: Receipt) -> None:
        """Take the receipt of a shard that has just been committed."""

    def now(self, rows_done: int, workers: int) -> None:
        """Take the number of rows generated so far, and the number of ready workers."""


class Loop:
    """A run from its first worker to its last commit.

    Args:
        job: the run.
        cluster: the cluster that runs the workers; every time is read from its clock.
        ledger: the record of shards that are committed, and of those that are left.
        commits: the queue that commits finished shards.
        progress: the display for the user.
        exporter: the receiver of figures for monitoring.
    """

    def __init__(
        self, job: Work, cluster: Cluster, ledger: Ledger, commits: CommitQueue, progress: Progress, exporter: Exporter
    ) -> None:
        config = job.config
        assert config.stall_timeout is not None
        self._cluster, self._ledger, self._commits = cluster, ledger, commits
        self._progress, self._exporter = progress, exporter
        self._profiled = job.profiled
        smaller = config.batch_size if config.allow_smaller_batches else None
        self._queue = ShardQueue(ledger.remaining(), ledger.rows_of, cluster.now, smaller)
        self._types = DeviceTypes(ledger.devices, ledger.totals.devices, config.one_device_type)
        self._workers = Workers(cluster, config.num_workers, self._queue, self._types, progress.note)
        self._watch = Watch(cluster, config.stall_timeout)
        self._ready_at, self._shown_at = cluster.now(), float("-inf")
        self._ends = math.inf
        self._output, self._has_committed = config.output, False

    def run(self, ends: float = math.inf) -> None:
        """Work until every shard is committed or set aside.

        Args:
            ends: time on the cluster's clock from which on no worker is given a shard. Those that workers have, at
                most :data:`SHARDS_AT_ONCE` each, are finished.

        Raises:
            Unfinished: shards are left, and ``ends`` has come.
            UsageError, RefusedError, StorageError, VcfBatchError: see :func:`vcf_batch.pool.run`.
        """
        self._ends = ends
        with self._commits:
            try:
                while self._ledger.left and not self._is_ended:
                    self._turn()
            finally:
                self._workers.end()
        self._ledger.raise_if_incomplete()
        if self._ledger.left:
            raise Unfinished(
                f"the deadline has come, and {plural(self._ledger.left, 'shard')} of the run are left. What is "
                "finished is kept: rerun the same command to go on, with a later --deadline if it names a time"
            )

    @property
    def _is_ended(self) -> bool:
        """Whether the deadline has come, and what was begun before it is finished."""
        begun = any(request.method == "run" for request in self._workers.requests.values()) or len(self._commits)
        return self._cluster.now() >= self._ends and not begun

    def _turn(self) -> None:
        """Hand out tasks, and take the answers that have arrived."""
        self._commits.raise_if_lost()
        workers = self._workers
        if not self._ledger.devices and not self._ledger.totals.devices and not len(self._commits):
            workers.reopen_types()
        if self._cluster.now() < self._ends:
            workers.start(self._ungenerated)
        idle, workers.idle = workers.idle, []
        for worker in idle:
            self._give_tasks(worker)
        if workers.requests:
            for request, answer in self._cluster.wait(workers.requests, ANSWER_SECONDS):
                if request.key in workers.requests:  # an earlier answer may have ended its worker
                    self._take(request, answer)
        else:
            self._cluster.sleep(ANSWER_SECONDS / 10)
        self._take_commits()
        for request, fault in self._watch.timed_out(workers.requests):
            self._failed(request, fault)
        self._ledger.tell_if_due()
        self._show_progress()

    @property
    def _ungenerated(self) -> int:
        """Number of shards that still need a worker."""
        return self._ledger.left - len(self._commits)

    # Tasks

    def _give_tasks(self, worker: WorkerHandle) -> None:
        """Give the worker its tasks. If there are none, keep it while failed shards or commits wait; else let it go."""
        while len(worker.requests) < SHARDS_AT_ONCE and (task := self._next(worker)):
            self._workers.ask(worker, "run", task)
        if worker.requests:
            return
        if self._queue.waiting or self._commits.is_full:
            self._workers.idle.append(worker)
        else:
            self._workers.let_go(worker)

    def _next(self, worker: WorkerHandle) -> ShardTask | None:
        """The worker's next task. It gets a second shard only if enough are left for all workers."""
        if self._commits.is_full or self._cluster.now() >= self._ends:
            return None
        nodes = self._workers.nodes if self._queue.waiting else set()
        if not (tasks := worker.tasks):
            return self._queue.take(worker.node, nodes)
        # A trace must show its shard alone, from the first batch on.
        if any(task.is_alone or task.shard.index == self._profiled for task in tasks):
            return None
        claimed = sum(request.task is not None for request in self._workers.requests.values())
        if self._ungenerated - claimed - self._queue.waiting < self._workers.wanted():
            return None
        return self._queue.take_beside(worker.node, nodes)

    # Answers

    def _take(self, request: Request, answer: Answer) -> None:
        """Take an answer of a worker, or the fault in its place."""
        if isinstance(answer, Fault):
            self._failed(request, answer)
            return
        worker = request.worker
        self._workers.answered(request)
        if isinstance(answer, Heartbeat):
            self._workers.came_up(worker, answer)
        elif isinstance(answer, Loaded):
            if self._workers.loaded(worker, answer):
                self._give_tasks(worker)
            self._workers.succeeded(worker, "load")
        else:
            # This comes first: it may discard failures on a bad node, which the task may rest on.
            self._workers.succeeded(worker, "shard")
            assert request.task is not None
            self._did(worker, request.task, answer)
            self._give_tasks(worker)

    def _did(self, worker: WorkerHandle, task: ShardTask, answer: tuple[Receipt, Any] | None) -> None:
        """Queue the commit of a shard that a worker has generated, or go on after a trial that it has survived."""
        if task.selected is not None:
            self._queue.done(task)
        elif self._queue.generated(task, worker.node):
            assert answer is not None
            receipt, staged = answer
            self._commits.add(Finished(task, worker.node, self._ledger.whole(receipt), staged))

    def _failed(self, request: Request, fault: Fault) -> None:
        """Find out whom a fault concerns: the worker, its node, the shard, or the run."""
        worker, task = request.worker, request.task
        self._workers.answered(request)
        # Once a worker has loaded, the run's settings are sound, and another worker's node is to blame.
        if isinstance(fault.error, UsageError) and not (task is None and self._workers.any_loaded):
            raise fault.error
        beside = worker.tasks
        # Only after trouble of the storage can the process be used again: an error of the GPU may have damaged it.
        stays = task is not None and isinstance(fault.error, StorageError)
        if not stays:
            self._workers.let_go(worker)
        if task is None:
            self._workers.start_failed(worker, fault)
        elif beside and not fault.one_task:
            self._undecided([task, *beside], fault)
        else:
            self._attempt_failed(task, fault)
            if stays:
                self._give_tasks(worker)
        # A failed trial counts against its rows, not against the node.
        if fault.node and not fault.node_died and (task is None or task.selected is None):
            self._workers.failed(fault, task.shard if task else None)

    # Outcomes of shards

    def _undecided(self, tasks: Sequence[ShardTask], fault: Fault) -> None:
        """Repeat the shards of a worker that had several. Each is tried alone, to find the one to blame."""
        self._queue.repeat(tasks[0])  # the others were repeated when the worker was let go
        for task in tasks:
            self._progress.note(
                f"shard {task.title}: attempt {task.attempt} ended with its worker, which had another shard too, and "
                f"is repeated alone: {fault.reason}",
                "attempt_failed",
                logging.WARNING,
                shard=task.shard.name,
                node=fault.node,
            )

    def _attempt_failed(self, task: ShardTask, fault: Fault) -> None:
        """Queue the shard again, or set it aside."""
        if self._queue.failed(task, fault):
            self._progress.note(
                f"shard {task.title}: attempt {task.attempt} failed and is repeated: {fault.reason}",
                "attempt_failed",
                logging.WARNING,
                shard=task.shard.name,
                node=fault.node,
            )
        else:
            self._set_aside(task, fault)

    def _set_aside(self, task: ShardTask, fault: Fault) -> None:
        """Set the shard aside, and go on without it. What refuses a shard, a changed manifest, ends the run.

        Raises:
            RefusedError: see above.
        """
        if isinstance(fault.error, RefusedError):
            raise fault.error
        self._progress.note(
            f"shard {task.title}: attempt {task.attempt} failed and the shard is set aside: {fault.reason}",
            "shard_set_aside",
            logging.ERROR,
            shard=task.shard.name,
        )
        self._queue.done(task)
        self._ledger.set_aside(task, fault)

    def _take_commits(self) -> None:
        """Take the shards that were committed, and those that never will be."""
        for finished, error in self._commits.outcomes():
            task = finished.task
            if error is None:
                self._queue.done(task)
                self._committed(finished)
            elif isinstance(error, StagedFilesLost):
                self._attempt_failed(task, Fault.of(error, finished.node))
            elif isinstance(error, VcfBatchError) and not isinstance(error, RefusedError):
                self._set_aside(task, Fault.of(error, finished.node))
            else:
                raise error

    def _committed(self, finished: Finished) -> None:
        task, receipt = finished.task, finished.receipt
        self._ledger.committed(task, receipt)
        self._exporter.committed(receipt)
        # The first one of a call is told, with the place of the pictures.
        place = "" if self._has_committed else f" and lies in {redact(self._output)}"
        self._progress.note(
            f"shard {task.title} is finished{place}",
            "shard_finished",
            logging.INFO if place else logging.DEBUG,
            shard=task.shard.name,
            worker=receipt.timings.get("worker"),
            node=finished.node,
            rows=len(task.shard),
            seconds=round(receipt.worker_seconds, 3),
        )
        self._has_committed = True
        for row, message in task.verdicts.items():
            self._progress.note(
                f"row {row} is recorded as failed: {message}", "row_failed", logging.WARNING, shard=task.shard.name
            )

    def _show_progress(self) -> None:
        now = self._cluster.now()
        if self._ledger.left and now - self._shown_at < ANSWER_SECONDS:
            return
        self._shown_at = now
        done, ready = self._ledger.finished_rows + self._workers.samples_done, self._workers.ready
        phase = self._workers.phase if self._ungenerated else ""
        self._progress.update(done, self._ledger.counts["failed"], ready, self._ledger.totals.means, phase)
        self._exporter.now(done, ready)
        if ready or self._workers.loading or not self._ungenerated:
            self._ready_at = now
        elif now - self._ready_at >= WAITING_SECONDS:
            self._ready_at = now
            self._progress.note(
                f"no worker is ready yet; {self._cluster.describe()}{self._workers.waiting}",
                "no_worker_ready",
                logging.WARNING,
            )
