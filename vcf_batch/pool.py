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
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.util.metrics
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vcf_batch import commits, lease, log, prepare, run_file
from vcf_batch.attempts import Failure, Task
from vcf_batch.config import MAX_BATCH_SIZE, RunConfig
from vcf_batch.errors import OutOfDeviceMemory, StorageError, UsageError, VcfBatchError, printable
from vcf_batch.exporter import Exporter
from vcf_batch.kept import KeptSamples
from vcf_batch.lease import Lease
from vcf_batch.ledger import Ledger, Summary
from vcf_batch.manifest import Manifest
from vcf_batch.prepare import Job, Models
from vcf_batch.progress import Progress
from vcf_batch.quarantine import FAILURES, Quarantine
from vcf_batch.records import Receipt
from vcf_batch.shard_queue import ShardQueue
from vcf_batch.signals import Signals
from vcf_batch.starts import Starts

POLL_SECONDS = 1.0
"""Between two looks at the workers' progress."""

LOAD_SECONDS = 3600.0
"""How long a worker may load; fetching a model takes its time and shows no progress."""

CAPACITY_SECONDS = 10.0
"""Between two looks at how many workers the cluster has room for."""

WAITING_SECONDS = 30.0
"""How long no worker may be ready before the user is told what the run waits for."""

NODE_CHECK_SECONDS = 60.0

_log = logging.getLogger(__name__)

REASON_LENGTH = 300
"""Characters of an error that is not this package's own."""


Again = Callable[[], Mapping[int, bytes]]
"""Tells what of an output is generated again: see :attr:`vcf_batch.prepare.Job.again`."""


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
    log.configure(config.log_format)
    with Signals() as signals:
        config = prepare.absolute(config)
        found = run_file.read(config.output)
        config = prepare.resume(config, found)
        manifest = prepare.open_manifest(config, found)
        models = prepare.resolve_models(config)
        with cluster(config.address):
            signals.install()  # once more: ray.init takes SIGTERM for itself
            config = _with_gpus(config)
            config = _with_batch_size(config, manifest, models)
            job = prepare.settle(config, manifest, models)
            with lease.hold(job.config.output) as held:
                job = dataclasses.replace(job, token=held.token, extends=prepare.claim(job))
                held.confirm()
                # Before anything is read: from here on, no earlier owner can change what there is.
                commits.clean(job.config.output)
                job = dataclasses.replace(job, again=again())
                ledger = Ledger(job)
                if ledger.left:
                    if config.profile:
                        job = dataclasses.replace(job, profiled=next(ledger.remaining()).index)
                    bar = None if config.log_format == "json" else sys.stderr
                    with Progress(job.manifest.num_rows, ledger.finished_rows, bar) as progress:
                        _check_nodes(job)
                        _Dispatch(job, held, ledger, progress).run()
                    held.confirm()
                    commits.clean(job.config.output)
    return ledger.summary(time.monotonic() - begin)


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
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


def _with_batch_size(config: RunConfig, manifest: Manifest, models: Models) -> RunConfig:
    """Settle how many images are sampled at once, by measuring it on a worker.

    Raises:
        VcfBatchError: no worker could measure it.
    """
    if config.batch_size is not None:
        return config
    job = prepare.settle(config.replace(batch_size=1), manifest, models)
    limit = min(manifest.num_rows, config.shard_size or manifest.num_rows, MAX_BATCH_SIZE)
    _log.warning("Looking for the fastest batch size on a first worker.")
    measure = ray.remote(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or 0,
        max_retries=0,
        runtime_env={"env_vars": prepare.environment(config)},
    )(_fastest_batch_size)
    try:
        size = ray.get(measure.remote(job, limit))
    except RayError as error:
        why = _cause(error)
        if isinstance(why, VcfBatchError):
            raise why from error
        raise VcfBatchError(f"no batch size could be found ({_reason(why)}); name one with --batch-size") from error
    _log.warning("The batch size is %d from here on.", size)
    return config.replace(batch_size=size)


def _fastest_batch_size(job: Job, limit: int) -> int:
    """See :func:`vcf_batch.calibration.fastest_batch_size`; runs where a worker does."""
    from vcf_batch import calibration, worker

    loaded = worker.load(config=job.config, fingerprint=job.fingerprint, manifest=job.manifest, models_used=job.models)
    return calibration.fastest_batch_size(loaded.tools, job.manifest, limit)


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


class _Hang(Exception):
    """A worker makes no progress."""


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: Any = None

    def load(self) -> "_Progress":
        """Make the worker ready."""
        prepare.check_storage(self._job)
        # Here and not at the top: the driver needs no torch.
        from vcf_batch import worker

        job = self._job
        self._worker = worker.load(
            config=job.config, fingerprint=job.fingerprint, manifest=job.manifest, models_used=job.models
        )
        return self._seen()

    def run(self, task: Task, attempt_id: str) -> tuple[Receipt, dict[str, str]] | None:
        """Do a task; the receipt and the staged files, unless it is a trial."""
        if task.selected is not None:
            self._worker.trial(task.shard, task.selected, task.sampled_at_once)
            return None
        return self._worker.run(
            task.shard,
            task.attempt,
            attempt_id,
            last_attempt=task.last_attempt,
            verdicts=task.verdicts,
            existing=KeptSamples(self._job, task.shard),
            sampled_at_once=task.sampled_at_once,
            profiled=task.shard.index == self._job.profiled,
        )

    @ray.method(concurrency_group="progress")
    def progress(self) -> "_Progress":
        return self._seen()

    def _seen(self) -> "_Progress":
        ticks, samples = (self._worker.ticks, self._worker.samples_done) if self._worker else (0, {})
        return _Progress(ray.get_runtime_context().get_node_id(), ticks, samples)


@dataclass(frozen=True)
class _Progress:
    """How far an actor is."""

    node: str
    ticks: int
    """Changes whenever something is done."""
    samples_done: dict[str, int]
    """By attempt."""


@dataclass
class _Worker:
    """An actor, and what it is doing: loading the model, a task, or waiting for one."""

    actor: Any
    started: float
    seen: _Progress | None = None
    """The last that it said; None while it waits for a machine."""
    silent: float = 0.0
    """Seconds since anything moved."""
    task: Task | None = None
    attempt_id: str = ""

    @property
    def node(self) -> str:
        """Where it is; empty as long as it has not said so."""
        return self.seen.node if self.seen else ""

    @property
    def samples_done(self) -> int:
        return self.seen.samples_done.get(self.attempt_id, 0) if self.seen else 0


class _Dispatch:
    """Hands shards to actors, commits what comes back, replaces what dies."""

    def __init__(self, job: Job, held: Lease, ledger: Ledger, progress: Progress) -> None:
        self.config, self.lease, self.ledger, self.progress = job.config, held, ledger, progress
        smaller = self.config.batch_size if self.config.allow_smaller_batches else None
        self.queue = ShardQueue(ledger.remaining(), ledger.rows_of, smaller)
        self.exporter = Exporter(ray.util.metrics, self.config.output, job.manifest.num_rows)
        self.quarantine = Quarantine()
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
        self.starts = Starts()
        self.capacity, self.capacity_until = 1, 0.0
        self.ready_at = self.polled_at = time.monotonic()

    def run(self) -> None:
        """Work until every shard is committed or set aside."""
        try:
            while self.ledger.left:
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
                self._poll()
            self._show_progress()
        finally:
            for worker in self._workers():
                ray.kill(worker.actor)
        self.ledger.raise_if_incomplete()

    def _workers(self) -> list[_Worker]:
        return [*self.flights.values(), *self.idle]

    # Workers come and go

    def _start_workers(self) -> None:
        while len(self._workers()) < min(self._wanted(), self.ledger.left) and self.starts.may_begin:
            left_out = ",".join(self.quarantine.nodes)
            options = {"label_selector": {"ray.io/node-id": f"!in({left_out})"}} if left_out else {}
            actor = self.actor_class.options(**options).remote(self.job_ref)
            self.flights[actor.load.remote()] = _Worker(actor, time.monotonic())

    def _wanted(self) -> int:
        """Workers at most: as asked, else what the cluster has room for now."""
        if time.monotonic() >= self.capacity_until:
            room = {node["NodeID"]: _room(node, self.config) for node in ray.nodes()}
            if self.quarantine.nodes and any(room.values()) and not self._room_left(room):
                self.progress.note("no other node is left: the nodes that failed are used again", "nodes_used_again")
                self.quarantine.lift()
            self.capacity = max(self._room_left(room), 1)
            self.capacity_until = time.monotonic() + CAPACITY_SECONDS
        return self.config.num_workers or self.capacity

    def _room_left(self, room: dict[str, int]) -> int:
        return sum(workers for node, workers in room.items() if node not in self.quarantine.nodes)

    def _send(self, worker: _Worker) -> None:
        """Give the worker its next shard; let it wait while failed ones do; else let it go."""
        nodes = {other.node for other in [worker, *self._workers()] if other.node}
        task = worker.task = self.queue.take(worker.node, nodes)
        if task is not None:
            worker.attempt_id, worker.silent = task.new_id(), 0.0
            self.flights[worker.actor.run.remote(task, worker.attempt_id)] = worker
        elif self.queue.is_waiting:
            self.idle.append(worker)
        else:
            ray.kill(worker.actor)

    def _leave_out(self, nodes: set[str]) -> None:
        """Use some nodes no more. What failed there is nobody's fault."""
        if not nodes:
            return
        for node in nodes:
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
        for ref, worker in [*self.flights.items()]:
            if worker.node in nodes:
                self._let_go(ref)
        for worker in [*self.idle]:
            if worker.node in nodes:
                self.idle.remove(worker)
                ray.kill(worker.actor)

    def _let_go(self, ref: ray.ObjectRef) -> None:
        """End a worker that is not to blame for anything."""
        worker = self.flights.pop(ref)
        ray.kill(worker.actor)
        if worker.task is not None:
            self.queue.repeat(worker.task)

    # What workers answer

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
            self.loaded, worker.seen = True, result
            self.starts.reset()
        elif task.selected is not None:
            self.queue.done(task)
        # First the next shard, then the commit: the worker does not wait for it.
        self._send(worker)
        self._leave_out(self.quarantine.succeeded(worker.node, "shard" if task else "load"))
        if task is not None and task.selected is None:
            self._commit(task, worker.node, *result)

    def _failed(self, worker: _Worker, error: Exception) -> None:
        """A start or a task has failed."""
        task = worker.task
        # Where a worker has loaded, the run's settings are sound: what another one misses is its node's.
        if isinstance(error, UsageError) and not (task is None and self.loaded):
            ray.kill(worker.actor)
            raise error
        # After anything but trouble of the storage (an error of the GPU, say) the process is not to be trusted.
        if task is None or not isinstance(error, StorageError):
            ray.kill(worker.actor)
        if task is None:
            self._start_failed(worker, error)
        else:
            self._attempt_failed(task, worker.node, error)
            if isinstance(error, StorageError):
                self._send(worker)
        # On trial a worker may fail: that is what the trial is for.
        if worker.node and not _node_died(error) and (task is None or task.selected is None):
            self._leave_out(self.quarantine.failed(worker.node, task.shard if task else None, _reason(error)))

    def _commit(self, task: Task, node: str, receipt: Receipt, staged: dict[str, str]) -> None:
        if task.verdicts and not (receipt.counts["success"] or self.ledger.counts["success"]):
            self.queue.done(task)
            doubt = "rows seem to kill their workers, but nothing that was generated shows that these are healthy"
            self._set_aside(task, VcfBatchError(f"{len(task.verdicts)} {doubt}"))
            return
        try:
            self.lease.confirm()
            commits.commit(self.config.output, self.ledger.whole(receipt), staged)
        except StorageError as error:
            self._attempt_failed(task, node, error)
            return
        self.queue.done(task)
        self.ledger.committed(task, receipt)
        self.exporter.committed(receipt)
        where = {"shard": task.shard.name, "worker": receipt.timings["worker"], "node": node}
        self.progress.note(
            f"shard {task.title} is finished",
            "shard_finished",
            logging.DEBUG,
            **where,
            rows=len(task.shard),
            seconds=receipt.timings["total"],
        )
        for row, message in task.verdicts.items():
            self.progress.note(
                f"row {row} is recorded as failed: {message}", "row_failed", logging.WARNING, shard=task.shard.name
            )

    def _attempt_failed(self, task: Task, node: str, error: Exception) -> None:
        """Queue the shard again, or set it aside."""
        if _node_died(error):
            self.queue.repeat(task)
        elif not self.queue.failed(task, node, _failure(error), _symptom(error)):
            self._set_aside(task, error)
            return
        self.progress.note(
            f"shard {task.title}: attempt {task.attempt} failed and is repeated: {_reason(error)}",
            "attempt_failed",
            logging.WARNING,
            shard=task.shard.name,
            node=node,
        )

    def _set_aside(self, task: Task, error: Exception) -> None:
        """Go on without the shard."""
        why = _reason(error)
        self.progress.note(
            f"shard {task.title}: attempt {task.attempt} failed and the shard is set aside: {why}",
            "shard_set_aside",
            logging.ERROR,
            shard=task.shard.name,
        )
        self.ledger.set_aside(task, error, why)

    def _start_failed(self, worker: _Worker, error: Exception) -> None:
        """Wait before the next start, and give up when nothing ever starts."""
        if _node_died(error) or (pause := self.starts.failed(worker.started)) is None:
            return
        failing = {*self.quarantine.failing, worker.node}
        hope = any(other.task or other.node not in failing for other in self._workers() if other.node)
        if self.starts.used_up and not hope:
            kind = StorageError if isinstance(error, StorageError) else VcfBatchError
            raise kind(
                f"no worker could start, {self.starts.failures} times; the last time: {_reason(error)}"
            ) from error
        self.progress.note(
            f"a worker did not start (next one in {pause:.0f} s): {_reason(error)}",
            "worker_did_not_start",
            logging.WARNING,
            node=worker.node,
        )

    # What goes on

    def _poll(self) -> None:
        """Ask the workers how far they are, and end those that hang: Ray does not notice them."""
        answered, _ = ray.wait([*self.polls], num_returns=len(self.polls), timeout=0) if self.polls else ([], [])
        for ref in answered:
            worker = self.polls.pop(ref)
            with contextlib.suppress(RayError):
                seen = ray.get(ref)
                if seen != worker.seen:
                    worker.seen, worker.silent = seen, 0.0
        now = time.monotonic()
        if now - self.polled_at < POLL_SECONDS:
            return
        # Were this process itself stopped for an hour, no worker would have been silent for that.
        elapsed, self.polled_at = min(now - self.polled_at, 5 * POLL_SECONDS), now
        asked = {id(worker) for worker in self.polls.values()}
        for ref, worker in [*self.flights.items()]:
            if worker.node in self.quarantine.nodes:
                self._let_go(ref)
                continue
            if id(worker) not in asked:
                self.polls[worker.actor.progress.remote()] = worker
            worker.silent += elapsed if worker.seen else 0.0
            limit = LOAD_SECONDS if worker.task is None else self.config.shard_timeout
            if limit is not None and worker.silent > limit and not ray.wait([ref], timeout=0)[0]:
                del self.flights[ref]
                self._failed(worker, _Hang(f"no progress in {limit:g} s"))
        self._show_progress()

    def _show_progress(self) -> None:
        busy = [worker for worker in self.flights.values() if worker.task]
        done = self.ledger.finished_rows + sum(worker.samples_done for worker in busy)
        ready = len(busy) + len(self.idle)
        self.progress.update(done, self.ledger.counts["failed"], ready, self.ledger.totals.means)
        self.exporter.now(done, ready)
        if ready or not self.ledger.left:
            self.ready_at = time.monotonic()
        elif time.monotonic() - self.ready_at >= WAITING_SECONDS:
            self.ready_at = time.monotonic()
            cluster = ray.cluster_resources()
            self.progress.note(
                f"no worker is ready yet; each needs {self.config.cpus_per_worker} CPUs and "
                f"{self.config.gpus_per_worker:g} GPUs, the cluster has {cluster.get('CPU', 0):g} CPUs and "
                f"{cluster.get('GPU', 0):g} GPUs",
                "no_worker_ready",
                logging.WARNING,
            )


def _cause(error: RayError) -> Exception:
    """The exception that a task raised; the error itself where there is none."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Exception) else error


def _failure(error: Exception) -> Failure:
    """Whether a row may be to blame for the error of a worker."""
    if isinstance(error, OutOfDeviceMemory):
        return Failure.MEMORY
    # Of what Ray itself reports, only the death of a process may come from what it did.
    trouble = isinstance(error, (VcfBatchError, OSError)) or (
        isinstance(error, RayError) and not isinstance(error, (RayTaskError, RayActorError, OutOfMemoryError))
    )
    return Failure.TROUBLE if trouble else Failure.CRASH


def _symptom(error: Exception) -> str:
    """What a worker suffers from, without names of processes and machines: it may become a row's error message."""
    if isinstance(error, _Hang):
        return "the worker that generates this row makes no progress (--shard-timeout)"
    if isinstance(error, OutOfDeviceMemory):
        return "the GPU's memory does not hold this row, even alone"
    if isinstance(error, OutOfMemoryError):
        return "the worker that generates this row needs more memory than its node has"
    if isinstance(error, RayActorError):
        return "the process of the worker that generates this row dies"
    return f"the worker that generates this row fails with {_reason(error)}"


def _node_died(error: Exception) -> bool:
    """Whether a machine went away: nothing that the shard or the worker did."""
    if isinstance(error, ActorUnavailableError) or (isinstance(error, RayActorError) and error.preempted):
        return True
    return isinstance(error, RayError) and "node has died" in str(error).lower()


def _reason(error: Exception) -> str:
    """The error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if isinstance(error, (VcfBatchError, _Hang)):
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
