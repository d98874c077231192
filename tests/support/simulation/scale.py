"""A run on many GPUs, with a clock of real costs.

The driver is the product's, as in every simulation. A shard is one sleep of its worker and no row is looked at, so a
hundred million rows take minutes.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.simulated import ENDED, fault
from support.simulation.cluster import Key, Nodes, SimulatedRay, SimulatedWorker, Ways, place
from support.simulation.costs import Costs
from support.simulation.object_store import Store, Strike, Written
from support.simulation.processes import Killed, Process, Scheduler
from support.simulation.tally import READY, SAMPLING, GpuTime, Requests
from support.simulation.universe import Universe
from support.simulation.witness import OUT, Witness
from vcf_batch import storage
from vcf_batch.driver import commit_queue
from vcf_batch.driver.cluster import Heartbeat, Loaded, Request
from vcf_batch.driver.fault import Failure
from vcf_batch.output import commits, receipts
from vcf_batch.output.progress_file import PROGRESS_NAME, Told
from vcf_batch.output.receipts import RECEIPT_SUFFIX, Receipt
from vcf_batch.records import FileEntry, Shard
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.storage import reading

CONTENT = b"."
"""Content of every tar and parquet. Their sizes count as bytes that are moved, not as memory."""
ENTRY = FileEntry(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
FILE_ROWS = 1_000_000


@dataclass(frozen=True)
class Scenario:
    """What is simulated."""

    gpus: int
    rows: int
    shard_size: int
    lost_per_hour: float = 0.0
    """Share of the nodes that is lost within an hour, each replaced by a new one."""
    killed_at: float | None = None
    """Share of the shards after which the driver is killed, and started again."""
    finished: int = 0
    """Number of shards, the last ones, that are finished by then in no time, so that a resume finds them."""
    commits_at_once: int = commit_queue.COMMITS_AT_ONCE
    costs: Costs = dataclasses.field(default_factory=Costs)


class ScaledRay(SimulatedRay):
    """Workers that take as long as a :class:`Scenario` says."""

    def __init__(self, run: "ScaledRun", job: Job, group: str) -> None:
        super().__init__(job, run.scheduler, run.nodes, run.ways, run.draw, run.form, group, run.tell)
        self._scaled = run
        self._watched = run.scheduler.now
        self._turns: dict[SimulatedWorker, dict[int, Process]] = {}
        """Processes of each worker that wait for their turn, by the number of their task."""

    def send(self, request: Request) -> Any:
        if request.task is None:
            return super().send(request)
        with self._scaled.outside():
            self._scaled.spend(self._scaled.scenario.costs.dispatch_seconds)
            self._scaled.gave(request.task.shard.index)
            return super().send(request)

    def wait(self, requests: Mapping[Any, Request], seconds: float) -> Any:
        with self._scaled.outside():
            if seconds:
                passed, self._watched = self.now() - self._watched, self.now()
                watched = self._scaled.scenario.costs.watch_seconds * len(self._nodes.workers)
                self._scaled.spend(min(passed, 1.0) * watched)
            return super().wait(requests, seconds)

    def _heartbeat(self, worker: SimulatedWorker) -> Heartbeat:
        # What it does is one sleep, in which it is not silent.
        return Heartbeat(worker.node, dict.fromkeys(worker.progress, int(self.now()) + 1), {})

    def _load(self, worker: SimulatedWorker, key: Key) -> None:
        self._scheduler.sleep(self._scaled.scenario.costs.load_seconds)
        self._scaled.ready(worker)
        self.answer(worker, key, Loaded({"type": "simulated"}))

    def _run(self, worker: SimulatedWorker, key: Key, request: Request, number: int) -> None:
        assert request.task is not None
        task, run = request.task, self._scaled
        if worker.turn != number:
            self._turns.setdefault(worker, {})[number] = self._scheduler.current
            self._scheduler.wait(None, math.inf)
        run.sample(worker, task)
        worker.turn += 1
        if (follower := self._turns.get(worker, {}).pop(worker.turn, None)) is not None:
            self._scheduler.wake(follower)
        self.answer(worker, key, self._staged(task, request.attempt_id, worker))
        worker.progress.pop(request.attempt_id, None)

    def _end_now(self, worker: SimulatedWorker) -> None:
        self._scaled.gone(worker)
        self._turns.pop(worker, None)
        super()._end_now(worker)

    def _staged(self, task: ShardTask, attempt_id: str, worker: SimulatedWorker) -> tuple[Receipt, dict[str, str]]:
        shard = task.shard
        receipt = _receipt(shard, self._job.fingerprint, task.attempt, f"{worker.node}:{worker.name}")
        staged = {
            kind: f"{commits.STAGING}/{attempt_id}/{shard.name}{suffix}"
            for kind, suffix in receipts.FILE_SUFFIXES.items()
        }
        for path in staged.values():
            url = storage.join(self._job.config.output, path)
            storage.publish_bytes(url, CONTENT)
            storage.size(url)
        return receipt, staged


class Readers(concurrent.futures.Executor):
    """Threads of a driver that read receipts side by side."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        given = [*zip(*iterables, strict=True)]
        results: dict[int, Any] = {}
        for number, arguments in enumerate(given):

            def work(number: int = number, arguments: Sequence[Any] = arguments) -> None:
                results[number] = fn(*arguments)

            self._scheduler.spawn(work, "reader", self._scheduler.current.group)
        self._scheduler.wait(lambda: len(results) == len(given), math.inf)
        return iter([results[number] for number in range(len(given))])

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


class ScaledRun(Universe):
    """A run of a :class:`Scenario`, from its first driver to its end."""

    def __init__(self, scenario: Scenario, trace: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        super().__init__(0, trace)
        self.scheduler.end_at = math.inf
        size, gpus = scenario.costs.gpus_per_node, scenario.gpus
        self._node_numbers = itertools.count()
        self._dead: set[str] = set()
        """Nodes that are lost."""
        self.nodes = Nodes({self._node_name(): min(size, gpus - before) for before in range(0, gpus, size)})
        self.gpu_time = GpuTime(lambda: self.scheduler.now)
        self.requests = Requests()
        self.commits: list[float] = []
        """Seconds that each commit has taken."""
        self.cpu_seconds = 0.0
        """Processor time of the drivers, by the costs."""
        self.own_cpu_seconds = 0.0
        """Processor time that the product's code has taken in the drivers, here, without Ray and the client of S3."""
        self.first_shards: list[float] = []
        """Seconds from the start of each driver to the first shard that it hands out."""
        self.committed = 0
        self.ended = 0.0
        """Time at which the last driver has ended."""
        self.shards = math.ceil(scenario.rows / scenario.shard_size)
        self._began: float | None = None
        self._cpu_free_at = 0.0
        self._given: set[int] = set()
        self._states: dict[SimulatedWorker, str] = {}
        self._since: dict[SimulatedWorker, float] = {}
        """Begin of what each worker samples now."""
        self._sampled: dict[int, float] = {}
        """Seconds of the last sampling of each shard."""
        self.lost_seconds = 0.0
        """Seconds of sampling that had to be repeated."""

    @property
    def lost_nodes(self) -> int:
        """Number of the nodes that were lost."""
        return len(self._dead)

    # The world

    def _witness(self) -> Witness:
        return ScaledWitness(self)

    def _store(self) -> Store:
        # The time of a request passes in _count.
        return Store(self.draw, lambda seconds: None, lambda: self.scheduler.now, self._who, self._later)

    def _is_read(self) -> bool:
        return False

    def _part(self) -> int:
        self.shard_size = self.scenario.shard_size
        return self.scenario.rows

    def _ways(self) -> Ways:
        return Ways()

    def _write_part(self, number: int) -> None:
        """Write the manifest, in files of a million rows."""
        for file, start in enumerate(range(0, self.parts[number], FILE_ROWS)):
            data = _parquet(min(FILE_ROWS, self.parts[number] - start))
            storage.publish_bytes(f"{self.home}/in/part-{file:03d}.parquet", data)

    def _node_name(self) -> str:
        return f"node-{next(self._node_numbers)}"

    def _cluster(self, job: Job, group: str) -> SimulatedRay:
        return ScaledRay(self, job, group)

    def _count(self, action: str, key: str) -> Strike | None:
        """Let the time of a request to the storage pass."""
        with self.outside():
            costs, (group, _) = self.scenario.costs, self._who()
            size = self.shard_size * costs.image_bytes if key.endswith(".tar") and action in ("copy", "put") else 0.0
            objects = self.store.objects
            sent = costs.requests(action, size, key in objects, len(objects.below.get(key, ())))
            is_driver = group in self.started
            self.requests.add("driver" if is_driver else "workers", sent, self.scheduler.now)
            self.spend(len(sent) * costs.request_cpu_seconds * is_driver, costs.seconds(sent, action, size))
        return None

    def spend(self, seconds: float, more: float = 0.0) -> None:
        """Let time pass in which the driver's processor works, one piece of work after the other, and ``more`` time."""
        now = self.scheduler.now
        if seconds:
            self.cpu_seconds += seconds
            self._cpu_free_at = max(self._cpu_free_at, now) + seconds
            more += self._cpu_free_at - now
        self.scheduler.sleep(more)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Within the block no code of the product runs."""
        begin = time.thread_time()
        try:
            yield
        finally:
            self.own_cpu_seconds -= time.thread_time() - begin

    # The story

    def _story(self) -> None:
        scenario, scheduler = self.scenario, self.scheduler
        self.gpu_time.add("all", scenario.gpus)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "ThreadPoolExecutor", lambda *_: Readers(scheduler))
            patch.setattr(commits, "commit", self._timed(commits.commit))
            patch.setattr(commit_queue, "COMMITS_AT_ONCE", scenario.commits_at_once)
            if scenario.lost_per_hour:
                scheduler.spawn(self._lose_nodes, "losses", "losses")
            first = self._start_after(scenario.costs.check_row_seconds * scenario.rows)
            if scenario.killed_at is not None:
                enough = scenario.killed_at * (self.shards - scenario.finished)
                scheduler.wait(lambda: self.committed >= enough, math.inf)
                scheduler.kill(first)
                scheduler.wait(lambda: not self._alive(), math.inf)
                self._finish(scenario.finished)
                self._start_after(0.0)
            scheduler.wait(lambda: not self._alive(), math.inf)
        self.ended = scheduler.now
        self.gpu_time.add("all", 0)
        scheduler.kill("losses")

    def _finish(self, number: int) -> None:
        """Finish the last shards in no time. The driver has told of them before it died."""
        job, objects, progress = self.job(), self.store.objects, f"{OUT}/{PROGRESS_NAME}"
        told = Told.from_json(objects[progress])
        for shard in job.shards[len(job.shards) - number :]:
            url = f"{OUT}/{shard.name}"
            for suffix in receipts.FILE_SUFFIXES.values():
                objects.put(url + suffix, CONTENT)
            receipt = _receipt(shard, job.fingerprint, 1, "another")
            objects.put(url + RECEIPT_SUFFIX, receipt.to_json())
            told.add(receipt, len(receipt.to_json()))
        objects.put(progress, told.to_json())

    def _start_after(self, seconds: float) -> str:
        """Start a driver that checks its manifest for some time."""
        self._began = self.scheduler.now
        self.scheduler.sleep(seconds + self.scenario.costs.connect_seconds)
        return self.start()

    def _drive(self, group: str, job: Job, redo: dict[int, bytes]) -> None:
        try:
            super()._drive(group, job, redo)
        finally:
            self.own_cpu_seconds += time.thread_time()

    def _chosen(self, group: str, redo: dict[int, bytes]) -> dict[int, bytes]:
        return {}

    def _timed(self, commit: Callable[..., Receipt]) -> Callable[..., Receipt]:
        def timed(*given: Any) -> Receipt:
            begin, used = self.scheduler.now, time.thread_time()
            receipt = commit(*given)
            self.own_cpu_seconds += time.thread_time() - used
            self.commits.append(self.scheduler.now - begin)
            return receipt

        return timed

    def _lose_nodes(self) -> None:
        per_second = len(self.nodes.room) * self.scenario.lost_per_hour / 3600
        while True:
            self.scheduler.sleep(self.draw.expovariate(per_second))
            if alive := [node for node in self.nodes.room if node not in self._dead]:
                node = self.draw.choice(alive)
                self.scheduler.spawn(functools.partial(self._lose, node), f"loss of {node}", "losses")

    def _lose(self, node: str) -> None:
        """Lose a node. The driver learns it later, and later still another node joins."""
        costs, size = self.scenario.costs, self.nodes.room[node]
        self._dead.add(node)
        for worker in self._on(node):
            self.gone(worker)
            self.scheduler.kill(worker.name)
        self.gpu_time.add("all", -size)
        self.scheduler.sleep(costs.notice_seconds)
        del self.nodes.room[node]
        for worker in self._on(node):
            worker.cluster.end(worker, fault(Failure.LOSS, node, node_died=True, one_task=False))
        self.scheduler.sleep(max(costs.node_seconds - costs.notice_seconds, 0.0))
        self.nodes.room[self._node_name()] = size
        self.gpu_time.add("all", size)
        place(self.nodes)

    def _on(self, node: str) -> list[SimulatedWorker]:
        return [worker for worker in self.nodes.workers if worker.node == node]

    # What happens to GPUs

    def gave(self, shard: int) -> None:
        """A shard is handed out."""
        if self._began is not None:
            self.first_shards.append(self.scheduler.now - self._began)
            self._began = None
        self._given.add(shard)
        if len(self._given) == self.shards - self.scenario.finished:
            self.gpu_time.all_given()

    def ready(self, worker: SimulatedWorker) -> None:
        """A worker has loaded."""
        if worker.node in self._dead:
            raise Killed
        self._become(worker, READY)

    def sample(self, worker: SimulatedWorker, task: ShardTask) -> None:
        """Let a worker sample the rows of a shard."""
        costs, rows = self.scenario.costs, len(task.shard)
        seconds = rows * costs.image_seconds * (1 + costs.spread * self.draw.uniform(-1, 1))
        self.scheduler.sleep(seconds * costs.between_share)
        self.lost_seconds += self._sampled.pop(task.shard.index, 0.0)
        self._since[worker] = self.scheduler.now
        self._become(worker, SAMPLING)
        self.scheduler.sleep(seconds)
        del self._since[worker]
        self._become(worker, READY)
        self._sampled[task.shard.index] = seconds

    def gone(self, worker: SimulatedWorker) -> None:
        """A worker has ended."""
        if (state := self._states.pop(worker, None)) is not None:
            self.gpu_time.add(state, -1)
        if (since := self._since.pop(worker, None)) is not None:
            self.lost_seconds += self.scheduler.now - since

    def _become(self, worker: SimulatedWorker, state: str) -> None:
        if (before := self._states.get(worker)) is not None:
            self.gpu_time.add(before, -1)
        self._states[worker] = state
        self.gpu_time.add(state, 1)


class ScaledWitness(Witness):
    """Counts the shards of one run. It trusts the files, which all runs share."""

    def watch(self, written: Written) -> None:
        super().watch(written)
        self._universe.store.written.clear()
        if written.key.endswith(RECEIPT_SUFFIX) and written.data is not None:
            self._universe.committed += 1

    def read_shard(self, stem: str) -> tuple[Receipt, dict[int, Any]]:
        objects = self._universe.store.objects
        receipt = Receipt.from_json(objects[stem + RECEIPT_SUFFIX])
        if any(objects.get(stem + suffix) != CONTENT for suffix in receipts.FILE_SUFFIXES.values()):
            raise self._universe.violation(f"the receipt of shard {stem} stands beside other files")
        return receipt, {}

    def check_end(self) -> None:
        found = self._universe.store.objects.below[OUT]
        if commits.STAGING in found:
            raise self._universe.violation("staged files are left")
        if (number := sum(name.endswith(RECEIPT_SUFFIX) for name in found)) != self._universe.shards:
            raise self._universe.violation(f"{number} of {self._universe.shards} shards are there")


def _receipt(shard: Shard, fingerprint: str, attempt: int, worker: str) -> Receipt:
    return Receipt(
        shard=shard,
        fingerprint=fingerprint,
        attempt=attempt,
        counts={"success": len(shard), "rejected": 0, "failed": 0},
        files=dict.fromkeys(receipts.FILE_SUFFIXES, ENTRY),
        device={"type": "simulated"},
        timings={"worker": worker, "total": 1.0, "ended": ENDED},
        sampled=len(shard),
    )


def _parquet(rows: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": pa.repeat("a row", rows)}), buffer)
    return buffer.getvalue()


def simulate(scenario: Scenario) -> ScaledRun:
    """Simulate a run to its end.

    Raises:
        Violation: something that must hold does not.
    """
    run = ScaledRun(scenario)
    run.run()
    return run
