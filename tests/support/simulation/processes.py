"""Processes that take turns in virtual time, in an order that is drawn: one runs until it waits or is interrupted.

Each has a thread of its own, because the product's code does not know that it is simulated. Only one thread runs at a
time, so a run is the same whenever the draws are.
"""

import heapq
import itertools
import math
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field


class Killed(BaseException):
    """The end of a process by SIGKILL. Nothing that it does afterwards has an effect."""


def _closed() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class Process:
    """A thread of control."""

    name: str
    group: str
    """Processes of one group are killed and suspended together: the threads of one driver."""
    number: int
    """Rank by the time of its start."""
    condition: Callable[[], bool] | None = None
    """What it waits for, unless its time comes first."""
    is_killed: bool = False
    ended: bool = False
    waits: int = 0
    """Number of its waits so far. A time that was set for an earlier one means nothing."""
    turn: threading.Lock = field(default_factory=_closed)


class Scheduler:
    """The processes of a simulated world, and its clock.

    Args:
        draw: decides who is next where several may go on.
        end_at: time at which every process is killed, however far it is.
    """

    def __init__(self, draw: random.Random, end_at: float = math.inf) -> None:
        self.now = 0.0
        self.end_at = end_at
        self.ran_out = False
        """Whether the world came to its end while processes were left."""
        self.errors: list[BaseException] = []
        """What processes have raised, except by being killed."""
        self.suspended: dict[str, float] = {}
        """Groups that stand still, each with the time at which it wakes up."""
        self._draw = draw
        self._numbers = itertools.count()
        self._groups: defaultdict[str, dict[int, Process]] = defaultdict(dict)
        """The processes of each group, by number."""
        self._timed: list[tuple[float, int, int, Process]] = []
        """Heap of the times at which processes go on: each with the process's number, and with that of its wait."""
        self._due: dict[int, Process] = {}
        """Processes whose time has come, by number."""
        self._conditional: dict[int, Process] = {}
        """Processes that wait for a condition, by number."""
        self._current: Process | None = None
        self._done = threading.Semaphore(0)

    @property
    def current(self) -> Process:
        """The process that runs."""
        assert self._current is not None
        return self._current

    def spawn(self, run: Callable[[], object], name: str, group: str) -> Process:
        """Start a process. It begins when it is its turn."""
        process = Process(name, group, next(self._numbers))
        # What a killed process still does has no effect.
        process.is_killed = self._current is not None and self._current.is_killed and self._current.group == group

        def body() -> None:
            process.turn.acquire()
            try:
                if not process.is_killed:
                    run()
            except Killed:
                pass
            except BaseException as error:
                self.errors.append(error)
            process.ended = True
            self._remove(process)
            self._hand_over()

        self._groups[group][process.number] = self._due[process.number] = process
        threading.Thread(target=body, name=name, daemon=True).start()
        return process

    def run(self) -> None:
        """Let the processes run until all have ended."""
        if self._groups:
            self._hand_over()
            self._done.acquire()

    def sleep(self, seconds: float) -> None:
        """Let time pass for the current process."""
        self.wait(None, self.now + seconds)

    def wait(self, condition: Callable[[], bool] | None, until: float) -> None:
        """Let the current process wait until a condition holds, or until a time."""
        process = self.current
        if process.is_killed:
            raise Killed
        self._begin_wait(process, condition, until)
        following = self._next()
        if following is not process:
            self._go(following)
            process.turn.acquire()
        if process.is_killed:
            raise Killed

    def wake(self, process: Process) -> None:
        """Let a process that waits go on, if it still does."""
        if not process.ended:
            self._due[process.number] = process

    def kill(self, group: str) -> None:
        """End all processes of a group, wherever they are."""
        self.suspended.pop(group, None)
        for process in self._groups.get(group, {}).values():
            self._kill(process)

    def suspend(self, group: str, seconds: float) -> None:
        """Let a group stand still, as by SIGSTOP."""
        self.suspended[group] = self.now + seconds

    def is_alive(self, group: str) -> bool:
        """Whether a process of a group is left."""
        return any(not process.is_killed for process in self._groups.get(group, {}).values())

    def _begin_wait(self, process: Process, condition: Callable[[], bool] | None, until: float) -> None:
        process.condition = condition
        if condition is not None:
            self._conditional[process.number] = process
        if until <= self.now:
            self._due[process.number] = process
        elif until < math.inf:
            heapq.heappush(self._timed, (until, process.number, process.waits, process))

    def _next(self) -> Process:
        """The process whose turn it is. Its wait ends, and the clock moves on to it."""
        while True:
            while self._timed and (self._timed[0][0] <= self.now or self._is_over(self._timed[0])):
                entry = heapq.heappop(self._timed)
                if not self._is_over(entry):
                    self._due[entry[1]] = entry[3]
            if able := self._able():
                process = able[0] if len(able) == 1 else self._draw.choice(able)
                self._due.pop(process.number, None)
                self._conditional.pop(process.number, None)
                process.waits += 1
                return process
            waking = [self.suspended[process.group] for process in self._due.values()]
            if self._timed:
                waking.append(self._timed[0][0])
            self.now = max(self.now, min(waking, default=math.inf))
            if self.now >= self.end_at:
                self.ran_out = True
                for group in self._groups.values():
                    for process in group.values():
                        self._kill(process)

    def _able(self) -> list[Process]:
        """The processes that may go on, in the order of their starts."""
        able = [process for process in self._due.values() if process.is_killed or not self._stands_still(process)]
        for number, process in self._conditional.items():
            if number not in self._due and not self._stands_still(process):
                assert process.condition is not None
                if process.condition():
                    able.append(process)
        return sorted(able, key=lambda process: process.number) if len(able) > 1 else able

    def _stands_still(self, process: Process) -> bool:
        if (until := self.suspended.get(process.group)) is None:
            return False
        if until > self.now:
            return True
        del self.suspended[process.group]
        return False

    @staticmethod
    def _is_over(entry: tuple[float, int, int, Process]) -> bool:
        """Whether a wait has ended before its time."""
        _, _, wait, process = entry
        return process.waits != wait or process.ended

    def _kill(self, process: Process) -> None:
        process.is_killed = True
        if process is not self._current:
            self._due[process.number] = process

    def _remove(self, process: Process) -> None:
        self._due.pop(process.number, None)
        group = self._groups[process.group]
        del group[process.number]
        if not group:
            del self._groups[process.group]

    def _go(self, process: Process) -> None:
        self._current = process
        process.turn.release()

    def _hand_over(self) -> None:
        """Let the next one go on, after one has ended."""
        if self._groups:
            self._go(self._next())
        else:
            self._current = None
            self._done.release()


class Event:
    """What the product uses of :class:`threading.Event`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._is_set = scheduler, False

    def set(self) -> None:
        self._is_set = True

    def wait(self, seconds: float) -> bool:
        self._scheduler.wait(lambda: self._is_set, self._scheduler.now + seconds)
        return self._is_set


class Thread:
    """What the product uses of :class:`threading.Thread`."""

    def __init__(self, scheduler: Scheduler, target: Callable[[], object], name: str) -> None:
        self._scheduler, self._target, self._name = scheduler, target, name
        self._process: Process | None = None

    def start(self) -> None:
        self._process = self._scheduler.spawn(self._target, self._name, self._scheduler.current.group)

    def join(self, seconds: float) -> None:
        process = self._process
        assert process is not None
        self._scheduler.wait(lambda: process.ended, self._scheduler.now + seconds)
