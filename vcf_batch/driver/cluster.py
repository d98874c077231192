"""The cluster as the driver sees it, and the driver's notes on its workers.

:class:`vcf_batch.pool.ray_cluster.RayCluster` is a cluster on Ray; tests simulate one in virtual time.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vcf_batch.driver.fault import Fault
from vcf_batch.output.receipts import Receipt
from vcf_batch.setup.shard_task import ShardTask


@dataclass(frozen=True)
class Heartbeat:
    """Sign that a worker is alive: its node, and the progress of each of its attempts."""

    node: str
    progress: dict[str, int]
    """A number for each attempt under way, by attempt id; it changes whenever something is done."""
    samples_done: dict[str, int]
    """Number of samples that each attempt under way has written, by attempt id."""


@dataclass(frozen=True)
class Loaded:
    """Sign that a worker has loaded its models."""

    device: Mapping[str, Any]
    """The worker's device, see :attr:`vcf_batch.output.receipts.Receipt.device`."""
    node_is_mixed: bool = False
    """Whether other devices of the worker's node may be of other types."""


Answer = Heartbeat | Loaded | tuple[Receipt, Any] | Fault | None
"""Answer to a request: a heartbeat; the device of a worker that has loaded; None once it has survived a
trial; a shard's receipt and its staged files by kind. A fault may be the answer to any request."""


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver knows it. It is asked for its node, then to load the model, then to do its tasks."""

    process: Any
    """Handle by which the cluster knows the worker."""
    started: float
    """Time at which the worker was asked for, on the cluster's clock."""
    heartbeat: Heartbeat | None = None
    """The last heartbeat; None while the worker waits for a machine."""
    device_type: str = ""
    """Type of the worker's device; empty until it has loaded."""
    asked: float = 0.0
    """Time at which the worker was last asked for a heartbeat, on the cluster's clock."""
    requests: list["Request"] = field(default_factory=list)
    """Requests that the worker has not answered yet, without those for later heartbeats."""

    @property
    def node(self) -> str:
        """Node of the worker; empty while it waits for a machine."""
        return self.heartbeat.node if self.heartbeat else ""

    @property
    def tasks(self) -> list[ShardTask]:
        """Tasks that the worker has."""
        return [request.task for request in self.requests if request.task]

    @property
    def is_busy(self) -> bool:
        """Whether the worker has a task."""
        return any(request.task for request in self.requests)

    @property
    def samples_done(self) -> int:
        """Number of samples that the worker has written for unfinished shards."""
        if self.heartbeat is None:
            return 0
        return sum(self.heartbeat.samples_done.get(request.attempt_id, 0) for request in self.requests)

    def note_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Take a heartbeat, and end the silence of each request that has progressed since the last one."""
        self.heartbeat = heartbeat
        for request in self.requests:
            progress = heartbeat.progress.get(request.attempt_id, 0)
            if progress != request.progress:
                request.progress, request.silent = progress, 0.0


@dataclass(eq=False)
class Request:
    """A request to a worker."""

    worker: WorkerHandle
    method: Literal["heartbeat", "load", "run"]
    task: ShardTask | None = None
    """The task of a ``run``; None for the other methods."""
    attempt_id: str = ""
    """Name of the task's attempt, which its staged files bear; empty without a task."""
    key: Hashable = None
    """Key by which the cluster knows the answer."""
    progress: int = 0
    """Progress of the attempt in the last heartbeat."""
    silent: float = 0.0
    """Seconds since the last progress."""


class Cluster(Protocol):
    """Machines that run workers. The failure of a worker or a node raises nothing here: it is an answer."""

    def now(self) -> float:
        """Seconds, 0 or more, on a clock that never goes back. The driver reads every time from it."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""

    def new_id(self) -> str:
        """A new word, unique among all drivers."""

    def start(self, left_out: Sequence[str]) -> Any:
        """Ask for a worker on any node that is not left out. It starts when there is room.

        Returns:
            The handle of the worker: see :attr:`WorkerHandle.process`.
        """

    def send(self, request: Request) -> Hashable:
        """Send a request to its worker, which gives heartbeats also while it works on a shard.

        Returns:
            The key of the answer: see :attr:`Request.key`.
        """

    def wait(self, requests: Mapping[Hashable, Request], seconds: float) -> list[tuple[Request, Answer]]:
        """Wait until a request is answered, ``seconds`` at most, and return all answers that have arrived.

        A request that is waited for again gives the same answer again.
        """

    def kill(self, worker: WorkerHandle) -> None:
        """End a worker at once, wherever it is. Its open requests are answered by faults."""

    def room(self) -> dict[str, int]:
        """Number of workers that fit on each node, whatever runs there now."""

    def describe(self) -> str:
        """Resources that a worker needs and that the cluster has, in words."""
