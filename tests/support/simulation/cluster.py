"""A Ray cluster in virtual time, with workers that die, hang, lie, and live on after they were declared dead."""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from support.simulated import ENDED, death, fault
from support.simulation.forms import Form
from support.simulation.processes import Killed, Scheduler
from vcf_batch import storage
from vcf_batch.driver.cluster import Answer, Heartbeat, Loaded, Request, WorkerHandle
from vcf_batch.driver.fault import Failure, Fault
from vcf_batch.errors import StorageError
from vcf_batch.output import commits, receipts
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import FileEntry
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask

KILLS, RAISES, HANGS = "kills", "raises", "hangs"
"""What a row may do to its worker, each time that it is generated."""
GONE = "the reference is gone"
"""Error of a row that could be generated once and cannot any more."""
LOAD_SECONDS, ROW_SECONDS = 5.0, 2.0
SLOWER = 20.0


@dataclass
class Ways:
    """What happens to workers, as shares of their tasks, and what rows and nodes do."""

    deaths: int = 0
    """Deaths of single processes that are left, which nobody is to blame for."""
    dies: float = 0.0
    """Share of tasks in which such a death strikes."""
    troubled: float = 0.0
    """Share of tasks that fail by trouble of the network."""
    lies: float = 0.0
    """Share of attempts whose staged files are cut short."""
    lives_on: float = 0.0
    """Share of workers that go on after they were declared dead."""
    rows: Mapping[int, str] = field(default_factory=dict)
    """Rows that harm their workers."""
    gone: set[int] = field(default_factory=set)
    """Rows that fail by themselves from now on."""
    greedy: Mapping[int, int] = field(default_factory=dict)
    """Largest number of rows at once beside which a row fits into memory."""
    bad_nodes: set[str] = field(default_factory=set)
    """Nodes where every shard kills its worker."""
    slow_nodes: set[str] = field(default_factory=set)
    """Nodes where a row takes :data:`SLOWER` times as long."""


class Nodes:
    """The machines, which all drivers share."""

    def __init__(self, room: Mapping[str, int]) -> None:
        self.room = dict(room)
        """Workers that fit on each node that is there."""
        self.workers: dict[SimulatedWorker, None] = {}
        """Those that live or live on, in the order of their starts."""


@dataclass(eq=False)
class Key:
    """The key of an answer, with the answer once it is there."""

    answers: list[Answer] = field(default_factory=list)
    """One answer, or none yet."""


@dataclass(eq=False)
class SimulatedWorker:
    """A worker's process."""

    cluster: "SimulatedRay"
    name: str
    left_out: Sequence[str]
    node: str = ""
    is_known: bool = True
    """Whether its cluster takes its answers. One that was declared dead may live on without."""
    requests: dict[Key, Request] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)
    turn: int = 0
    """Number of the task that may be sampled now."""
    given: int = 0


class SimulatedRay:
    """A :class:`vcf_batch.driver.cluster.Cluster`, as one driver sees it.

    Args:
        job: the run.
        scheduler: the clock, and the processes.
        nodes: the machines.
        ways: what goes wrong.
        draw: decides about it.
        form: what the files of shards hold.
        group: name of the driver.
        tell: gets what happens, for the trace.
    """

    def __init__(
        self,
        job: Job,
        scheduler: Scheduler,
        nodes: Nodes,
        ways: Ways,
        draw: random.Random,
        form: Form,
        group: str,
        tell: Callable[[str], None],
    ) -> None:
        self._job, self._scheduler, self._nodes, self._ways = job, scheduler, nodes, ways
        self._draw, self._form, self._group, self._tell = draw, form, group, tell
        self._numbers = itertools.count()
        self._answered: list[Key] = []
        """Keys of the answers that have arrived since the driver began to wait, and of those that were there."""

    # What the driver sees

    def now(self) -> float:
        return self._scheduler.now

    def sleep(self, seconds: float) -> None:
        self._scheduler.sleep(seconds)

    def new_id(self) -> str:
        return f"{self._group}-{next(self._numbers):04x}"

    def start(self, left_out: Sequence[str]) -> SimulatedWorker:
        worker = SimulatedWorker(self, f"{self._group}-worker-{next(self._numbers)}", left_out)
        self._nodes.workers[worker] = None
        place(self._nodes)
        return worker

    def send(self, request: Request) -> Hashable:
        key, worker = Key(), cast(SimulatedWorker, request.worker.process)
        worker.requests[key] = request
        if worker not in self._nodes.workers or not worker.is_known:
            self.answer(worker, key, death(worker.node))
        elif request.method == "heartbeat":
            if worker.node:
                self.answer(worker, key, self._heartbeat(worker))
        elif request.method == "load":
            self._scheduler.spawn(lambda: self._load(worker, key), f"{worker.name} load", worker.name)
        else:
            number, worker.given = worker.given, worker.given + 1
            worker.progress[request.attempt_id] = 1
            self._scheduler.spawn(
                lambda: self._run(worker, key, request, number), f"{worker.name} {request.attempt_id}", worker.name
            )
        return key

    def wait(self, requests: Mapping[Hashable, Request], seconds: float) -> list[tuple[Request, Answer]]:
        keys = cast(Mapping[Key, Request], requests)
        if seconds:
            self._answered = [key for key in keys if key.answers]
            self._scheduler.wait(lambda: any(key in keys for key in self._answered), self.now() + seconds)
        return [(request, key.answers[0]) for key, request in keys.items() if key.answers]

    def kill(self, worker: WorkerHandle) -> None:
        self.end(cast(SimulatedWorker, worker.process), death(worker.node))

    def room(self) -> dict[str, int]:
        return dict(self._nodes.room)

    def describe(self) -> str:
        return f"there are {self._nodes.room}"

    # What happens

    def answer(self, worker: SimulatedWorker, key: Key, answer: Answer) -> None:
        if worker.requests.pop(key, None) is not None and worker.is_known:
            key.answers.append(answer)
            self._answered.append(key)

    def end(self, worker: SimulatedWorker, end: Fault) -> None:
        """End a worker for its driver. It may live on for a while, and then nobody takes its answers."""
        for key in [*worker.requests]:
            self.answer(worker, key, end)
        if worker not in self._nodes.workers or not worker.is_known:
            return
        worker.is_known = False
        if self._draw.random() < self._ways.lives_on and not end.node_died:
            self._tell(f"{worker.name} is declared dead and lives on")
            self._scheduler.spawn(lambda: self._end_later(worker), f"end of {worker.name}", f"end of {worker.name}")
        else:
            self._end_now(worker)

    def _end_later(self, worker: SimulatedWorker) -> None:
        self._scheduler.sleep(self._draw.expovariate(1 / 60))
        self._end_now(worker)

    def _end_now(self, worker: SimulatedWorker) -> None:
        self._scheduler.kill(worker.name)
        self._nodes.workers.pop(worker, None)
        place(self._nodes)

    def came_up(self, worker: SimulatedWorker) -> None:
        """A worker has got a machine."""
        for key, request in [*worker.requests.items()]:
            if request.method == "heartbeat":
                self.answer(worker, key, self._heartbeat(worker))

    def _heartbeat(self, worker: SimulatedWorker) -> Heartbeat:
        return Heartbeat(worker.node, dict(worker.progress), {})

    def _load(self, worker: SimulatedWorker, key: Key) -> None:
        self._scheduler.sleep(LOAD_SECONDS * (0.5 + self._draw.random()))
        if self._draw.random() < self._ways.troubled / 2:
            self.answer(worker, key, fault(Failure.TROUBLE, worker.node))
        else:
            self.answer(worker, key, Loaded({"type": "simulated"}))

    def _run(self, worker: SimulatedWorker, key: Key, request: Request, number: int) -> None:
        """Do a task, in the worker's own process."""
        assert request.task is not None
        task, attempt_id = request.task, request.attempt_id

        def alive() -> None:
            worker.progress[attempt_id] += 1

        try:
            while worker.turn != number:
                self._scheduler.sleep(1.0)
                alive()
            self._sample(worker, task, alive)
            worker.turn += 1
            result = None if task.selected is not None else self._stage(task, attempt_id, worker)
            self.answer(worker, key, result)
        except StorageError as error:
            worker.turn = max(worker.turn, number + 1)
            self.answer(worker, key, Fault.of(error, worker.node))
        except RuntimeError as error:
            worker.turn = max(worker.turn, number + 1)
            self.answer(worker, key, Fault.of(error, worker.node))
        except MemoryError as error:
            worker.turn = max(worker.turn, number + 1)
            self.answer(worker, key, Fault(Failure.MEMORY, "no memory", "no memory", worker.node, error))
        finally:
            worker.progress.pop(attempt_id, None)

    def _sample(self, worker: SimulatedWorker, task: ShardTask, alive: Callable[[], None]) -> None:
        """Let time pass for each row, and let happen what rows, nodes and chance do."""
        ways, chance = self._ways, self._draw.random()
        if worker.node in ways.bad_nodes:
            self._scheduler.sleep(1.0)
            self._die(worker, f"{worker.name} dies, as all do on {worker.node}")
        at_once = task.sampled_at_once or self._job.config.batch_size or 1
        for row in rows_of(task, self._job):
            slower = SLOWER if worker.node in ways.slow_nodes else 1.0
            self._scheduler.sleep(slower * ROW_SECONDS * self._draw.random())
            alive()
            harm = ways.rows.get(row)
            if harm == KILLS:
                self._die(worker, f"{worker.name} is killed by row {row}")
            elif harm == RAISES:
                raise RuntimeError("a row raises")
            elif harm == HANGS:
                self._scheduler.sleep(1e9)
            elif at_once > ways.greedy.get(row, at_once):
                raise MemoryError("no memory")
        if chance < ways.dies and ways.deaths:
            ways.deaths -= 1
            self._die(worker, f"{worker.name} dies")
        elif ways.dies <= chance < ways.dies + ways.troubled:
            raise StorageError("trouble")

    def _die(self, worker: SimulatedWorker, told: str) -> None:
        self._tell(told)
        lives_on, self._ways.lives_on = self._ways.lives_on, 0.0
        self.end(worker, death(worker.node))
        self._ways.lives_on = lives_on
        raise Killed

    def _stage(self, task: ShardTask, attempt_id: str, worker: SimulatedWorker) -> tuple[Receipt, dict[str, str]]:
        output, shard = self._job.config.output, task.shard
        kept = self._kept(task)
        entries = {
            row: kept[row] if row in kept else generated(row, self._job, task.verdicts, self._ways.gone)
            for row in range(shard.start, shard.stop)
        }
        files, sums = self._form.files(self._job, shard, entries)
        counts = {
            status: sum(entry["status"] == status for entry in entries.values()) for status in ("success", "failed")
        }
        receipt = Receipt(
            shard=shard,
            fingerprint=self._job.fingerprint,
            attempt=task.attempt,
            counts={"success": counts["success"], "rejected": 0, "failed": counts["failed"]},
            files={kind: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for kind, data in files.items()},
            device={"type": "simulated"},
            timings={"worker": f"{worker.node}:{worker.name}", "total": 1.0, "ended": ENDED},
            sampled=sum(row not in kept and row not in task.verdicts for row in entries),
            sampled_at_once=task.sampled_at_once,
            **sums,
        )
        lie = self._draw.random() < self._ways.lies
        staged = {kind: f"{commits.STAGING}/{attempt_id}/{shard.name}{receipts.FILE_SUFFIXES[kind]}" for kind in files}
        for kind, path in staged.items():
            storage.publish_bytes(storage.join(output, path), files[kind][: -1 if lie else None])
        return receipt, staged

    def _kept(self, task: ShardTask) -> dict[int, Any]:
        """Entries of the rows of a shard that a repair keeps, read from the output as workers do."""
        mask = self._job.redo.get(task.shard.index)
        if mask is None or all(mask):
            return {}
        url = storage.join(self._job.config.output, f"{task.shard.name}.parquet")
        try:
            found = self._form.entries(storage.read_bytes(url), task.shard)
        except (FileNotFoundError, ValueError) as error:
            raise StorageError(f"{url} cannot be read: {error}") from error
        return {
            row: found[row]
            for row, again in zip(range(task.shard.start, task.shard.stop), mask, strict=True)
            if not again
        }


def rows_of(task: ShardTask, job: Job) -> list[int]:
    """The rows that a worker generates for a task, in order."""
    shard = task.shard
    mask = job.redo.get(shard.index, bytes([True]) * len(shard))
    rows = [row for row, again in zip(range(shard.start, shard.stop), mask, strict=True) if again]
    return [row for row in rows if row not in task.verdicts and (task.selected is None or row in task.selected)]


def generated(row: int, job: Job, verdicts: Mapping[int, str], gone: set[int]) -> dict[str, Any]:
    """The entry of a row: a digest of its number and the run's settings stands for its image."""
    if row in verdicts:
        return {"status": "failed", "told": verdicts[row]}
    if row in gone:
        return {"status": "failed", "told": GONE}
    return {"status": "success", "told": hashlib.sha256(f"{row} {job.config.seed}".encode()).hexdigest()[:12]}


def place(nodes: Nodes) -> None:
    """Give workers that wait a machine with room."""
    waiting = [worker for worker in nodes.workers if not worker.node and worker.is_known]
    if not waiting:
        return
    taken = Counter(worker.node for worker in nodes.workers)
    for worker in waiting:
        found = (node for node, room in nodes.room.items() if node not in worker.left_out and taken[node] < room)
        if node := next(found, ""):
            worker.node = node
            taken[node] += 1
            worker.cluster.came_up(worker)
