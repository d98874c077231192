"""A run of the driver's own loop without Ray: a cluster in virtual time, and an output in memory.

What becomes of each request is decided by a *world*, a function that a test gives. Nothing here waits, draws at random
or depends on the machine: the same world gives the same run.
"""

import copy
import dataclasses
import heapq
import io
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch import storage
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.cluster import Answer, Heartbeat, Loaded, Request, WorkerHandle
from vcf_batch.driver.commit_queue import CommitQueue
from vcf_batch.driver.fault import Failure, Fault
from vcf_batch.driver.ledger import Ledger
from vcf_batch.driver.loop import Loop
from vcf_batch.driver.progress import Progress
from vcf_batch.errors import RefusedError, StorageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output import commits, receipts
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import FileEntry
from vcf_batch.setup.job import Job
from vcf_batch.setup.run_models import Models
from vcf_batch.setup.shard_task import ShardTask

SYMPTOM = "it dies"

CONTENT = b"."
"""Of every tar and parquet: the driver looks at their sizes alone."""

ENDED = "2026-01-01T00:00:00+00:00"
"""When every shard was generated: no clock of this machine counts."""

HANGS = math.inf
"""Seconds that a request takes which is never answered."""

World = Callable[[str, Request], tuple[float, Fault | None]]
"""Seconds that a request (``load`` or ``run``) takes on a node, and the fault that it then ends with, if any. A fault
that does not concern one task alone ends the process; one with ``node_died`` ends the whole node."""


class Clock:
    """A clock that stands still until somebody moves it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds


def fault(failure: Failure, node: str, symptom: str = SYMPTOM, **more: Any) -> Fault:
    """A fault as a cluster or a worker has it."""
    error = StorageError("no storage") if failure is Failure.TROUBLE else RuntimeError("no process")
    return Fault(failure, symptom, str(error), node, error, **more)


def death(node: str) -> Fault:
    """The end of a worker's process."""
    return fault(Failure.CRASH, node, one_task=False)


def rows_of(task: ShardTask) -> set[int]:
    """The rows that a worker generates for a task."""
    rows = set(range(task.shard.start, task.shard.stop)) if task.selected is None else {*task.selected}
    return rows - task.verdicts.keys()


class AtOnce(Executor):
    """Does what it is given before it returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@dataclass(eq=False)
class Process:
    """A worker of the simulated cluster."""

    left_out: Sequence[str]
    node: str = ""
    """Empty while it waits for a machine."""
    device: int = -1
    """Number of its device on the node; -1 while it waits for a machine."""
    is_alive: bool = True
    free_at: float = 0.0
    """When it has done all that it has been asked."""
    requests: dict[Hashable, Request] = field(default_factory=dict)
    """What it has not answered."""
    running: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Begin and seconds of each attempt that it was given."""


class SimulatedCluster:
    """A :class:`vcf_batch.driver.cluster.Cluster` in virtual time.

    Args:
        job: what workers work on.
        nodes: workers that fit on each node.
        world: see :data:`World`.
        clock: moved by waiting and sleeping, and by nothing else.
    """

    def __init__(self, job: Job, nodes: Mapping[str, int], world: World, clock: Clock) -> None:
        self.nodes = dict(nodes)
        """Those that are there now."""
        self.processes: list[Process] = []
        """All that were ever started, in order."""
        self.devices: dict[str, str] = {}
        """Device type of the workers on a node, where it is another one than ``simulated``."""
        self.mixed: dict[str, list[str]] = {}
        """Device types on a node with several, one for each worker that fits. A worker gets the first free one."""
        self.world = world
        self._job, self._clock = job, clock
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._answers: dict[Hashable, tuple[Request, Answer]] = {}

    # What the driver sees

    def now(self) -> float:
        return self._clock.now()

    def sleep(self, seconds: float) -> None:
        self._advance(self.now() + seconds, lambda: False)

    def new_id(self) -> str:
        return f"{next(self._numbers):08x}"

    def start(self, left_out: Sequence[str]) -> Process:
        process = Process(left_out)
        self.processes.append(process)
        self._place()
        return process

    def send(self, request: Request) -> Hashable:
        key, process = next(self._numbers), cast(Process, request.worker.process)
        process.requests[key] = request
        if not process.is_alive:
            self._answer(process, key, death(process.node))
        elif request.method == "heartbeat":
            if process.node:
                self._answer(process, key, self._heartbeat(process))
        else:
            seconds, end = self.world(process.node, request)
            begin = max(self.now(), process.free_at)
            process.free_at = begin + seconds
            process.running[request.attempt_id] = begin, seconds
            if seconds != HANGS:
                self.at(process.free_at, lambda: self._end(process, key, end))
        return key

    def wait(self, requests: Mapping[Hashable, Request], seconds: float) -> list[tuple[Request, Answer]]:
        self._advance(self.now() + seconds, lambda: not requests.keys().isdisjoint(self._answers))
        return [self._answers[key] for key in requests if key in self._answers]

    def kill(self, worker: WorkerHandle) -> None:
        self.end(cast(Process, worker.process), death(worker.node))

    def room(self) -> dict[str, int]:
        return dict(self.nodes)

    def describe(self) -> str:
        return f"there are {self.nodes}"

    # What happens there

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen at some time."""
        heapq.heappush(self._events, (seconds, next(self._numbers), event))

    def end(self, process: Process, end: Fault) -> None:
        """End a process, which answers nothing more."""
        if process.is_alive:
            process.is_alive = False
            for key in [*process.requests]:
                self._answer(process, key, end)
            self._place()

    def add_node(self, node: str, room: int) -> None:
        """Let a node join."""
        self.nodes[node] = room
        self._place()

    def end_node(self, node: str, end: Fault) -> None:
        """End a node with all its processes."""
        self.nodes.pop(node, None)
        for process in self.processes:
            if process.node == node:
                self.end(process, end)

    def _advance(self, until: float, is_enough: Callable[[], bool]) -> None:
        """Let happen what happens until some time, or until it is enough; what comes at one time comes together."""
        while not is_enough() and self._events and self._events[0][0] <= until:
            self._clock.seconds = max(self.now(), self._events[0][0])
            while self._events and self._events[0][0] <= self.now():
                heapq.heappop(self._events)[2]()
        if not is_enough():
            self._clock.seconds = max(self.now(), until)

    def _place(self) -> None:
        """Give processes that wait a node with room."""
        for process in self.processes:
            if process.is_alive and not process.node and (node := self._node_for(process)):
                process.node = node
                held = {other.device for other in self.processes if other.is_alive and other.node == node} - {-1}
                process.device = next(number for number in itertools.count() if number not in held)
                for key in [*process.requests]:
                    self._answer(process, key, self._heartbeat(process))

    def _node_for(self, process: Process) -> str:
        taken = [other.node for other in self.processes if other.is_alive]
        found = (node for node, room in self.nodes.items() if node not in process.left_out and taken.count(node) < room)
        return next(found, "")

    def _answer(self, process: Process, key: Hashable, answer: Answer) -> None:
        self._answers[key] = process.requests.pop(key), answer

    def _end(self, process: Process, key: Hashable, end: Fault | None) -> None:
        """A request ends, as the world has said."""
        if key not in process.requests:
            return
        if end is not None and end.node_died:
            self.end_node(process.node, end)
        elif end is not None and not end.one_task:
            self.end(process, end)
        else:
            task, attempt_id = process.requests[key].task, process.requests[key].attempt_id
            if task is None:
                self._answer(process, key, end or Loaded(self._device(process), process.node in self.mixed))
                return
            generated = None if task.selected is not None else self._stage(process, task, attempt_id)
            self._answer(process, key, end or generated)

    def _device(self, process: Process) -> dict[str, Any]:
        if process.node in self.mixed:
            return {"type": self.mixed[process.node][process.device]}
        return {"type": self.devices.get(process.node, "simulated")}

    def _heartbeat(self, process: Process) -> Heartbeat:
        """A number of each attempt that changes by the second, while it waits for its turn too, unless it hangs."""
        progress = {
            attempt_id: 0 if seconds == HANGS and begin <= self.now() else int(self.now()) + 1
            for attempt_id, (begin, seconds) in process.running.items()
        }
        return Heartbeat(process.node, progress, {})

    def _stage(self, process: Process, task: ShardTask, attempt_id: str) -> tuple[Receipt, dict[str, str]]:
        staged = {
            kind: f"{commits.STAGING}/{attempt_id}/{task.shard.name}{suffix}"
            for kind, suffix in receipts.FILE_SUFFIXES.items()
        }
        for path in staged.values():
            storage.publish_bytes(storage.join(self._job.config.output, path), CONTENT)
        sampled = len(rows_of(task))
        receipt = Receipt(
            shard=task.shard,
            fingerprint=self._job.fingerprint,
            attempt=task.attempt,
            counts={"success": sampled, "rejected": 0, "failed": len(task.verdicts)},
            files=dict.fromkeys(receipts.FILE_SUFFIXES, FileEntry(len(CONTENT), "")),
            device=self._device(process),
            timings={"worker": f"{process.node}:{self.processes.index(process)}", "total": 1.0, "ended": ENDED},
            sampled=sampled,
        )
        return receipt, staged


class Notes(Progress):
    """Keeps what the user is told."""

    def __init__(self, total: int, clock: Clock) -> None:
        super().__init__(total, 0, now=clock.now)
        self.told: list[tuple[float, str, str]] = []
        """Time, event and message."""
        self._clock = clock

    def note(self, message: str, event: str = "note", level: int = logging.INFO, **fields: Any) -> None:
        self.told.append((self._clock.now(), event, message))


class NoExporter:
    """Gets the figures, and drops them."""

    def committed(self, receipt: Receipt) -> None:
        pass

    def now(self, rows_done: int, workers: int) -> None:
        pass


@dataclass
class Held:
    """A lease that nobody else wants, unless a test says so."""

    lost: RefusedError | None = None

    def confirm(self) -> None:
        if self.lost:
            raise self.lost


class Simulation:
    """A run of the loop over a manifest in memory.

    Args:
        name: that no other simulation of this process has now.
        nodes: workers that fit on each node.
        world: see :data:`World`.
        rows: of the manifest.
        settings: of the run; ``shard_size``, ``num_workers`` and others.
    """

    def __init__(self, name: str, nodes: Mapping[str, int], world: World, rows: int, **settings: Any) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["a row"] * rows}), buffer)
        self.folder = f"memory://{name}"
        storage.publish_bytes(f"{self.folder}/manifest.parquet", buffer.getvalue())
        self.job = _job(self.folder, {"num_workers": 2, "shard_size": 4, "stall_timeout": 60.0, **settings})
        self.clock, self.held = Clock(), Held()
        self.cluster = SimulatedCluster(self.job, nodes, world, self.clock)
        self.notes = Notes(rows, self.clock)

    def again(self, nodes: Mapping[str, int], **settings: Any) -> "Simulation":
        """The next run of the same output, on a cluster of its own."""
        resumed = copy.copy(self)
        resumed.job = dataclasses.replace(self.job, config=self.job.config.replace(**settings))
        resumed.clock, resumed.held = Clock(), Held()
        resumed.cluster = SimulatedCluster(resumed.job, nodes, self.cluster.world, resumed.clock)
        resumed.notes = Notes(self.job.manifest.num_rows, resumed.clock)
        return resumed

    def run(self, ends: float = math.inf) -> None:
        """Run the loop to its end.

        Args:
            ends: time from which on it begins no shard.

        Raises:
            VcfBatchError: as :meth:`vcf_batch.driver.loop.Loop.run`.
        """
        ledger, output = Ledger(self.job, self.clock.now), self.job.config.output
        queue = CommitQueue(output, cast(Any, self.held), ledger, self.notes.note, self.clock.now, AtOnce())
        Loop(self.job, self.cluster, ledger, queue, self.notes, NoExporter()).run(ends)

    def remove(self) -> None:
        """Forget what it has written."""
        storage.remove_tree(self.folder)

    @property
    def committed(self) -> dict[int, Receipt]:
        """The receipts of the output by shard."""
        return {receipt.shard.index: receipt for receipt in receipts.read(self.job.config.output)}

    def told(self, event: str) -> list[str]:
        """What the user was told of a kind of event."""
        return [message for _, kind, message in self.notes.told if kind == event]

    def times(self, event: str) -> list[float]:
        """When the user was told of it."""
        return [time for time, kind, _ in self.notes.told if kind == event]


def _job(folder: str, settings: Mapping[str, Any]) -> Job:
    config = RunConfig(manifest=f"{folder}/manifest.parquet", output=f"{folder}/out", **settings)
    models = Models(ResolvedModel("m", "hub", "m", "0" * 40), None, "none", "none")
    return Job(config, Manifest.open(config.manifest), models, fields={})
