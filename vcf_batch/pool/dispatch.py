"""The loop that hands shards to actors, has what comes back committed, and replaces what dies."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.util.metrics
from ray.exceptions import RayError

from vcf_batch.driver.backoff import StartBackoff
from vcf_batch.driver.commit_queue import CommitQueue, Finished
from vcf_batch.driver.ledger import Ledger
from vcf_batch.driver.progress import Progress
from vcf_batch.driver.prometheus import Exporter
from vcf_batch.driver.quarantine import FAILURES, Quarantine
from vcf_batch.driver.shard_queue import ShardQueue
from vcf_batch.errors import RefusedError, StorageError, UsageError, VcfBatchError
from vcf_batch.output.commits import StagedFilesLost
from vcf_batch.output.lease import Lease
from vcf_batch.pool import nodes
from vcf_batch.pool.actor import SHARDS_AT_ONCE, Actor, Heartbeat, Request, WorkerHandle
from vcf_batch.pool.errors import Stalled, address, cause, failure, node_died, reason, says_which, symptom
from vcf_batch.pool.watch import Watch
from vcf_batch.setup.job import Job, environment
from vcf_batch.setup.shard_task import ShardTask

ANSWER_SECONDS = 1.0
"""How long to wait for an answer before the run is looked at from other sides."""

CAPACITY_SECONDS = 10.0
"""Between two looks at how many workers the cluster has room for."""

WAITING_SECONDS = 30.0
"""How long no worker may be ready before the user is told what the run waits for."""


class Dispatch:
    """A run from its first worker to its last commit.

    Args:
        job: the run.
        held: the right to commit.
        ledger: what is committed, and what is left.
        progress: what the user sees.
    """

    def __init__(self, job: Job, held: Lease, ledger: Ledger, progress: Progress) -> None:
        self.config, self.lease, self.ledger, self.progress = job.config, held, ledger, progress
        self.profiled = job.profiled
        smaller = self.config.batch_size if self.config.allow_smaller_batches else None
        self.queue = ShardQueue(ledger.remaining(), ledger.rows_of, smaller)
        self.exporter = Exporter(ray.util.metrics, self.config.output, job.manifest.num_rows)
        self.commits = CommitQueue(self.config.output, held, ledger, progress.note)
        self.quarantine = Quarantine()
        self.workers: set[WorkerHandle] = set()
        self.flights: dict[ray.ObjectRef, Request] = {}
        """What workers have been asked, by what will answer it."""
        self.idle: list[WorkerHandle] = []
        assert self.config.stall_timeout is not None
        self.watch = Watch(self.config.stall_timeout)
        self.redo = job.redo
        # Which grows with the manifest, and of which a worker needs one shard's share at a time.
        self.job_ref = ray.put(dataclasses.replace(job, redo={}))
        remote: Any = ray.remote  # whose type hints leave out concurrency groups
        self.actor_class = remote(
            max_restarts=0,
            max_task_retries=0,
            num_cpus=self.config.cpus_per_worker,
            num_gpus=self.config.gpus_per_worker,
            runtime_env={"env_vars": environment(self.config)},
            concurrency_groups={"signs": 1, "shards": SHARDS_AT_ONCE},
        )(Actor)
        self.loaded = False
        self.starts = StartBackoff()
        self.capacity, self.capacity_until = 1, 0.0
        self.ready_at, self.shown_at = time.monotonic(), 0.0

    def run(self) -> None:
        """Work until every shard is committed or set aside.

        Raises:
            UsageError, RefusedError, StorageError, VcfBatchError: see :func:`vcf_batch.pool.run`.
        """
        with self.commits:
            try:
                while self.ledger.left:
                    if self.lease.lost:
                        raise self.lease.lost
                    self._start_workers()
                    for worker in [*self.idle]:
                        self.idle.remove(worker)
                        self._send(worker)
                    if self.flights:
                        for ref in self._answered():
                            if ref in self.flights:  # what an earlier answer led to may have ended its worker
                                self._land(ref)
                    else:
                        time.sleep(ANSWER_SECONDS / 10)
                    self._settle()
                    for flight, error in self.watch.stalled(self.flights):
                        self._failed(flight, error)
                    self._show_progress()
            finally:
                for worker in self.workers:
                    # Where the cluster is gone, that is not what is to be told.
                    with contextlib.suppress(Exception):
                        ray.kill(worker.actor)
        self.ledger.raise_if_incomplete()

    def _answered(self) -> list[ray.ObjectRef]:
        """Wait for an answer, and return all that are there: Ray looks at every worker for each question."""
        flights = [*self.flights]
        if ray.wait(flights, num_returns=1, timeout=ANSWER_SECONDS)[0]:
            return ray.wait(flights, num_returns=len(flights), timeout=0)[0]
        return []

    @property
    def _ungenerated(self) -> int:
        """Shards that it takes a worker for."""
        return self.ledger.left - len(self.commits)

    @property
    def _read_ahead(self) -> int:
        """Shards that wait at workers which have another one: no further worker gets them."""
        return len(self.flights) - (len(self.workers) - len(self.idle))

    # Workers come and go

    def _start_workers(self) -> None:
        while len(self.workers) < min(self._wanted(), self._ungenerated - self._read_ahead) and self.starts.may_begin:
            left_out = ",".join(self.quarantine.nodes)
            options = {"label_selector": {"ray.io/node-id": f"!in({left_out})"}} if left_out else {}
            actor = self.actor_class.options(**options).remote(self.job_ref)
            self.workers.add(worker := WorkerHandle(actor, time.monotonic()))
            # First of all, where it is: a load may fail before it could be asked.
            self._ask(worker, actor.sign.remote())

    def _wanted(self) -> int:
        """Workers at most: as asked, else what the cluster has room for now."""
        if time.monotonic() >= self.capacity_until:
            room = nodes.room(self.config)
            if self.quarantine.nodes and any(room.values()) and not self._room_left(room):
                self.progress.note("no other node is left: the nodes that failed are used again", "nodes_used_again")
                self.quarantine.lift()
            self.capacity = max(self._room_left(room), 1)
            self.capacity_until = time.monotonic() + CAPACITY_SECONDS
        return self.config.num_workers or self.capacity

    def _room_left(self, room: dict[str, int]) -> int:
        return sum(workers for node, workers in room.items() if node not in self.quarantine.nodes)

    def _ask(
        self, worker: WorkerHandle, ref: ray.ObjectRef, task: ShardTask | None = None, attempt_id: str = ""
    ) -> None:
        flight = self.flights[ref] = Request(worker, ref, task, attempt_id)
        worker.flights.append(flight)

    def _landed(self, flight: Request) -> None:
        """It is answered, or never will be."""
        del self.flights[flight.ref]
        flight.worker.flights.remove(flight)

    def _send(self, worker: WorkerHandle) -> None:
        """Give the worker what it can do; let it wait while failed shards or commits do; else let it go."""
        while len(worker.flights) < SHARDS_AT_ONCE and (task := self._next(worker)):
            attempt_id = task.new_id()
            ref = worker.actor.run.remote(task, attempt_id, self.redo.get(task.shard.index))
            self._ask(worker, ref, task, attempt_id)
        if worker.flights:
            return
        if self.queue.waiting or self.commits.is_full:
            self.idle.append(worker)
        else:
            self._let_go(worker)

    def _next(self, worker: WorkerHandle) -> ShardTask | None:
        """The worker's next task: a shard, or beside one another, as long as enough are left for all workers."""
        if self.commits.is_full:
            return None
        nodes_at_work = {other.node for other in self.workers if other.node} if self.queue.waiting else set()
        tasks = [flight.task for flight in worker.flights if flight.task]
        if not tasks:
            return self.queue.take(worker.node, nodes_at_work)
        # The trace shall show the one shard from its first batch on.
        if any(task.is_alone or task.shard.index == self.profiled for task in tasks):
            return None
        claimed = sum(flight.task is not None for flight in self.flights.values())
        if self._ungenerated - claimed - self.queue.waiting < self._wanted():
            return None
        return self.queue.take_beside(worker.node, nodes_at_work)

    def _let_go(self, worker: WorkerHandle) -> None:
        """End a worker. What it has not finished is nobody's fault, and is done again."""
        ray.kill(worker.actor)
        self.workers.remove(worker)
        for flight in [*worker.flights]:
            self._landed(flight)
            if flight.task is not None:
                self.queue.repeat(flight.task)

    def _leave_out(self, bad: set[str]) -> None:
        """Use some nodes no more. What failed there is nobody's fault."""
        if not bad:
            return
        for node in bad:
            self.progress.note(
                f"node {node} is left out: it failed {FAILURES} times in a row what others did not: "
                f"{self.quarantine.reasons[node]}",
                "node_left_out",
                logging.WARNING,
                node=node,
            )
            self.queue.forgive(node)
        self.starts.reset()
        self.capacity_until = 0.0
        self.idle = [worker for worker in self.idle if worker.node not in bad]
        for worker in [*self.workers]:
            if worker.node in bad:
                self._let_go(worker)

    # What workers answer

    def _land(self, ref: ray.ObjectRef) -> None:
        """An actor has answered, or died."""
        flight = self.flights[ref]
        worker = flight.worker
        try:
            answer = ray.get(ref)
        except RayError as error:
            self._failed(flight, cause(error))
            return
        self._landed(flight)
        if worker.sign is None:
            self._came_up(worker, answer)
        elif flight.task is None:
            self.loaded = True
            self.starts.reset()
            self._send(worker)
            self._leave_out(self.quarantine.succeeded(worker.node, "load"))
        else:
            self._did(worker, flight.task, answer)

    def _came_up(self, worker: WorkerHandle, sign: Heartbeat) -> None:
        """An actor has found a machine."""
        worker.sign = sign
        if worker.node in self.quarantine.nodes:
            self._let_go(worker)
        else:
            self._ask(worker, worker.actor.load.remote())

    def _did(self, worker: WorkerHandle, task: ShardTask, answer: Any) -> None:
        """A worker has generated a shard, or survived a trial."""
        # First of all: what a bad node failed counts no more, and may be what the task rests on.
        self._leave_out(self.quarantine.succeeded(worker.node, "shard"))
        if task.selected is not None:
            self.queue.done(task)
        elif self.queue.generated(task, worker.node):
            receipt, staged = answer
            self.commits.add(Finished(task, worker.node, self.ledger.whole(receipt), staged))
        self._send(worker)

    def _failed(self, flight: Request, error: Exception) -> None:
        """A start or a task has failed."""
        worker, task = flight.worker, flight.task
        node = worker.node or nodes.at(address(error))
        self._landed(flight)
        # Where a worker has loaded, the run's settings are sound: what another one misses is its node's.
        if isinstance(error, UsageError) and not (task is None and self.loaded):
            raise error
        beside = [other.task for other in worker.flights if other.task]
        # After anything but trouble of the storage (an error of the GPU, say) the process is not to be trusted.
        if task is None or not isinstance(error, StorageError):
            self._let_go(worker)
        if task is None:
            self._start_failed(worker, node, error)
        elif beside and not says_which(error):
            self._undecided([task, *beside], node, error)
        else:
            self._attempt_failed(task, node, error)
            if isinstance(error, StorageError):
                self._send(worker)
        # On trial a worker may fail: that is what the trial is for.
        if node and not node_died(error) and (task is None or task.selected is None):
            self._leave_out(self.quarantine.failed(node, task.shard if task else None, reason(error)))

    def _start_failed(self, worker: WorkerHandle, node: str, error: Exception) -> None:
        """Wait before the next start, and give up when nothing ever starts."""
        # One that has never answered waits for a machine, most likely, which may take any time. In case its process
        # hangs, another one is asked for.
        waited = isinstance(error, Stalled) and not worker.sign
        if waited or node_died(error) or (pause := self.starts.failed(worker.started)) is None:
            return
        failing = {*self.quarantine.failing, node}
        hope = any(other.is_busy or other.node not in failing for other in self.workers if other.node)
        if self.starts.used_up and not hope:
            kind = StorageError if isinstance(error, StorageError) else VcfBatchError
            raise kind(
                f"no worker could start, {self.starts.failures} times; the last time: {reason(error)}"
            ) from error
        self.progress.note(
            f"a worker did not start (next one in {pause:.0f} s): {reason(error)}",
            "worker_did_not_start",
            logging.WARNING,
            node=node,
        )

    # What becomes of shards

    def _undecided(self, tasks: Sequence[ShardTask], node: str, error: Exception) -> None:
        """A worker had several shards, and any of them may be to blame: that shows when each is tried alone."""
        self.queue.repeat(tasks[0])  # the others were when the worker was let go
        for task in tasks:
            self.progress.note(
                f"shard {task.title}: attempt {task.attempt} ended with its worker, which had another shard too, and "
                f"is repeated alone: {reason(error)}",
                "attempt_failed",
                logging.WARNING,
                shard=task.shard.name,
                node=node,
            )

    def _attempt_failed(self, task: ShardTask, node: str, error: Exception) -> None:
        """Queue the shard again, or set it aside."""
        if self.queue.failed(task, node, failure(error), symptom(error)):
            self.progress.note(
                f"shard {task.title}: attempt {task.attempt} failed and is repeated: {reason(error)}",
                "attempt_failed",
                logging.WARNING,
                shard=task.shard.name,
                node=node,
            )
        else:
            self._set_aside(task, error)

    def _set_aside(self, task: ShardTask, error: Exception) -> None:
        """Go on without the shard."""
        why = reason(error)
        self.progress.note(
            f"shard {task.title}: attempt {task.attempt} failed and the shard is set aside: {why}",
            "shard_set_aside",
            logging.ERROR,
            shard=task.shard.name,
        )
        self.queue.done(task)
        self.ledger.set_aside(task, error, why)

    def _committed(self, finished: Finished) -> None:
        task, receipt = finished.task, finished.receipt
        self.ledger.committed(task, receipt)
        self.exporter.committed(receipt)
        self.progress.note(
            f"shard {task.title} is finished",
            "shard_finished",
            logging.DEBUG,
            shard=task.shard.name,
            worker=receipt.timings["worker"],
            node=finished.node,
            rows=len(task.shard),
            seconds=round(receipt.worker_seconds, 3),
        )
        for row, message in task.verdicts.items():
            self.progress.note(
                f"row {row} is recorded as failed: {message}", "row_failed", logging.WARNING, shard=task.shard.name
            )

    def _settle(self) -> None:
        """Take note of what has been committed."""
        for finished, error in self.commits.settled():
            task = finished.task
            if error is None:
                self.queue.done(task)
                self._committed(finished)
            elif isinstance(error, StagedFilesLost):
                self._attempt_failed(task, finished.node, error)
            elif isinstance(error, VcfBatchError) and not isinstance(error, RefusedError):
                self._set_aside(task, error)
            else:
                raise error

    def _show_progress(self) -> None:
        if self.ledger.left and time.monotonic() - self.shown_at < ANSWER_SECONDS:
            return
        self.shown_at = time.monotonic()
        done = self.ledger.finished_rows + sum(worker.samples_done for worker in self.workers)
        ready = sum(worker.is_busy for worker in self.workers) + len(self.idle)
        self.progress.update(done, self.ledger.counts["failed"], ready, self.ledger.totals.means)
        self.exporter.now(done, ready)
        if ready or not self._ungenerated:
            self.ready_at = time.monotonic()
        elif time.monotonic() - self.ready_at >= WAITING_SECONDS:
            self.ready_at = time.monotonic()
            self.progress.note(
                f"no worker is ready yet; {nodes.describe(self.config)}", "no_worker_ready", logging.WARNING
            )
