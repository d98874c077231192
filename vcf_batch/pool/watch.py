"""Watches over busy workers: Ray does not notice those that stall."""

import contextlib
import heapq
import time
from collections.abc import Iterator, Mapping

import ray
from ray.exceptions import RayError

from vcf_batch.pool.actor import Request, WorkerHandle
from vcf_batch.pool.errors import Stalled

LOOK_SECONDS = 1.0
"""Between two looks."""

SIGNS_AT_ONCE = 200
"""Workers that are asked in a look, those first that were not for the longest time: of thousands, it takes several
looks to ask them all, and that is how much longer they may be silent."""

LOAD_SECONDS = 3600.0
"""How long a worker may load at least: fetching a model takes its time and gives no sign of life. And how long it may
wait for a machine before another one is asked for, since nobody can tell whether it waits or hangs."""


class Watch:
    """Asks workers for signs of life, and tells who has given none for too long.

    Args:
        timeout: seconds that a worker may be silent: while it loads, or :data:`LOAD_SECONDS` if that is more.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._asked: dict[ray.ObjectRef, WorkerHandle] = {}
        self._looked_at = time.monotonic()

    def stalled(self, flights: Mapping[ray.ObjectRef, Request]) -> Iterator[tuple[Request, Stalled]]:
        """Take in the signs that have come, ask for others, and yield what is not worth waiting for any longer.

        Args:
            flights: by what will answer them. An answer that is there already is no longer a worker's silence.
        """
        self._take_in()
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        # Were this process itself stopped for an hour, no worker would have been silent for that.
        elapsed, self._looked_at = min(now - self._looked_at, 5 * LOOK_SECONDS), now
        up = {flight.worker for flight in flights.values() if flight.worker.sign}
        for worker in heapq.nsmallest(SIGNS_AT_ONCE, up.difference(self._asked.values()), key=lambda one: one.asked):
            worker.asked = now
            self._asked[worker.actor.sign.remote()] = worker
        all_asked = len(up) // SIGNS_AT_ONCE * LOOK_SECONDS
        for ref, flight in [*flights.items()]:
            flight.silent += elapsed
            limit = (self._timeout if flight.task else max(LOAD_SECONDS, self._timeout)) + all_asked
            if flight.silent > limit and ref in flights and not ray.wait([ref], timeout=0)[0]:
                yield flight, Stalled(f"no sign of life for {limit:g} s (--stall-timeout)")

    def _take_in(self) -> None:
        if not self._asked:
            return
        for ref in ray.wait([*self._asked], num_returns=len(self._asked), timeout=0)[0]:
            worker = self._asked.pop(ref)
            with contextlib.suppress(RayError):
                worker.signed(ray.get(ref))
