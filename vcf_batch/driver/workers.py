"""The workers of a run: their starts, their requests and their ends."""

import contextlib
import logging
from collections.abc import Callable, Hashable, Set
from typing import Literal

from vcf_batch.driver.cluster import Cluster, Heartbeat, Loaded, Request, WorkerHandle
from vcf_batch.driver.device_types import DeviceTypes
from vcf_batch.driver.fault import Fault, Stalled
from vcf_batch.driver.progress import plural
from vcf_batch.driver.quarantine import FAILURES, Quarantine, Work
from vcf_batch.driver.shard_queue import ShardQueue
from vcf_batch.errors import StorageError, VcfBatchError
from vcf_batch.output.receipts import device_type
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

CAPACITY_SECONDS = 10.0
"""Seconds between two looks at the cluster's room for workers."""

START_ATTEMPTS = 5
"""Number of starts that fail in a row, while no worker works, at which the run gives up."""

MAX_BACKOFF_SECONDS = 30.0
"""Longest pause after a failed start, in seconds."""


class StartBackoff:
    """Count of failed starts, with a longer pause after each.

    Args:
        now: reads the clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.failures = 0
        """Number of failed starts in a row."""
        self._now = now
        self._failed_at = self._not_before = float("-inf")

    @property
    def may_begin(self) -> bool:
        """Whether it is time for another start."""
        return self._now() >= self._not_before

    @property
    def used_up(self) -> bool:
        """Whether :data:`START_ATTEMPTS` starts in a row have failed."""
        return self.failures >= START_ATTEMPTS

    def reset(self) -> None:
        """Discard the failures: a worker has started, or their reason is gone."""
        self.failures, self._not_before = 0, float("-inf")

    def failed(self, began: float) -> float | None:
        """Count a worker that has not started.

        Args:
            began: time at which the worker was asked for, on the clock.

        Returns:
            Seconds until the next start. None if the worker was asked for before the last failure: of workers that
            start together, only the first failure counts.
        """
        if began <= self._failed_at:
            return None
        self._failed_at = self._now()
        self.failures += 1
        pause = min(2.0**self.failures / 2, MAX_BACKOFF_SECONDS)
        self._not_before = self._failed_at + pause
        return pause


class Workers:
    """The workers of a run.

    Args:
        cluster: the cluster that runs the workers.
        wanted: number of workers; None for as many as the cluster has room for.
        queue: gets back the unfinished tasks of a worker that ends.
        types: the device types of the run.
        note: logs a message: see :meth:`vcf_batch.driver.progress.Progress.note`.
    """

    def __init__(
        self,
        cluster: Cluster,
        wanted: int | None,
        queue: ShardQueue,
        types: DeviceTypes,
        note: Callable[..., None],
    ) -> None:
        self.requests: dict[Hashable, Request] = {}
        """Requests that are not answered yet, by key, without those for later heartbeats."""
        self.idle: list[WorkerHandle] = []
        """Workers that are loaded and wait for a task."""
        self.any_loaded = False
        """Whether a worker has ever loaded, which proves that the run's settings are sound."""
        self._cluster, self._num, self._queue, self._types, self._note = cluster, wanted, queue, types, note
        self._all: dict[WorkerHandle, None] = {}
        """All workers in the order of their starts."""
        self._unused: dict[WorkerHandle, None] = {}
        """Workers of another device type than the run keeps to. They hold their devices, so that the next worker on the
        node gets another one."""
        self._backoff = StartBackoff(cluster.now)
        self._quarantine = Quarantine()
        self._room: dict[str, int] = {}
        self._capacity, self._capacity_until = 1, float("-inf")

    @property
    def ready(self) -> int:
        """Number of workers that have a task or wait for one."""
        return sum(worker.is_busy for worker in self._all) + len(self.idle)

    @property
    def loading(self) -> int:
        """Number of workers that load the models."""
        return sum(request.method == "load" for request in self.requests.values())

    @property
    def phase(self) -> str:
        """What happens before a worker is ready, in words; empty once one is."""
        if self.ready:
            return ""
        if loading := self.loading:
            return f"loading the models on {plural(loading, 'worker')}"
        return f"starting {plural(self._used, 'worker')}" if self._used else "waiting to start a worker"

    @property
    def samples_done(self) -> int:
        """Number of samples that are written for unfinished shards."""
        return sum(worker.samples_done for worker in self._all)

    @property
    def nodes(self) -> set[str]:
        """Nodes of the workers."""
        return {worker.node for worker in self._all if worker.node}

    def wanted(self) -> int:
        """Number of workers to have: the configured one, else what the cluster has room for now."""
        if self._cluster.now() >= self._capacity_until:
            self._room = self._cluster.room()
            room = {node: fit for node, fit in self._room.items() if node not in self._types.left_out}
            if self._quarantine.nodes and any(room.values()) and not self._room_left(room):
                self._note("no other node is left: the nodes that failed are used again", "nodes_used_again")
                self._quarantine.lift()
            self._capacity = self._room_left(room)
            self._capacity_until = self._cluster.now() + CAPACITY_SECONDS
        return self._num or max(self._capacity - len(self._unused), 1)

    def _room_left(self, room: dict[str, int]) -> int:
        return sum(workers for node, workers in room.items() if node not in self._quarantine.nodes)

    @property
    def _left_out(self) -> set[str]:
        return self._quarantine.nodes | self._types.left_out.keys()

    # Starts

    def start(self, shards: int) -> None:
        """Start workers, as many as are wanted and have a shard.

        Args:
            shards: number of shards that are neither generated nor set aside.
        """
        # Shards that workers have as their second one need no further worker.
        read_ahead = len(self.requests) - (self._used - len(self.idle))
        while self._used < min(self.wanted(), shards - read_ahead) and self._backoff.may_begin:
            process = self._cluster.start(sorted(self._left_out))
            worker = WorkerHandle(process, self._cluster.now())
            self._all[worker] = None
            # The first request asks for its node, which a load that fails could not tell.
            self.ask(worker, "heartbeat")

    @property
    def waiting(self) -> str:
        """What else a run without a ready worker waits for, in words; empty if every device may be used."""
        unused = self._types.left_out | {worker.node: worker.device_type for worker in self._unused}
        if not unused:
            return ""
        return (
            f"; devices of {plural(len(unused), 'node')} are not used (--one-device-type): they are "
            f"{self._types.refused(unused.values())}. Rerun without --one-device-type to use them"
        )

    @property
    def _used(self) -> int:
        return len(self._all) - len(self._unused)

    def came_up(self, worker: WorkerHandle, heartbeat: Heartbeat) -> None:
        """Take the first heartbeat of a worker, and let the worker load."""
        worker.heartbeat = heartbeat
        if worker.node in self._left_out:
            self.let_go(worker)
        else:
            self.ask(worker, "load")

    def loaded(self, worker: WorkerHandle, answer: Loaded) -> bool:
        """Take a worker that has loaded; its node has not succeeded yet (:meth:`succeeded`).

        Returns:
            Whether the worker is used. In a run that keeps to one device type, a worker of another type is not.
        """
        self.any_loaded = True
        self._backoff.reset()
        worker.device_type = device_type(answer.device)
        if not self._types.takes(worker.device_type):
            self._set_unused(worker, answer)
            return False
        if told := self._types.differing(answer.device):
            self._note(
                f"the run has several device types, whose bytes for the same row may differ: {told}. Give "
                "--one-device-type to use workers of one type only",
                "several_device_types",
                logging.WARNING,
                node=worker.node,
            )
        return True

    def _set_unused(self, worker: WorkerHandle, answer: Loaded) -> None:
        """Leave a worker's node out. On a mixed node, keep the worker without work until all devices are known."""
        self._types.meet(answer.device)
        node = worker.node
        mixed = answer.node_is_mixed or any(
            other.node == node and other.device_type == self._types.chosen for other in self._all
        )
        if not any(other.node == node for other in self._unused):
            self._note(
                f"a device of node {node} is not used (--one-device-type): it is "
                f"{self._types.refused([worker.device_type])}",
                "other_device_type",
                logging.WARNING,
                node=node,
            )
        self._unused[worker] = None
        unused = [other for other in self._unused if other.node == node]
        if node not in self._room:  # it has joined since
            self._room = self._cluster.room()
        if not mixed or len(unused) >= self._room.get(node, 0):
            self._types.left_out[node] = worker.device_type
            self._capacity_until = float("-inf")
            for other in unused:
                self.let_go(other)

    def reopen_types(self) -> None:
        """Let the next worker choose the device type anew, if no worker of the chosen one is left."""
        chosen = self._types.chosen
        if chosen and not any(worker.device_type == chosen for worker in self._all):
            self._types.reopen()
            self._capacity_until = float("-inf")
            for worker in [*self._unused]:
                self.let_go(worker)

    def start_failed(self, worker: WorkerHandle, fault: Fault) -> None:
        """Wait before the next start, or give up if nothing ever starts.

        Args:
            worker: the worker, already ended.
            fault: reason why it has not started or not loaded.

        Raises:
            StorageError, VcfBatchError: :data:`START_ATTEMPTS` starts in a row have failed, and no other worker is
                likely to succeed.
        """
        # A worker that has never answered most likely waits for a machine, without a time limit. Another worker is
        # asked for, in case the process of the first one hangs.
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

    # Requests

    def ask(
        self, worker: WorkerHandle, method: Literal["heartbeat", "load", "run"], task: ShardTask | None = None
    ) -> None:
        """Send a request to a worker, and await the answer."""
        attempt_id = f"{task.shard.name}-{task.attempt}-{self._cluster.new_id()}" if task else ""
        request = Request(worker, method, task, attempt_id)
        request.key = self._cluster.send(request)
        self.requests[request.key] = request
        worker.requests.append(request)

    def answered(self, request: Request) -> None:
        """Remove a request that is answered, or never will be."""
        del self.requests[request.key]
        request.worker.requests.remove(request)

    # Ends

    def let_go(self, worker: WorkerHandle) -> None:
        """End a worker. Its unfinished tasks are queued again, and no failure is counted."""
        self._cluster.kill(worker)
        del self._all[worker]
        self._unused.pop(worker, None)
        for request in [*worker.requests]:
            self.answered(request)
            if request.task is not None:
                self._queue.repeat(request.task)

    def end(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._all:
            # An error here would hide the one that ends the run.
            with contextlib.suppress(Exception):
                self._cluster.kill(worker)

    def succeeded(self, worker: WorkerHandle, work: Work) -> None:
        """Count a success for the worker's node. Nodes that failed the same work may be left out."""
        self._leave_out(self._quarantine.succeeded(worker.node, work))

    def failed(self, fault: Fault, shard: Shard | None) -> None:
        """Count a failure of a shard, or of a start if it is None, against its node. The node may be left out."""
        self._leave_out(self._quarantine.failed(fault.node, shard, fault.reason))

    def _leave_out(self, bad: Set[str]) -> None:
        """Leave out some nodes from now on, and discard the failures there."""
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
