"""A cluster as the driver sees it (:class:`vcf_batch.driver.cluster.Cluster`), on Ray."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from vcf_batch.driver.cluster import Answer, Request, WorkerHandle
from vcf_batch.driver.loop import SHARDS_AT_ONCE
from vcf_batch.pool import nodes
from vcf_batch.pool.actor import Actor
from vcf_batch.pool.ray_errors import address, fault_of
from vcf_batch.setup.job import Job

if TYPE_CHECKING:
    from vcf_batch.worker.scoring.job import ScoreJob


class RayCluster:
    """The Ray cluster that this process is connected to, and its actors.

    No actor gets a shard before all nodes are known to see the run's storage: then :meth:`send` raises UsageError.

    Args:
        job: the run that actors work on.
        check: called before each wait; raises to end the run.
        actor: what the actors are; None is those that generate.
    """

    def __init__(
        self, job: "Job | ScoreJob", check: Callable[[], None] = lambda: None, actor: type[Actor] | None = None
    ) -> None:
        self._check = check
        self._config, self._redo = job.config, job.redo
        # The redo masks grow with the manifest, so each task carries its own.
        self._job_ref = ray.put(dataclasses.replace(job, redo={}))
        self._storage_check = nodes.StorageCheck(job)
        remote: Any = ray.remote  # the type hints of Ray leave out concurrency groups
        self.actor_class = remote(
            max_restarts=0,
            max_task_retries=0,
            num_cpus=self._config.cpus_per_worker,
            num_gpus=self._config.gpus_per_worker,
            concurrency_groups={"heartbeats": 1, "shards": SHARDS_AT_ONCE},
        )(actor or Actor)

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        self._check()
        time.sleep(seconds)

    def new_id(self) -> str:
        return uuid.uuid4().hex[:8]

    def start(self, left_out: Sequence[str]) -> Any:
        options = {"label_selector": {"ray.io/node-id": f"!in({','.join(left_out)})"}} if left_out else {}
        return self.actor_class.options(**options).remote()

    def send(self, request: Request) -> Hashable:
        method = getattr(request.worker.process, request.method)
        if request.method == "load":
            return method.remote(self._job_ref)
        if request.task is None:
            return method.remote()
        self._storage_check.finish()
        return method.remote(request.task, request.attempt_id, self._redo.get(request.task.shard.index))

    def wait(self, requests: Mapping[Hashable, Request], seconds: float) -> list[tuple[Request, Answer]]:
        self._check()
        refs: list[Any] = [*requests]
        # All answers are taken at once: Ray looks at every worker for each question.
        if seconds and not ray.wait(refs, num_returns=1, timeout=seconds)[0]:
            return []
        there = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return [(requests[ref], self._answer(ref, requests[ref])) for ref in there]

    def _answer(self, ref: Any, request: Request) -> Answer:
        try:
            return ray.get(ref)
        except RayError as error:
            return fault_of(error, request.worker.node or nodes.at(address(error)))

    def kill(self, worker: WorkerHandle) -> None:
        ray.kill(worker.process)

    def room(self) -> dict[str, int]:
        return nodes.room(self._config)

    def describe(self) -> str:
        return nodes.describe(self._config)
