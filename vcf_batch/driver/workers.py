"""The workers of a run: how many there are and where, what each has been asked, and which nodes get no more."""

import contextlib
import logging
from collections.abc import Callable, Hashable, Set
from typing import Literal

from vcf_batch.driver.cluster import Cluster, Heartbeat, Request, WorkerHandle
from vcf_batch.driver.fault import Fault, Stalled
from vcf_batch.driver.quarantine import FAILURES, Quarantine, Work
from vcf_batch.driver.shard_queue import ShardQueue
from vcf_batch.errors import StorageError, VcfBatchError
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

CAPACITY_SECONDS = 10.0
"""Between two looks at how many workers the cluster has room for."""

START_ATTEMPTS = 5
"""How many workers in a row may fail to start, while none works, before the run gives up."""

MAX_BACKOFF_SECONDS = 30.0
"""The longest pause after a failed start."""


class StartBackoff:
    """Counts failed starts, and waits longer and longer after each.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.failures = 0
        """In a row."""
        self._now = now
        self._failed_at = self._not_before = float("-inf")

    @property
    def may_begin(self) -> bool:
        """Whether it is time for another start."""
        return self._now() >= self._not_before

    @property
    def used_up(self) -> bool:
        """Whether :data:`START_ATTEMPTS` have failed, so that the next one will not do better."""
        return self.failures >= START_ATTEMPTS

    def reset(self) -> None:
        """Begin anew: a worker has started, or the reason for the failures is gone."""
        self.failures, self._not_before = 0, float("-inf")

    def failed(self, began: float) -> float | None:
        """Count a worker that has not started.

        Args:
            began: when it was asked for, on the clock.

        Returns:
            Seconds until the next start. None if it began before the last failure: of workers that were started
            together, only the first failure counts.
        """
        if began <= self._failed_at:
            return None
        self._failed_at = self._now()
        self.failures += 1
        pause = min(2.0**self.failures / 2, MAX_BACKOFF_SECONDS)
        self._not_before = self._failed_at + pause
        return pause


class Workers:
    """Starts workers, asks them things, and lets them go.

    Args:
        cluster: where they run.
        wanted: how many there shall be; None for as many as the cluster has room for.
        queue: gets back what a worker leaves undone.
        note: tells the user: see :meth:`vcf_batch.driver.progress.Progress.note`.
    """

    def __init__(self, cluster: Cluster, wanted: int | None, queue: ShardQueue, note: Callable[..., None]) -> None:
        self.requests: dict[Hashable, Request] = {}
        """What workers have not answered yet, by key, but for later heartbeats."""
        self.idle: list[WorkerHandle] = []
        """Workers that are loaded and wait for a task."""
        self.any_loaded = False
        """Whether some worker has ever loaded, so that the run's settings are sound."""
        self._cluster, self._num, self._queue, self._note = cluster, wanted, queue, note
        self._all: dict[WorkerHandle, None] = {}
        """In the order of their starts."""
        self._backoff = StartBackoff(cluster.now)
        self._quarantine = Quarantine()
        self._capacity, self._capacity_until = 1, float("-inf")

    @property
    def ready(self) -> int:
        """Workers that have a task or wait for one."""
        return sum(worker.is_busy for worker in self._all) + len(self.idle)

    @property
    def samples_done(self) -> int:
        """Samples of unfinished shards."""
        return sum(worker.samples_done for worker in self._all)

    @property
    def nodes(self) -> set[str]:
        """Where any worker is."""
        return {worker.node for worker in self._all if worker.node}

    def wanted(self) -> int:
        """How many there shall be: as asked, else what the cluster has room for now."""
        if self._cluster.now() >= self._capacity_until:
            room = self._cluster.room()
            if self._quarantine.nodes and any(room.values()) and not self._room_left(room):
                self._note("no other node is left: the nodes that failed are used again", "nodes_used_again")
                self._quarantine.lift()
            self._capacity = max(self._room_left(room), 1)
            self._capacity_until = self._cluster.now() + CAPACITY_SECONDS
        return self._num or self._capacity

    def _room_left(self, room: dict[str, int]) -> int:
        return sum(workers for node, workers in room.items() if node not in self._quarantine.nodes)

    # They come

    def start(self, shards: int) -> None:
        """Start as many as are wanted and have a shard.

        Args:
            shards: how many are neither generated nor set aside.
        """
        # No further worker gets the shards that wait at workers which have another one.
        read_ahead = len(self.requests) - (len(self._all) - len(self.idle))
        while len(self._all) < min(self.wanted(), shards - read_ahead) and self._backoff.may_begin:
            process = self._cluster.start(sorted(self._quarantine.nodes))
            worker = WorkerHandle(process, self._cluster.now())
            self._all[worker] = None
            # First of all, where it is: a load may fail before it could be asked.
            self.ask(worker, "heartbeat")

    def came_up(self, worker: WorkerHandle, heartbeat: Heartbeat) -> None:
        """Take the first heartbeat of a worker, which has found a machine, and let it load."""
        worker.heartbeat = heartbeat
        if worker.node in self._quarantine.nodes:
            self.let_go(worker)
        else:
            self.ask(worker, "load")

    def loaded(self) -> None:
        """Note that a worker has loaded; its node has not succeeded yet (:meth:`succeeded`)."""
        self.any_loaded = True
        self._backoff.reset()

    def start_failed(self, worker: WorkerHandle, fault: Fault) -> None:
        """Wait before the next start, or give up when nothing ever starts.

        Args:
            worker: has been let go.
            fault: why it has not come up, or not loaded.

        Raises:
            StorageError, VcfBatchError: :data:`START_ATTEMPTS` in a row have failed, and no worker gives hope.
        """
        # One that has never answered waits for a machine, most likely, which may take any time. In case its process
        # hangs, another one is asked for.
        waited = isinstance(fault.error, Stalled) and not worker.heartbeat
        if waited or fault.node_died or (pause := self._backoff.failed(worker.started)) is None:
            return
        failing = {*self._quarantine.failing, fault.node}
        hope = any(other.is_busy or other.node not in failing for other in self._all if other.node)
        if self._backoff.used_up and not hope:
            kind = StorageError if isinstance(fault.error, StorageError) else VcfBatchError
            raise kind(
                f"no worker could start, {self._backoff.failures} times; the last time: {fault.reason}"
            ) from fault.error
        self._note(
            f"a worker did not start (next one in {pause:.0f} s): {fault.reason}",
            "worker_did_not_start",
            logging.WARNING,
            node=fault.node,
        )

    # They are asked

    def ask(
        self, worker: WorkerHandle, method: Literal["heartbeat", "load", "run"], task: ShardTask | None = None
    ) -> None:
        """Ask a worker something; the answer is awaited."""
        attempt_id = f"{task.shard.name}-{task.attempt}-{self._cluster.new_id()}" if task else ""
        request = Request(worker, method, task, attempt_id)
        request.key = self._cluster.send(request)
        self.requests[request.key] = request
        worker.requests.append(request)

    def answered(self, request: Request) -> None:
        """Await a request no longer: it is answered, or never will be."""
        del self.requests[request.key]
        request.worker.requests.remove(request)

    # They go

    def let_go(self, worker: WorkerHandle) -> None:
        """End a worker. What it has not finished is nobody's fault, and is done again."""
        self._cluster.kill(worker)
        del self._all[worker]
        for request in [*worker.requests]:
            self.answered(request)
            if request.task is not None:
                self._queue.repeat(request.task)

    def end(self) -> None:
        """End all of them, whatever they do."""
        for worker in self._all:
            # Where the cluster is gone, that is not what is to be told.
            with contextlib.suppress(Exception):
                self._cluster.kill(worker)

    def succeeded(self, worker: WorkerHandle, work: Work) -> None:
        """Count a success for the worker's node; nodes that failed the same may be left out for it."""
        self._leave_out(self._quarantine.succeeded(worker.node, work))

    def failed(self, fault: Fault, shard: Shard | None) -> None:
        """Count a failure against the fault's node, of a shard or, if None, of a start; it may be left out for it."""
        self._leave_out(self._quarantine.failed(fault.node, shard, fault.reason))

    def _leave_out(self, bad: Set[str]) -> None:
        """Use some nodes no more. What failed there is nobody's fault."""
        if not bad:
            return
        for node in sorted(bad):
            self._note(
                f"node {node} is left out: it failed {FAILURES} times in a row what others did not: "
                f"{self._quarantine.reasons[node]}",
                "node_left_out",
                logging.WARNING,
                node=node,
            )
            self._queue.forgive(node)
        self._backoff.reset()
        self._capacity_until = float("-inf")
        self.idle = [worker for worker in self.idle if worker.node not in bad]
        for worker in [*self._all]:
            if worker.node in bad:
                self.let_go(worker)
