"""The run on a Ray cluster: the only module of the job that knows Ray.

One short loop over ``ray.wait`` hands shards to actors and commits what comes back. Ray does placement, processes,
transfer, failure detection and autoscaling; the loop does what Ray's own restarts get wrong for shards (DESIGN.md,
invariant 4): an actor is never restarted, its task is never retried by Ray, its constructor is light and the model is
loaded by its first task, and it has one shard in flight. So an actor that waits for a machine holds no shard, and joins
when the cluster has grown.
"""

import contextlib
import logging
import os
import signal
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vcf_batch import plan, prepare, shards, storage
from vcf_batch.config import RunConfig
from vcf_batch.errors import Interrupted, StorageError, UsageError, VcfBatchError
from vcf_batch.prepare import Job
from vcf_batch.progress import Progress, duration
from vcf_batch.records import STATUSES, Receipt, Shard, Status

ATTEMPTS = 3
"""How often a shard is tried before the run gives up."""

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


def run(config: RunConfig) -> Summary:
    """Generate what is left of a run.

    Returns:
        The counts of the whole run.

    Raises:
        UsageError: an option, the manifest or a model is wrong, or the nodes do not share the output.
        RefusedError: the output holds another run.
        StorageError: the storage failed, again and again.
        VcfBatchError: a shard or the start of workers failed, again and again.
        Interrupted: Ctrl-C or SIGTERM. Rerunning resumes.
    """
    begin = time.monotonic()
    with _Signals() as signals:
        config = prepare.absolute(config)
        manifest = prepare.open_manifest(config)
        models = prepare.resolve_models(config)
        with _cluster(config.address):
            signals.install()  # once more: ray.init takes SIGTERM for itself
            config = _with_gpus(config)
            job = prepare.settle(config, manifest, models)
            prepare.claim(job)
            done, counts = _finished_shards(job)
            resumed = sum(counts.values())
            left = len(job.shards) - len(done)
            if left:
                shards.clean_staging(job.config.output)
                with prepare.storage_token(job) as job, Progress(job.manifest.num_rows, resumed) as progress:
                    _check_nodes(job)
                    _Dispatch(job, done, counts, progress).run()
                shards.clean_staging(job.config.output)
    return Summary(
        output=config.output,
        rows=job.manifest.num_rows,
        counts={status: counts[status] for status in STATUSES},
        resumed_rows=resumed,
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
        if receipt.fingerprint == job.fingerprint and receipt.shard.index < len(job.shards):
            done.add(receipt.shard.index)
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
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError:
            # The node is leaving or busy; a worker that starts there looks again before it loads anything.
            continue


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._attempt_id: str | None = None

    def load(self) -> None:
        prepare.check_storage(self._job)
        # Here and not at the top: the driver needs no torch.
        from vcf_batch import worker

        job = self._job
        self._worker = worker.load(
            config=job.config, fingerprint=job.fingerprint, manifest=job.manifest, models_used=job.models
        )

    def run(self, shard: Shard, attempt: int, attempt_id: str) -> tuple[Receipt, dict[str, str]]:
        self._attempt_id = attempt_id
        return self._worker.run(shard, attempt, attempt_id)

    @ray.method(concurrency_group="progress")
    def progress(self) -> tuple[str | None, int]:
        return self._attempt_id, self._worker.samples_done


@dataclass
class _Task:
    """One attempt at a shard."""

    shard: Shard
    attempt: int = 1
    failures: int = 0
    """Attempts that failed for a reason that may lie in the shard; losing a node is none."""
    attempt_id: str = ""
    samples_done: int = 0


@dataclass
class _Flight:
    """What one actor is doing: loading the model, or a task."""

    actor: Any
    task: _Task | None


class _Dispatch:
    """Hands shards to actors, commits what comes back, replaces what dies."""

    def __init__(self, job: Job, done: set[int], counts: Counter[Status], progress: Progress) -> None:
        self.job, self.config, self.progress = job, job.config, progress
        self.counts = counts
        self.finished_rows = sum(counts.values())
        self.left = len(job.shards) - len(done)
        self.fresh = (_Task(shard) for shard in plan.remaining(job.shards, done))
        self.again: deque[_Task] = deque()
        self.flights: dict[ray.ObjectRef, _Flight] = {}
        self.polls: dict[ray.ObjectRef, _Task] = {}
        self.job_ref = ray.put(job)
        remote: Any = ray.remote  # whose type hints leave out concurrency groups
        self.actor_class = remote(
            max_restarts=0,
            max_task_retries=0,
            num_cpus=self.config.cpus_per_worker,
            num_gpus=self.config.gpus_per_worker,
            runtime_env={"env_vars": _environment(self.config)},
            concurrency_groups={"progress": 1},
        )(_Actor)
        self.failed_starts = 0
        self.start_after = 0.0
        self.capacity, self.capacity_until = 1, 0.0
        self.ready_at = self.polled_at = time.monotonic()

    def run(self) -> None:
        """Work until every shard is committed; the counts grow with them."""
        try:
            while self.left:
                self._start_workers()
                if self.flights:
                    for ref in ray.wait([*self.flights], num_returns=1, timeout=POLL_SECONDS)[0]:
                        self._land(ref)
                else:
                    time.sleep(POLL_SECONDS / 4)
                self._show_progress()
            self._show_progress(now=True)
        finally:
            for flight in self.flights.values():
                ray.kill(flight.actor)

    def _start_workers(self) -> None:
        while len(self.flights) < min(self._wanted(), self.left) and time.monotonic() >= self.start_after:
            actor = self.actor_class.remote(self.job_ref)
            self.flights[actor.load.remote()] = _Flight(actor, None)

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
        flight = self.flights.pop(ref)
        try:
            result = ray.get(ref)
        except RayError as error:
            cause = _cause(error) if isinstance(error, RayTaskError) else error
            if isinstance(cause, UsageError):
                ray.kill(flight.actor)
                raise cause from error
            if flight.task is None:
                ray.kill(flight.actor)
                self._start_failed(cause)
                return
            self._attempt_failed(flight.task, cause)
            if isinstance(cause, StorageError):
                self._send(flight.actor)
            else:
                # After anything else (an error of the GPU, say) the process is not to be trusted with another shard.
                ray.kill(flight.actor)
            return
        if flight.task is None:
            self.failed_starts = 0
        # First the next shard, then the commit: the worker does not wait for it.
        self._send(flight.actor)
        if flight.task is not None:
            self._commit(flight.task, *result)

    def _send(self, actor: Any) -> None:
        """Give the actor its next shard, or let it go."""
        task = self.again.popleft() if self.again else next(self.fresh, None)
        if task is None:
            ray.kill(actor)
            return
        task.attempt_id = f"{task.shard.name}-{task.attempt}-{uuid.uuid4().hex[:8]}"
        self.flights[actor.run.remote(task.shard, task.attempt, task.attempt_id)] = _Flight(actor, task)

    def _commit(self, task: _Task, receipt: Receipt, staged: dict[str, str]) -> None:
        try:
            shards.commit(self.config.output, receipt, staged)
        except StorageError as error:
            self._attempt_failed(task, error)
            return
        self.left -= 1
        self.finished_rows += len(task.shard)
        self.counts.update(receipt.counts)

    def _attempt_failed(self, task: _Task, error: Exception) -> None:
        """Queue the shard again, or give up."""
        failures = task.failures + (not _node_died(error))
        shard = task.shard
        what = f"shard {shard.name} (rows {shard.start} to {shard.stop - 1})"
        if failures >= ATTEMPTS:
            kind = StorageError if isinstance(error, StorageError) else VcfBatchError
            raise kind(
                f"{what} failed {failures} times, the last time with: {_reason(error)}\n"
                "What is finished is kept: once the cause is gone, rerun the same command to go on."
            ) from error
        self.progress.note(f"{what}: attempt {task.attempt} failed and is repeated: {_reason(error)}")
        self.again.append(_Task(shard, task.attempt + 1, failures))

    def _start_failed(self, error: Exception) -> None:
        """Wait longer and longer before the next start, and give up when nothing ever starts."""
        if _node_died(error):
            return
        self.failed_starts += 1
        working = any(flight.task for flight in self.flights.values())
        if self.failed_starts >= START_ATTEMPTS and not working:
            kind = StorageError if isinstance(error, StorageError) else VcfBatchError
            raise kind(f"no worker could start, {self.failed_starts} times; the last time: {_reason(error)}") from error
        pause = min(2.0**self.failed_starts / 2, MAX_BACKOFF_SECONDS)
        self.start_after = time.monotonic() + pause
        self.progress.note(f"a worker did not start (next one in {pause:.0f} s): {_reason(error)}")

    def _show_progress(self, now: bool = False) -> None:
        ready, _ = ray.wait([*self.polls], num_returns=len(self.polls), timeout=0) if self.polls else ([], [])
        for ref in ready:
            task = self.polls.pop(ref)
            with contextlib.suppress(RayError):
                attempt_id, samples = ray.get(ref)
                if attempt_id == task.attempt_id:
                    task.samples_done = samples
        if not now and time.monotonic() - self.polled_at < POLL_SECONDS:
            return
        self.polled_at = time.monotonic()
        busy = [flight for flight in self.flights.values() if flight.task]
        asked = {id(task) for task in self.polls.values()}
        for flight in busy:
            if flight.task is not None and id(flight.task) not in asked:
                self.polls[flight.actor.progress.remote()] = flight.task
        done = self.finished_rows + sum(flight.task.samples_done for flight in busy if flight.task)
        self.progress.update(done, self.counts["failed"], len(busy))
        if busy or not self.left:
            self.ready_at = time.monotonic()
        elif time.monotonic() - self.ready_at >= WAITING_SECONDS:
            self.ready_at = time.monotonic()
            cluster = ray.cluster_resources()
            self.progress.note(
                f"no worker is ready yet; each needs {self.config.cpus_per_worker} CPUs and "
                f"{self.config.gpus_per_worker:g} GPUs, the cluster has {cluster.get('CPU', 0):g} CPUs and "
                f"{cluster.get('GPU', 0):g} GPUs"
            )


def _environment(config: RunConfig) -> dict[str, str]:
    """Environment of a worker: fixed threads, and cuBLAS workspaces that keep its sums in order."""
    return {
        "OMP_NUM_THREADS": str(config.cpus_per_worker),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _cause(error: RayTaskError) -> Exception:
    """The exception that a task raised."""
    return error.cause if isinstance(error.cause, Exception) else error


def _node_died(error: Exception) -> bool:
    """Whether a machine went away: nothing that the shard or the worker did."""
    return isinstance(error, RayError) and "node has died" in str(error).lower()


def _reason(error: Exception) -> str:
    """The error in one line; Ray's own messages run over many."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return first if isinstance(error, VcfBatchError) else f"{type(error).__name__}: {first}"
