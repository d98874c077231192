"""Watches over busy workers: a cluster does not notice those that stall."""

import heapq
from collections.abc import Hashable, Iterator, Mapping

from vcf_batch.driver.cluster import Cluster, Heartbeat, Request
from vcf_batch.driver.fault import Fault, Stalled

ROUND_SECONDS = 1.0
"""Between two looks."""

HEARTBEATS_AT_ONCE = 200
"""Workers that are asked in one look: those that were not asked for the longest time. Where there are thousands, it
takes several looks to ask all of them, and they may be silent for that much longer."""

LOAD_SECONDS = 3600.0
"""How long a worker may load at least: fetching a model takes its time and gives no heartbeat. A worker may also wait
that long for a machine before another one is asked for, since nobody can tell whether it waits or hangs."""


class Watch:
    """Keeps asking workers for heartbeats, and tells which requests have timed out.

    Args:
        cluster: asked for heartbeats.
        timeout: seconds that a worker may be silent: while it loads, or :data:`LOAD_SECONDS` if that is more.
    """

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        self._cluster, self._timeout = cluster, timeout
        self._asked: dict[Hashable, Request] = {}
        """Heartbeats that have not come yet."""
        self._looked_at = cluster.now()

    def timed_out(self, requests: Mapping[Hashable, Request]) -> Iterator[tuple[Request, Fault]]:
        """Collect heartbeats, ask for new ones, and yield the requests that have timed out.

        Args:
            requests: what workers have not answered yet, by key; it may change meanwhile. A request whose answer has
                already arrived is not timed out.
        """
        self._collect()
        now = self._cluster.now()
        if now - self._looked_at < ROUND_SECONDS:
            return
        # Were this process itself stopped for an hour, no worker would have been silent for that.
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
                error = Stalled(f"no sign of life for {limit:g} s (--stall-timeout)")
                yield request, Fault.of(error, request.worker.node)

    def _collect(self) -> None:
        if not self._asked:
            return
        for request, answer in self._cluster.wait(self._asked, 0.0):
            del self._asked[request.key]
            if isinstance(answer, Heartbeat):
                request.worker.note_heartbeat(answer)
