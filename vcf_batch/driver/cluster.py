"""All that the driver sees of a cluster, and what it notes of the workers there.

:class:`vcf_batch.pool.ray_cluster.RayCluster` is one on Ray; tests have one that is simulated, in virtual time.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vcf_batch.driver.fault import Fault
from vcf_batch.records import Receipt
from vcf_batch.setup.shard_task import ShardTask


@dataclass(frozen=True)
class Heartbeat:
    """Where a worker is, and by attempt how far it has come."""

    node: str
    progress: dict[str, int]
    """A number for each attempt under way; it changes whenever something is done."""
    samples_done: dict[str, int]


Answer = Heartbeat | tuple[Receipt, dict[str, str]] | Fault | None
"""What comes back for a request: a heartbeat; None once the worker has loaded or has survived a trial; a shard's
receipt and its staged files by kind; or a fault, whatever was asked."""


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver knows it: asked where it is, then to load the model, then to do one task after another."""

    process: Any
    """What the cluster knows it by."""
    started: float
    """When it was asked for, on the cluster's clock."""
    heartbeat: Heartbeat | None = None
    """Its last one; None while it waits for a machine."""
    asked: float = 0.0
    """When it was last asked for a heartbeat, on the cluster's clock."""
    requests: list["Request"] = field(default_factory=list)
    """What it has not answered yet, but for later heartbeats."""

    @property
    def node(self) -> str:
        """Where it is; empty while it waits for a machine."""
        return self.heartbeat.node if self.heartbeat else ""

    @property
    def tasks(self) -> list[ShardTask]:
        """What it has to do."""
        return [request.task for request in self.requests if request.task]

    @property
    def is_busy(self) -> bool:
        """Whether it has a task."""
        return any(request.task for request in self.requests)

    @property
    def samples_done(self) -> int:
        """Samples of unfinished shards."""
        if self.heartbeat is None:
            return 0
        return sum(self.heartbeat.samples_done.get(request.attempt_id, 0) for request in self.requests)

    def note_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Take a heartbeat; requests that have moved since the last one are no longer silent."""
        self.heartbeat = heartbeat
        for request in self.requests:
            progress = heartbeat.progress.get(request.attempt_id, 0)
            if progress != request.progress:
                request.progress, request.silent = progress, 0.0


@dataclass(eq=False)
class Request:
    """What a worker has been asked."""

    worker: WorkerHandle
    method: Literal["heartbeat", "load", "run"]
    task: ShardTask | None = None
    """For ``run``; None otherwise."""
    attempt_id: str = ""
    """Names the task's staged files."""
    key: Hashable = None
    """What the cluster knows the answer by."""
    progress: int = 0
    """As of the last heartbeat."""
    silent: float = 0.0
    """Seconds since anything moved."""


class Cluster(Protocol):
    """Machines that run workers. Nothing here raises because a worker or a node has failed: that is an answer."""

    def now(self) -> float:
        """Seconds, 0 or more, on a clock that never goes back. All times of the driver are read from it."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""

    def new_id(self) -> str:
        """A word that nobody else gets, not even another driver."""

    def start(self, left_out: Sequence[str]) -> Any:
        """Ask for a worker on any node but some; it comes up whenever there is room. Its heartbeat tells where it is.

        Returns:
            What the cluster knows it by: see :attr:`WorkerHandle.process`.
        """

    def send(self, request: Request) -> Hashable:
        """Ask a worker something. It does one shard after another, and gives heartbeats meanwhile.

        Returns:
            What the cluster knows the answer by: see :attr:`Request.key`.
        """

    def wait(self, requests: Mapping[Hashable, Request], seconds: float) -> list[tuple[Request, Answer]]:
        """Wait until a request is answered, ``seconds`` at most, and take all answers that are there.

        The answer of a request that is waited for again is there again.
        """

    def kill(self, worker: WorkerHandle) -> None:
        """End a worker at once, wherever it is. What it has not answered is answered by faults."""

    def room(self) -> dict[str, int]:
        """How many workers fit on each node, whatever runs there now."""

    def describe(self) -> str:
        """What a worker needs and what there is, for people."""
