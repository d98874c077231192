"""Processes that take turns in virtual time, in an order that is drawn: one runs until it waits or is interrupted.

Each has a thread of its own, because the product's code does not know that it is simulated. Only one thread runs at a
time, so a run is the same whenever the draws are.
"""

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


class Killed(BaseException):
    """The end of a process by SIGKILL. Nothing that it does afterwards has an effect."""


@dataclass(eq=False)
class Process:
    """A thread of control."""

    name: str
    group: str
    """Processes of one group are killed and suspended together: the threads of one driver."""
    ready_at: float = 0.0
    """When it goes on, unless its condition comes first."""
    condition: Callable[[], bool] | None = None
    is_killed: bool = False
    ended: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


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
        self._processes: list[Process] = []
        self._current: Process | None = None
        self._done = threading.Semaphore(0)

    @property
    def current(self) -> Process:
        """The process that runs."""
        assert self._current is not None
        return self._current

    def spawn(self, run: Callable[[], object], name: str, group: str) -> Process:
        """Start a process. It begins when it is its turn."""
        process = Process(name, group, self.now)
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
            self._processes.remove(process)
            self._hand_over()

        self._processes.append(process)
        threading.Thread(target=body, name=name, daemon=True).start()
        return process

    def run(self) -> None:
        """Let the processes run until all have ended."""
        if self._processes:
            self._hand_over()
            self._done.acquire()

    def pause(self) -> None:
        """Let somebody else go on, if it is drawn so. A killed process ends here."""
        self.wait(None, self.now)

    def sleep(self, seconds: float) -> None:
        """Let time pass for the current process."""
        self.wait(None, self.now + seconds)

    def wait(self, condition: Callable[[], bool] | None, until: float) -> None:
        """Let the current process wait until a condition holds, or until a time."""
        process = self.current
        if process.is_killed:
            raise Killed
        process.ready_at, process.condition = until, condition
        following = self._next()
        if following is not process:
            self._go(following)
            process.turn.acquire()
        process.condition = None
        if process.is_killed:
            raise Killed

    def kill(self, group: str) -> None:
        """End all processes of a group, wherever they are."""
        self.suspended.pop(group, None)
        for process in self._processes:
            if process.group == group:
                process.is_killed = True

    def suspend(self, group: str, seconds: float) -> None:
        """Let a group stand still, as by SIGSTOP."""
        self.suspended[group] = self.now + seconds

    def is_alive(self, group: str) -> bool:
        """Whether a process of a group is left."""
        return any(process.group == group and not process.is_killed for process in self._processes)

    def _next(self) -> Process:
        """The process whose turn it is. The clock moves on to it."""
        while True:
            able = [process for process in self._processes if self._may_go(process)]
            if able:
                return able[0] if len(able) == 1 else self._draw.choice(able)
            waking = [max(each.ready_at, self.suspended.get(each.group, 0.0)) for each in self._processes]
            self.now = max(self.now, min(waking))
            if self.now >= self.end_at:
                self.ran_out = True
                for process in self._processes:
                    process.is_killed = True

    def _may_go(self, process: Process) -> bool:
        if process.is_killed:
            return True
        if (until := self.suspended.get(process.group)) is not None:
            if until > self.now:
                return False
            del self.suspended[process.group]
        return process.ready_at <= self.now or (process.condition is not None and process.condition())

    def _go(self, process: Process) -> None:
        self._current = process
        process.turn.release()

    def _hand_over(self) -> None:
        """Let the next one go on, after one has ended."""
        if self._processes:
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
