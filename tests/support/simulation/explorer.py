"""Every request that a driver sends, struck once: a run goes well but for one moment, and each moment is tried.

The world is calm: no worker dies and no node goes. At its k-th request the driver dies, or loses the answer, or is
refused for good, before the request has its effect or after it; or it stands still while a second driver runs to its
end, and then goes on. Where it dies twice, the driver that resumes dies too, at a request that follows from k.
"""

from collections.abc import Callable
from typing import Literal

from support.simulation.cluster import Ways
from support.simulation.object_store import Strike
from support.simulation.universe import Universe
from vcf_batch import storage

Scenario = Literal["fresh run", "resumed run", "repair", "appended rows"]
SCENARIOS: tuple[Scenario, ...] = ("fresh run", "resumed run", "repair", "appended rows")
Fate = Literal["dies", "dies twice", "loses the answer", "is refused", "is refused after the effect", "stands still"]
FATES: tuple[Fate, ...] = (
    "dies",
    "dies twice",
    "loses the answer",
    "is refused",
    "is refused after the effect",
    "stands still",
)

_STRIKES: dict[Fate, Strike] = {
    "loses the answer": "lost",
    "is refused": "refused",
    "is refused after the effect": "done and refused",
}
STANDS_STILL_SECONDS = 500.0
"""Seconds that a driver stands still: longer than its lease lasts, and than another driver takes."""


class Exploration(Universe):
    """One run in a calm world, struck at one request.

    Args:
        scenario: what the driver does.
        fate: what happens to it.
        number: at which of its requests, from 1; 0 for none.
        trace: gets a line for whatever happens.
    """

    def __init__(self, scenario: Scenario, fate: Fate, number: int, trace: Callable[[str], None] | None = None) -> None:
        super().__init__(0, trace)
        self.scenario, self.fate, self.number = scenario, fate, number
        self.requests = 0
        """Requests that the driver has sent."""
        self.explored = ""
        """The driver that is struck; empty before it starts."""

    def _part(self) -> int:
        return 2 * self.shard_size

    def _ways(self) -> Ways:
        return Ways()

    def _story(self) -> None:
        if self.scenario != "fresh run":
            self.fatal = 20 if self.scenario == "resumed run" else 0
            self.start()
            self.scheduler.wait(lambda: not self._alive(), 1000.0)
        redo = {}
        if self.scenario == "repair":
            redo = {index: bytes(row % 2 for row in range(self.shard_size)) for index in range(2)}
            self.ways.gone = {row for row in range(2 * self.shard_size) if not (row % self.shard_size) % 2}
        elif self.scenario == "appended rows":
            self._append()
        self.explored = f"driver-{len(self.started)}"
        self.start(redo)
        self.scheduler.wait(lambda: not self._alive(), 5000.0)
        if self.fate == "dies twice":
            sent, self.requests, self.number = self.requests, 0, 1 + self.number * 7 % 40
            self.explored = f"driver-{len(self.started)}"
            self.start(redo)
            self.scheduler.wait(lambda: not self._alive(), 5000.0)
            self.requests = sent
        self._end_well()

    def _count(self, action: str, key: str) -> Strike | None:
        super()._count(action, key)
        if self._who()[0] != self.explored:
            return None
        self.requests += 1
        if self.requests != self.number:
            return None
        self.tell(f"{self.explored} {self.fate} at its request {self.number}, to {action} {storage.name(key)}")
        self.excused.add(self.explored)
        if self.fate in ("dies", "dies twice"):
            self.scheduler.kill(self.explored)
        elif self.fate == "stands still":
            self.start()
            self.scheduler.suspend(self.explored, STANDS_STILL_SECONDS)
        return _STRIKES.get(self.fate)


def explore(scenario: Scenario, fate: Fate, number: int, trace: Callable[[str], None] | None = None) -> int:
    """Strike one request of a driver.

    Returns:
        Number of requests that the driver has sent.

    Raises:
        Violation: something that must hold does not.
    """
    exploration = Exploration(scenario, fate, number, trace)
    exploration.run()
    return exploration.requests
