"""A worker in a process of its own, and what the driver knows of it."""

from dataclasses import dataclass
from typing import Any

import ray

from vcf_batch import prepare
from vcf_batch.attempts import Task
from vcf_batch.kept import KeptSamples
from vcf_batch.prepare import Job
from vcf_batch.records import Receipt


@dataclass(frozen=True)
class Sign:
    """A sign of life: where an actor is, and how far it has come."""

    node: str
    ticks: int
    """Changes whenever something is done."""
    samples_done: dict[str, int]
    """By attempt."""


class Actor:
    """What runs beside other actors on some node: a :class:`vcf_batch.worker.Worker`, once it is loaded."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: Any = None

    @ray.method(concurrency_group="signs")
    def sign(self) -> Sign:
        """Say where and how far it is, whatever else it is doing."""
        ticks, samples = (self._worker.ticks, self._worker.samples_done) if self._worker else (0, {})
        return Sign(ray.get_runtime_context().get_node_id(), ticks, samples)

    def load(self) -> None:
        """Make the worker ready."""
        prepare.check_storage(self._job)
        # Here and not at the top: the driver needs no torch.
        from vcf_batch import worker

        job = self._job
        self._worker = worker.load(
            config=job.config, fingerprint=job.fingerprint, manifest=job.manifest, models_used=job.models
        )

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
            existing=KeptSamples(self._job, task.shard, self._worker.tick),
            sampled_at_once=task.sampled_at_once,
            profiled=task.shard.index == self._job.profiled,
        )


@dataclass(eq=False)
class Worker:
    """An actor, and what it is doing: coming up, loading the model, a task, or waiting for one."""

    actor: Any
    started: float
    sign: Sign | None = None
    """Its last one; None while it waits for a machine."""
    silent: float = 0.0
    """Seconds since anything moved."""
    asked: float = 0.0
    """When it was last asked for a sign, on the monotonic clock."""
    task: Task | None = None
    attempt_id: str = ""

    @property
    def node(self) -> str:
        """Where it is; empty while it waits for a machine."""
        return self.sign.node if self.sign else ""

    @property
    def samples_done(self) -> int:
        return self.sign.samples_done.get(self.attempt_id, 0) if self.sign else 0
