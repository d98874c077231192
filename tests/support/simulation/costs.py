"""What things cost on a real cluster, in seconds and bytes: the inputs of a simulation at scale."""

import dataclasses
import math
from typing import Any

MEASURED, ASSUMED = "measured", "assumed"
PART_BYTES, SINGLE_COPY_BYTES, SINGLE_PUT_BYTES = 50 << 20, 150 << 20, 100 << 20
"""Sizes by which s3fs cuts what it sends and what it lets the server copy."""
COMMIT = (
    # The lease and run.json are read; there is no older receipt; the files have their sizes, and are moved.
    *(("cat", True, "small"), ("cat", True, "small"), ("cat", False, "small"), *[("info", True, "small")] * 2),
    *(("copy", True, "tar"), ("delete", True, "small"), ("copy", True, "small"), ("delete", True, "small")),
    *(("put", True, "small"), ("ls", True, "small")),
)
"""Calls of the storage in a commit: action, whether the object is there, and which file it is."""
LISTED_AT_ONCE = 1000
"""Objects in one answer of a listing."""


def _cost(default: float, source: str) -> Any:
    return dataclasses.field(default=default, metadata={"source": source})


@dataclasses.dataclass(frozen=True)
class Costs:
    """One value for each thing that takes time. The source of each says whether somebody has measured it."""

    image_seconds: float = _cost(
        0.45, f"{ASSUMED}: seconds of a GPU for an image; never measured by this project, so it is varied"
    )
    image_bytes: float = _cost(1e6, f"{ASSUMED}: bytes of an image in its tar, a PNG of 768 x 768 pixels")
    spread: float = _cost(0.05, f"{ASSUMED}: a shard takes its worker up to this share more or less than the mean")
    between_share: float = _cost(
        0.0064, f"{MEASURED} on a CPU by benchmarks/job.py: nothing is sampled between two shards, share of a shard"
    )
    gpus_per_node: int = _cost(8, f"{ASSUMED}: a node is lost with all of them")
    node_seconds: float = _cost(300.0, f"{ASSUMED}: from the loss of a node until its replacement has joined")
    notice_seconds: float = _cost(64.0, f"{MEASURED} once, by hand: until Ray takes a node that stands still for lost")
    load_seconds: float = _cost(60.0, f"{ASSUMED}: start of a worker's process, and its models onto the GPU")
    check_row_seconds: float = _cost(5.5e-7, f"{MEASURED} by benchmarks/plan.py: check of a row before a new run")
    connect_seconds: float = _cost(4.0, f"{MEASURED} once, by hand: a driver's connection to Ray")
    dispatch_seconds: float = _cost(
        0.0017, f"{MEASURED} by benchmarks/dispatch.py cost: the driver's processor time for a shard"
    )
    watch_seconds: float = _cost(
        5.5e-5, f"{MEASURED} by benchmarks/dispatch.py keep-busy: the driver's processor time for a worker, each second"
    )
    request_seconds: float = _cost(0.1, f"{ASSUMED}: wait for an answer of the storage; AWS says 0.1 to 0.2")
    request_cpu_seconds: float = _cost(
        0.0014, f"{MEASURED} by benchmarks/scale.py storage: a driver's processor time for a request to S3"
    )
    reference_requests: float = _cost(
        1.0, f"{MEASURED} by benchmarks/scale.py storage: requests for a reference; each row has one of its own"
    )
    copy_bytes_per_second: float = _cost(2e8, f"{ASSUMED}: a copy by the storage server, one request at a time")
    upload_bytes_per_second: float = _cost(2e8, f"{ASSUMED}: a worker's upload")

    def requests(self, action: str, size: float, found: bool, listed: int = 1) -> list[str]:
        """The HTTP requests that s3fs sends for a call, one after the other.

        Args:
            action: of :class:`support.simulation.object_store.SimulatedS3`.
            size: bytes that are sent or copied.
            found: whether the object is there.
            listed: number of entries in a listing.
        """
        if action == "info":
            return ["HEAD"] if found else ["HEAD", "LIST"]
        if action == "cat":
            return ["GET"]
        if action == "open":
            return ["HEAD", "GET"] if found else ["HEAD", "LIST"]
        if action == "ls":
            return ["LIST"] * max(math.ceil(listed / LISTED_AT_ONCE), 1)
        if action == "copy":
            if size <= SINGLE_COPY_BYTES:
                return ["HEAD", "COPY"]
            return ["HEAD", "POST", *["COPY"] * math.ceil(size / PART_BYTES), "POST"]
        if action == "put" and size >= SINGLE_PUT_BYTES:
            return ["POST", *["PUT"] * math.ceil(size / PART_BYTES), "POST"]
        return [{"put": "PUT", "delete": "DELETE"}[action]]

    def commit(self, rows: int) -> tuple[int, float]:
        """Number of requests, and seconds, of a commit of a new shard."""
        number, seconds = 0, 0.0
        for action, found, file in COMMIT:
            size = rows * self.image_bytes if file == "tar" else 0.0
            sent = self.requests(action, size, found)
            number += len(sent)
            seconds += self.seconds(sent, action, size)
        return number, seconds

    def seconds(self, requests: list[str], action: str, size: float) -> float:
        """Wait of a process for these requests, one after the other, and for the bytes that they move."""
        rate = {"copy": self.copy_bytes_per_second, "put": self.upload_bytes_per_second}.get(action, math.inf)
        return len(requests) * self.request_seconds + size / rate
