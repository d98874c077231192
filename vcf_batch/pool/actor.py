"""A worker in a process of its own, and what the driver knows of it."""

import functools
from dataclasses import dataclass, field
from typing import Any

import ray

from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.records import Receipt, RowMask
from vcf_batch.setup import storage_check
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask

SHARDS_AT_ONCE = 2
"""Of a worker: while one is sampled, the next one's first references are read, or the last one's files staged."""


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life: where an actor is, and by attempt how far it has come."""

    node: str
    progress: dict[str, int]
    """Grows whenever anything moves."""
    samples_done: dict[str, int]


class Actor:
    """What runs beside other actors on some node: a :class:`vcf_batch.worker.worker.Worker`, once it is loaded."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: Any = None

    @ray.method(concurrency_group="signs")
    def sign(self) -> Heartbeat:
        """Say where and how far it is, whatever else it is doing."""
        progress, samples = (self._worker.progress, self._worker.samples_done) if self._worker else ({}, {})
        return Heartbeat(ray.get_runtime_context().get_node_id(), progress, samples)

    def load(self) -> None:
        """Make the worker ready."""
        storage_check.check_storage(self._job)
        # Here and not at the top: the driver needs no torch.
        from vcf_batch.worker import worker

        self._worker = worker.load(self._job)

    @ray.method(concurrency_group="shards")
    def run(self, task: ShardTask, attempt_id: str, redo: RowMask | None) -> tuple[Receipt, dict[str, str]] | None:
        """Do a task; the receipt and the staged files, unless it is a trial.

        Args:
            task: what to do.
            attempt_id: names the staged files.
            redo: see :class:`vcf_batch.output.kept_samples.KeptSamples`.
        """
        note_progress = functools.partial(self._worker.note_progress, attempt_id)
        kept = KeptSamples(self._job.config, self._job.manifest, task.shard, redo, note_progress)
        return self._worker.run(task, attempt_id, kept)


@dataclass(eq=False)
class WorkerHandle:
    """An actor, and what it is asked: where it is, then to load the model, then one task after the other."""

    actor: Any
    started: float
    sign: Heartbeat | None = None
    """Its last one; None while it waits for a machine."""
    asked: float = 0.0
    """When it was last asked for a sign, on the monotonic clock."""
    flights: list["Request"] = field(default_factory=list)
    """What it has not answered yet."""

    @property
    def node(self) -> str:
        """Where it is; empty while it waits for a machine."""
        return self.sign.node if self.sign else ""

    @property
    def is_busy(self) -> bool:
        """Whether it has a task."""
        return any(flight.task for flight in self.flights)

    @property
    def samples_done(self) -> int:
        """Samples of unfinished shards."""
        return sum(self.sign.samples_done.get(flight.attempt_id, 0) for flight in self.flights) if self.sign else 0

    def signed(self, sign: Heartbeat) -> None:
        """Take a sign of life."""
        self.sign = sign
        for flight in self.flights:
            progress = sign.progress.get(flight.attempt_id, 0)
            if progress != flight.progress:
                flight.progress, flight.silent = progress, 0.0


@dataclass(eq=False)
class Request:
    """What a worker has been asked."""

    worker: WorkerHandle
    ref: ray.ObjectRef
    """What will answer it."""
    task: ShardTask | None = None
    """None until it has loaded."""
    attempt_id: str = ""
    """Of the task."""
    progress: int = 0
    """As of the last sign of life."""
    silent: float = 0.0
    """Seconds since anything moved."""
