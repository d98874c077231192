"""Every request of a program to its storage, struck once: all goes well but for one moment, and each moment is tried.

The world is calm: no worker dies and no node goes. At its k-th request the program that is explored, a driver or a
reader, dies; or it loses the answer, or is refused for good, before the request has its effect or after it; or the
request comes late; or the program stands still while others work, and then goes on. Where it dies twice, the next one
dies too, at a request that follows from k.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from support.simulation.cluster import Ways
from support.simulation.local_files import LocalFiles
from support.simulation.object_store import Store, Strike
from support.simulation.universe import Universe, Violation
from vcf_batch import storage

Place = Literal[
    "S3", "S3 without If-Match", "S3 without If-None-Match", "S3 with stale listings",
    "a disk", "a file system without links",
]  # fmt: skip
Scenario = Literal[
    "fresh run", "resumed run", "repair", "appended rows", "run before a repair", "repair after a run",
    "push", "push again", "verify", "report",
]  # fmt: skip
Fate = Literal[
    "dies",
    "dies twice",
    "loses the answer",
    "is refused",
    "is refused after the effect",
    "comes late",
    "stands still",
    "is read",
]
PLACES: tuple[Place, ...] = (
    "S3", "S3 without If-Match", "S3 without If-None-Match", "S3 with stale listings",
    "a disk", "a file system without links",
)  # fmt: skip
RUNS: tuple[Scenario, ...] = (
    "fresh run", "resumed run", "repair", "appended rows", "run before a repair", "repair after a run"
)  # fmt: skip
READERS: tuple[Scenario, ...] = ("push", "push again", "verify", "report")
FATES: tuple[Fate, ...] = (
    "dies", "dies twice", "loses the answer", "is refused", "is refused after the effect", "comes late",
    "stands still", "is read",
)  # fmt: skip

_STRIKES: dict[Fate, Strike] = {
    "loses the answer": "lost",
    "is refused": "refused",
    "is refused after the effect": "done and refused",
    "comes late": "late",
}
STALE_SECONDS = 30.0
STANDS_STILL_SECONDS = 500.0
"""Seconds that a driver stands still: longer than its lease lasts, and than another driver takes."""


@dataclass(frozen=True)
class Case:
    """What is explored."""

    place: Place
    scenario: Scenario
    fate: Fate


def cases() -> Iterator[Case]:
    """All that make sense: nobody reads a reader, and what only reads may die.

    Calls of an operating system do not come late. A delete may, and without ``If-Match`` it then deletes what was
    written in its place meanwhile: docs/reliability.md says so.
    """
    for place in PLACES:
        fates = [fate for fate in FATES if fate != "comes late" or place in ("S3", "S3 with stale listings")]
        yield from (Case(place, scenario, fate) for scenario in RUNS for fate in fates)
        for scenario in READERS:
            pushes = scenario.startswith("push")
            for fate in fates:
                if fate != "is read" and (pushes or fate not in ("dies", "dies twice", "comes late")):
                    yield Case(place, scenario, fate)


class Exploration(Universe):
    """One calm world, in which one request is struck.

    Args:
        case: what is done where, and what happens to it.
        number: at which request of the explored program, from 1; 0 for none.
        root: an empty folder of this machine.
        trace: gets a line for whatever happens.
    """

    def __init__(self, case: Case, number: int, root: str, trace: Callable[[str], None] | None = None) -> None:
        self.case, self.number, self._root = case, number, root
        super().__init__(0, trace)
        self.requests = 0
        """Requests that the explored program has sent."""
        self.explored = ""
        """The program that is struck; empty before it starts."""

    def _store(self) -> Store:
        given = self.draw, self.scheduler.sleep, lambda: self.scheduler.now, self._who, self._later
        place = self.case.place
        if place in ("a disk", "a file system without links"):
            return LocalFiles(*given, root=self._root, links=place == "a disk")
        stale = STALE_SECONDS if place == "S3 with stale listings" else 0.0
        return Store(
            *given,
            if_match=place != "S3 without If-Match",
            if_none_match=place != "S3 without If-None-Match",
            stale_seconds=stale,
        )

    def _is_read(self) -> bool:
        return self.case.scenario in READERS or self.case.fate == "is read"

    def _part(self) -> int:
        return 2 * self.shard_size

    def _ways(self) -> Ways:
        return Ways()

    # The story

    def _story(self) -> None:
        scenario = self.case.scenario
        if scenario in READERS:
            self._read()
        else:
            self._generate()
        self.number = 0
        self._end_well()

    def _end_well(self) -> None:
        if self._is_shown_older_listings():
            self.wait_for(*self.started)
            self.wait_for(self.start())
        super()._end_well()

    def _knows_dead(self, owner: dict[str, Any]) -> bool:
        if not self._is_shown_older_listings():
            return super()._knows_dead(owner)
        # At once: by the time at which a lease expires, listings would hardly lag behind any more.
        group = self.witness.tokens.get(str(owner.get("token")))
        return group is not None and not self.scheduler.is_alive(group)

    def _is_shown_older_listings(self) -> bool:
        """Whether the driver after one that has died is shown what was there before.

        Not after a repair: it may not find what that has left, and lose samples. docs/reliability.md says so.
        """
        return bool(self.store.stale_seconds) and "repair" not in self.case.scenario

    def _generate(self) -> None:
        scenario = self.case.scenario
        begun = scenario in ("resumed run", "repair", "appended rows")
        if begun:
            self.fatal = 20 if scenario == "resumed run" else 0
            self.wait_for(self.start())
        redo = self._half() if scenario == "repair" else {}
        if scenario == "appended rows":
            self._append()
        if scenario == "repair after a run":
            self.start()
            self.scheduler.sleep(1.0)
            redo = self._half()
        self._explore(lambda: self.start(redo))
        if scenario == "run before a repair":
            self.scheduler.sleep(1.0)
            self.start(self._half())
        self.wait_for(*self.started)
        if self.case.fate == "dies twice":
            self._die_again(lambda: self.start(redo))

    def _read(self) -> None:
        scenario = self.case.scenario
        self.wait_for(self.start())
        self.scheduler.sleep(STALE_SECONDS)  # A listing shows that the run has ended.
        if scenario == "push again":
            self.wait_for(self.readers.start("push"))
            self.wait_for(self.start(self._half()))
        action = "push" if scenario.startswith("push") else scenario
        self.wait_for(self._explore(lambda: self.readers.start(action)), *self.started)
        if self.case.fate == "dies twice":
            self._die_again(lambda: self.readers.start(action))

    def _half(self) -> dict[int, bytes]:
        """Every other row, to be generated again; the rest cannot be generated any more."""
        rows = range(sum(self.parts))
        self.ways.gone = {row for row in rows if not (row % self.shard_size) % 2}
        return {index: bytes(row % 2 for row in range(self.shard_size)) for index in range(2)}

    def _overtaking(self) -> dict[int, bytes]:
        """What the driver generates again that works while another program stands still.

        Beside a repair it is the first row, which fails now: its shard gets another receipt than the one that the
        repair has looked at, and the other shard keeps it. Without ``If-Match`` samples are lost, and without
        ``If-None-Match`` receipts are replaced: docs/reliability.md says so.
        """
        if self.case.scenario in READERS:
            return self._half()
        if self.case.scenario == "repair" and self.store.if_match and self.store.if_none_match:
            return {0: bytes(not row for row in range(self.shard_size))}
        return {}

    def _explore(self, start: Callable[[], str]) -> str:
        """Start what is explored. It has not sent a request before its name is known here."""
        self.explored = start()
        return self.explored

    def _die_again(self, start: Callable[[], str]) -> None:
        sent, self.requests, self.number = self.requests, 0, 1 + self.number * 7 % 40
        self.wait_for(self._explore(start))
        self.requests = sent

    def _count(self, action: str, key: str) -> Strike | None:
        super()._count(action, key)
        if self._who()[0] != self.explored:
            return None
        self.requests += 1
        if self.requests != self.number:
            return None
        fate = self.case.fate
        self.tell(f"{self.explored} {fate} at its request {self.number}, to {action} {storage.name(key)}")
        self.excused.add(self.explored)
        if fate in ("dies", "dies twice"):
            self.scheduler.kill(self.explored)
        elif fate == "stands still":
            self.start(self._overtaking())
            self.scheduler.suspend(self.explored, STANDS_STILL_SECONDS)
        elif fate == "is read":
            for reader in ("verify", "report", "push"):
                self.readers.start(reader)
            self.scheduler.suspend(self.explored, STANDS_STILL_SECONDS)
        if not (self.store.if_match and self.store.if_none_match):
            self.excused.update(self.started)  # a lease that is deleted or created twice may be the next driver's
        return _STRIKES.get(fate)


@contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="explored-") as folder:
        yield folder


def explore(case: Case, number: int, trace: Callable[[str], None] | None = None) -> int:
    """Strike one request.

    Returns:
        Number of requests that the explored program has sent.

    Raises:
        Violation: something that must hold does not.
    """
    with _folder() as root:
        exploration = Exploration(case, number, root, trace)
        try:
            exploration.run()
        except Exception as error:
            raise Violation(f"{case}, request {number}: {type(error).__name__}: {error}") from error
    return exploration.requests


def wrong_in(case: Case) -> tuple[Case, int, list[str]]:
    """Strike every request of a case.

    Returns:
        The case, the number of requests, and what was found wrong, in words.
    """
    found: list[str] = []
    try:
        requests = explore(case, 0)
    except Violation as error:
        return case, 0, [str(error)]
    for number in range(1, requests + 1):
        try:
            explore(case, number)
        except Violation as error:
            found.append(str(error))
    return case, requests, found
