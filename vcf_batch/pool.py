"""The run on a Ray cluster: the only module of the job that knows Ray.

One short loop over ``ray.wait`` hands shards to actors and commits what comes back. Ray does placement, processes,
transfer, failure detection and autoscaling; the loop does what Ray's own restarts get wrong for shards: an actor is
never restarted, its task is never retried by Ray, its constructor is light and the model is loaded by its first task,
and it has one shard in flight. So an actor that waits for a machine holds no shard, and joins when the cluster has
grown.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vcf_batch import lease, plan, prepare, run_file, shards, storage
from vcf_batch.config import RunConfig
from vcf_batch.errors import Interrupted, StorageError, UsageError, VcfBatchError, printable
from vcf_batch.kept import KeptSamples
from vcf_batch.lease import Lease
from vcf_batch.prepare import Job
from vcf_batch.progress import Progress, duration
from vcf_batch.records import STATUSES, Receipt, Shard, Status
from vcf_batch.shard_queue import ShardQueue, Task

MAX_SET_ASIDE = 16
"""How many shards in a row may fail for good, while none is committed, before the run gives up on the others."""

START_ATTEMPTS = 5
"""How many workers in a row may fail to start, while none works, before the run gives up."""

MAX_BACKOFF_SECONDS = 30.0
POLL_SECONDS = 1.0
"""Between two looks at the workers' progress."""

CAPACITY_SECONDS = 10.0
"""Between two looks at how many workers the cluster has room for."""

WAITING_SECONDS = 30.0
"""How long no worker may be ready before the user is told what the run waits for."""

NODE_CHECK_SECONDS = 60.0

REASON_LENGTH = 300
"""Characters of an error that is not this package's own."""


Again = Callable[[], Mapping[int, bytes]]
"""Tells what of an output is generated again: see :attr:`vcf_batch.prepare.Job.again`."""


@dataclass(frozen=True)
class Summary:
    """What became of a run's rows, those of earlier attempts at the run included."""

    output: str
    rows: int
    counts: dict[Status, int]
    resumed_rows: int
    """Rows that were finished before."""
    seconds: float

    @property
    def failed_fraction(self) -> float:
        """Share of the rows that failed, 0 to 1."""
        return self.counts["failed"] / self.rows

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[status]:,} {status}" for status in STATUSES)
        new = self.rows - self.resumed_rows
        rate = f", {new / self.seconds:.2f} samples a second" if new and self.seconds else ""
        resumed = f" ({self.resumed_rows:,} of them were there before)" if self.resumed_rows else ""
        return f"{storage.redact(self.output)}: {self.rows:,} rows{resumed}: {counts}; {duration(self.seconds)}{rate}"


def run(config: RunConfig, again: Again = dict) -> Summary:
    """Generate what is left of a run.

    Args:
        config: what to generate, and where.
        again: asked once this run owns the output.

    Returns:
        The counts of the whole run.

    Raises:
        UsageError: an option, the manifest or a model is wrong, or the nodes do not share the output.
        RefusedError: the output holds another run, or another driver is at work there.
        StorageError: the storage failed, again and again; shards that do not need it are finished.
        VcfBatchError: some shards, or the start of workers, failed again and again; the other shards are finished.
        Interrupted: Ctrl-C or SIGTERM. Rerunning resumes.
    """
    begin = time.monotonic()
    with _Signals() as signals:
        config = prepare.absolute(config)
        found = run_file.read(config.output)
        config = prepare.resume(config, found)
        manifest = prepare.open_manifest(config, found)
        models = prepare.resolve_models(config)
        with _cluster(config.address):
            signals.install()  # once more: ray.init takes SIGTERM for itself
            config = _with_gpus(config)
            job = prepare.settle(config, manifest, models)
            with lease.hold(job.config.output) as held:
                prepare.claim(job)
                job = dataclasses.replace(job, again=again())
                done, counts = _finished_shards(job)
                resumed = sum(counts.values())
                kept = sum(again.count(False) for again in job.again.values())
                if len(done) < len(job.shards):
                    job = dataclasses.replace(job, token=held.token)
                    shards.clean_staging(job.config.output)
                    with Progress(job.manifest.num_rows, resumed) as progress:
                        _check_nodes(job)
                        _Dispatch(job, held, done, counts, progress).run()
                    held.confirm()
                    shards.clean_staging(job.config.output)
    return Summary(
        output=config.output,
        rows=job.manifest.num_rows,
        counts={status: counts[status] for status in STATUSES},
        resumed_rows=resumed + kept,
        seconds=time.monotonic() - begin,
    )


class _Signals:
    """Turns SIGINT and SIGTERM into :class:`Interrupted`, raised when the block is left.

    Inside the block they arrive as KeyboardInterrupt, the only exception that Ray's blocking calls let through.
    """

    def __init__(self) -> None:
        self._received = signal.SIGINT
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        self.install()
        return self

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self._receive)
                self._before.setdefault(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            raise Interrupted(self._received) from None


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray: to ``address``, else to the cluster this process runs in, else to a new local one."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot use the Ray cluster {address or '(RAY_ADDRESS or a new local one)'}: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _with_gpus(config: RunConfig) -> RunConfig:
    """Settle what a worker computes on, by what the cluster has."""
    if config.gpus_per_worker is not None:
        return config
    return config.replace(gpus_per_worker=1.0 if ray.cluster_resources().get("GPU") else 0.0)


def _finished_shards(job: Job) -> tuple[set[int], Counter[Status]]:
    """Indices of the shards that exist, and the sum of their counts."""
    done: set[int] = set()
    counts: Counter[Status] = Counter()
    for receipt in shards.iter_receipts(job.config.output):
        index = receipt.shard.index
        if receipt.fingerprint == job.fingerprint and index < len(job.shards) and index not in job.again:
            done.add(index)
            counts.update(receipt.counts)
    return done, counts


def _room(node: dict[str, Any], config: RunConfig) -> int:
    """How many workers fit on a node."""
    resources = node["Resources"] if node["Alive"] else {}
    fits = resources.get("CPU", 0) / config.cpus_per_worker
    if config.gpus_per_worker:
        fits = min(fits, resources.get("GPU", 0) / config.gpus_per_worker)
    return int(fits)


def _check_nodes(job: Job) -> None:
    """Let every node that can hold a worker prove that it sees the run's storage.

    Raises:
        UsageError: a node does not.
    """
    look = ray.remote(num_cpus=0, max_retries=0)(prepare.check_storage)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(job)
        for node in ray.nodes()
        if _room(node, job.config)
    ]
    for answer in asked:
        try:
            ray.get(answer, timeout=NODE_CHECK_SECONDS)
        except RayError as error:
            # Anything else (the node is leaving, or busy) may pass: a worker that starts there looks again.
            if isinstance(cause := _cause(error), UsageError):
                raise cause from error


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._attempt_id: str | None = None

    def load(self) -> str:
        """Make the worker ready; the node it is on."""
        prepare.check_storage(self._job)
        # Here and not at the top: the driver needs no torch.
        from vcf_batch import worker

        job = self._job
        self._worker = worker.load(
            config=job.config, fingerprint=job.fingerprint, manifest=job.manifest, models_used=job.models
        )
        return ray.get_runtime_context().get_node_id()

    def run(self, shard: Shard, attempt: int, attempt_id: str, last_attempt: bool) -> tuple[Receipt, dict[str, str]]:
        self._attempt_id = attempt_id
        return self._worker.run(shard, attempt, attempt_id, last_attempt, existing=KeptSamples(self._job, shard))

    @ray.method(concurrency_group="progress")
    def progress(self) -> tuple[str | None, int]:
        return self._attempt_id, self._worker.samples_done


@dataclass
class _Worker:
    """An actor, and what it is doing: loading the model, a task, or waiting for one."""

    actor: Any
    started: float
    node: str = ""
    """Once it has loaded."""
    task: Task | None = None
    attempt_id: str = ""
    samples_done: int = 0


class _Dispatch:
    """Hands shards to actors, commits what comes back, replaces what dies."""

    def __init__(self, job: Job, held: Lease, done: set[int], counts: Counter[Status], progress: Progress) -> None:
        self.job, self.config, self.lease, self.progress = job, job.config, held, progress
        self.counts = counts
        self.finished_rows = sum(counts.values())
        self.left = len(job.shards) - len(done)
        self.queue = ShardQueue(plan.remaining(job.shards, done))
        self.set_aside: list[tuple[Task, Exception]] = []
        self.set_aside_in_a_row = 0
        self.flights: dict[ray.ObjectRef, _Worker] = {}
        self.idle: list[_Worker] = []
        self.polls: dict[ray.ObjectRef, _Worker] = {}
        self.job_ref = ray.put(job)
        remote: Any = ray.remote  # whose type hints leave out concurrency groups
        self.actor_class = remote(
            max_restarts=0,
            max_task_retries=0,
            num_cpus=self.config.cpus_per_worker,
            num_gpus=self.config.gpus_per_worker,
            runtime_env={"env_vars": prepare.environment(self.config)},
            concurrency_groups={"progress": 1},
        )(_Actor)
        self.loaded = False
        self.failed_starts = 0
        self.failed_at = self.start_after = 0.0
        self.capacity, self.capacity_until = 1, 0.0
        self.ready_at = self.polled_at = time.monotonic()

    def run(self) -> None:
        """Work until every shard is committed or set aside; the counts grow with them."""
        try:
            while self.left:
                if self.lease.lost:
                    raise self.lease.lost
                self._start_workers()
                for worker in [*self.idle]:
                    self.idle.remove(worker)
                    self._send(worker)
                if self.flights:
                    for ref in ray.wait([*self.flights], num_returns=1, timeout=POLL_SECONDS)[0]:
                        self._land(ref)
                else:
                    time.sleep(POLL_SECONDS / 4)
                self._show_progress()
            self._show_progress(now=True)
        finally:
            for worker in [*self.flights.values(), *self.idle]:
                ray.kill(worker.actor)
        if self.set_aside:
            raise self._incomplete()

    def _start_workers(self) -> None:
        while (
            len(self.flights) + len(self.idle) < min(self._wanted(), self.left) and time.monotonic() >= self.start_after
        ):
            actor = self.actor_class.remote(self.job_ref)
            self.flights[actor.load.remote()] = _Worker(actor, time.monotonic())

    def _wanted(self) -> int:
        """Workers at most: as asked, else what the cluster has room for now."""
        if self.config.num_workers is not None:
            return self.config.num_workers
        if time.monotonic() >= self.capacity_until:
            self.capacity = max(sum(_room(node, self.config) for node in ray.nodes()), 1)
            self.capacity_until = time.monotonic() + CAPACITY_SECONDS
        return self.capacity

    def _land(self, ref: ray.ObjectRef) -> None:
        """An actor has answered, or died."""
        worker = self.flights.pop(ref)
        try:
            result = ray.get(ref)
        except RayError as error:
            self._failed(worker, _cause(error))
            return
        task = worker.task
        if task is None:
            self.loaded, self.failed_starts, worker.node = True, 0, result
        # First the next shard, then the commit: the worker does not wait for it.
        self._send(worker)
        if task is not None:
            self._commit(task, worker.node, *result)

    def _failed(self, worker: _Worker, error: Exception) -> None:
        """A start or a task has failed."""
        task = worker.task
        # Where a worker has loaded, the run's settings are sound: what another one misses is its node's.
        if isinstance(error, UsageError) and not (task is None and self.loaded):
            ray.kill(worker.actor)
            raise error
        if task is None:
            ray.kill(worker.actor)
            self._start_failed(worker, error)
            return
        self._attempt_failed(task, worker.node, error)
        if isinstance(error, StorageError):
            self._send(worker)
        else:
            # After anything else (an error of the GPU, say) the process is not to be trusted with another shard.
            ray.kill(worker.actor)

    def _send(self, worker: _Worker) -> None:
        """Give the worker its next shard; let it wait while failed ones do; else let it go."""
        nodes = {other.node for other in [worker, *self.idle, *self.flights.values()] if other.node}
        task = worker.task = self.queue.take(worker.node, nodes)
        if task is not None:
            worker.attempt_id, worker.samples_done = task.new_id(), 0
            ref = worker.actor.run.remote(task.shard, task.attempt, worker.attempt_id, task.is_last)
            self.flights[ref] = worker
        elif self.queue.is_waiting:
            self.idle.append(worker)
        else:
            ray.kill(worker.actor)

    def _commit(self, task: Task, node: str, receipt: Receipt, staged: dict[str, str]) -> None:
        try:
            self.lease.confirm()
            shards.commit(self.config.output, receipt, staged)
        except StorageError as error:
            self._attempt_failed(task, node, error)
            return
        self.left -= 1
        self.set_aside_in_a_row = 0
        self.finished_rows += len(task.shard)
        self.counts.update(receipt.counts)

    def _attempt_failed(self, task: Task, node: str, error: Exception) -> None:
        """Queue the shard again, or set it aside."""
        what = f"shard {task.title}: attempt {task.attempt} failed and"
        if _node_died(error):
            self.queue.repeat(task)
        elif not self.queue.failed(task, node):
            self.progress.note(f"{what} the shard is set aside: {_reason(error)}")
            self.left -= 1
            self.set_aside.append((task, error))
            self.set_aside_in_a_row += 1
            if self.set_aside_in_a_row == MAX_SET_ASIDE:
                raise self._incomplete()
            return
        self.progress.note(f"{what} is repeated: {_reason(error)}")

    def _incomplete(self) -> VcfBatchError:
        """What to raise where shards were set aside."""
        error = self.set_aside[-1][1]
        kind = StorageError if isinstance(error, StorageError) else VcfBatchError
        failed = kind(
            f"{len(self.set_aside)} of {len(self.job.shards)} shards failed again and again: "
            f"{', '.join(task.title for task, _ in self.set_aside)}. The last reason: {_reason(error)}\n"
            "What is finished is kept: once the cause is gone, rerun the same command to go on."
        )
        failed.__cause__ = error
        return failed

    def _start_failed(self, worker: _Worker, error: Exception) -> None:
        """Wait longer and longer before the next start, and give up when nothing ever starts."""
        # Of workers that were started together, only the first failure counts.
        if _node_died(error) or worker.started <= self.failed_at:
            return
        self.failed_at = time.monotonic()
        self.failed_starts += 1
        working = self.idle or any(other.task for other in self.flights.values())
        if self.failed_starts >= START_ATTEMPTS and not working:
            kind = StorageError if isinstance(error, StorageError) else VcfBatchError
            raise kind(f"no worker could start, {self.failed_starts} times; the last time: {_reason(error)}") from error
        pause = min(2.0**self.failed_starts / 2, MAX_BACKOFF_SECONDS)
        self.start_after = time.monotonic() + pause
        self.progress.note(f"a worker did not start (next one in {pause:.0f} s): {_reason(error)}")

    def _show_progress(self, now: bool = False) -> None:
        answered, _ = ray.wait([*self.polls], num_returns=len(self.polls), timeout=0) if self.polls else ([], [])
        for ref in answered:
            worker = self.polls.pop(ref)
            with contextlib.suppress(RayError):
                attempt_id, samples = ray.get(ref)
                if attempt_id == worker.attempt_id:
                    worker.samples_done = samples
        if not now and time.monotonic() - self.polled_at < POLL_SECONDS:
            return
        self.polled_at = time.monotonic()
        busy = [worker for worker in self.flights.values() if worker.task]
        asked = {id(worker) for worker in self.polls.values()}
        for worker in busy:
            if id(worker) not in asked:
                self.polls[worker.actor.progress.remote()] = worker
        done = self.finished_rows + sum(worker.samples_done for worker in busy)
        ready = len(busy) + len(self.idle)
        self.progress.update(done, self.counts["failed"], ready)
        if ready or not self.left:
            self.ready_at = time.monotonic()
        elif time.monotonic() - self.ready_at >= WAITING_SECONDS:
            self.ready_at = time.monotonic()
            cluster = ray.cluster_resources()
            self.progress.note(
                f"no worker is ready yet; each needs {self.config.cpus_per_worker} CPUs and "
                f"{self.config.gpus_per_worker:g} GPUs, the cluster has {cluster.get('CPU', 0):g} CPUs and "
                f"{cluster.get('GPU', 0):g} GPUs"
            )


def _cause(error: RayError) -> Exception:
    """The exception that a task raised; the error itself where there is none."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Exception) else error


def _node_died(error: Exception) -> bool:
    """Whether a machine went away: nothing that the shard or the worker did."""
    if isinstance(error, ActorUnavailableError) or (isinstance(error, RayActorError) and error.preempted):
        return True
    return isinstance(error, RayError) and "node has died" in str(error).lower()


def _reason(error: Exception) -> str:
    """The error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if isinstance(error, VcfBatchError):
        return lines[0]
    if isinstance(error, RayTaskError):  # a traceback, which ends with the exception
        text = lines[-1]
    elif isinstance(error, RayActorError):  # a headline, names of Ray's own, then where it ran and what happened
        told = [line for line in lines[1:] if not line.startswith(("class_name:", "actor_id:", "name:", "namespace:"))]
        text = ", ".join(told or lines)
    else:
        text = lines[0]
    text = printable(f"{type(error).__name__}: {text}")
    return text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + "..."
