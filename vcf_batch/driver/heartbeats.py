"""The watch over busy workers. It finds workers that stall, which a cluster does not notice."""

import heapq
from collections.abc import Hashable, Iterator, Mapping

from vcf_batch.driver.cluster import Cluster, Heartbeat, Request
from vcf_batch.driver.fault import Fault, Stalled

ROUND_SECONDS = 1.0
"""Seconds between two rounds of the watch."""

HEARTBEATS_AT_ONCE = 200
"""Largest number of workers that are asked in one round, those first that were asked the longest time ago. Thousands of
workers take several rounds, and may be silent for that much longer."""

LOAD_SECONDS = 3600.0
"""Least time limit on loading, in seconds: fetching a model is slow and gives no heartbeat. The limit also holds for a
worker that waits for a machine, since waiting and hanging look the same. Then another worker is asked for."""


class Watch:
    """Watch that asks workers for heartbeats, and finds the requests that have timed out.

    Args:
        cluster: the cluster of the workers.
        timeout: seconds that a worker may be silent. While it loads, :data:`LOAD_SECONDS` counts if that is more.
    """

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        self._cluster, self._timeout = cluster, timeout
        self._asked: dict[Hashable, Request] = {}
        """Requests for heartbeats that are not answered yet, by key."""
        self._looked_at = cluster.now()

    def timed_out(self, requests: Mapping[Hashable, Request]) -> Iterator[tuple[Request, Fault]]:
        """Collect heartbeats, ask for new ones, and yield the requests that have timed out.

        Args:
            requests: requests that are not answered yet, by key; they may change meanwhile. A request whose answer has
                already arrived is not timed out.
        """
        self._collect()
        now = self._cluster.now()
        if now - self._looked_at < ROUND_SECONDS:
            return
        # Time in which this process itself was stopped is no silence of the workers.
        elapsed, self._looked_at = min(now - self._looked_at, 5 * ROUND_SECONDS), now
        up = {request.worker: None for request in requests.values() if request.worker.heartbeat}
        all_asked = len(up) // HEARTBEATS_AT_ONCE * ROUND_SECONDS
        for request in self._asked.values():
            up.pop(request.worker, None)
        for worker in heapq.nsmallest(HEARTBEATS_AT_ONCE, up, key=lambda worker: worker.asked):
            worker.asked = now
            request = Request(worker, "heartbeat")
            request.key = self._cluster.send(request)
            self._asked[request.key] = request
        for key, request in [*requests.items()]:
            request.silent += elapsed
            limit = (self._timeout if request.task else max(LOAD_SECONDS, self._timeout)) + all_asked
            if request.silent > limit and key in requests and not self._cluster.wait({key: request}, 0.0):
                error = Stalled(f"no heartbeat for {limit:g} s (--stall-timeout)")
                yield request, Fault.of(error, request.worker.node)

    def _collect(self) -> None:
        if not self._asked:
            return
        for request, answer in self._cluster.wait(self._asked, 0.0):
            del self._asked[request.key]
            if isinstance(answer, Heartbeat):
                request.worker.note_heartbeat(answer)
