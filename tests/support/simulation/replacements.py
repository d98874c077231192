"""What stands in a simulated world for clocks, threads, names and chance of the product."""

import concurrent.futures
import contextlib
import itertools
import logging
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.simulated import NoExporter
from support.simulation.processes import Event, Scheduler, Thread
from vcf_batch.commands import push
from vcf_batch.driver import progress
from vcf_batch.output import commits, lease, run_file
from vcf_batch.pool import launch
from vcf_batch.setup import claim
from vcf_batch.storage import reading, retries


class Notes(progress.Progress):
    """Hands on what the user is told."""

    def __init__(self, total: int, now: Callable[[], float], tell: Callable[[str], None]) -> None:
        super().__init__(total, 0, now=now)
        self._tell = tell

    def note(self, message: str, event: str = "note", level: int = logging.INFO, **fields: Any) -> None:
        if event != "progress":
            self._tell(message)


class CommitThreads(concurrent.futures.Executor):
    """The threads that commit, as processes of their driver."""

    def __init__(self, scheduler: Scheduler, number: int) -> None:
        self._scheduler, self._group = scheduler, scheduler.current.group
        self._waiting: list[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = []
        self._number = self._idle = number

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        if self._idle:
            self._idle -= 1
            self._scheduler.spawn(self._work, f"{self._group} commits", self._group)
        return future

    def _work(self) -> None:
        while self._waiting:
            future, call = self._waiting.pop(0)
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
        self._idle += 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._waiting.clear()
        self._scheduler.wait(lambda: self._idle == self._number, self._scheduler.now + 1e6)


class Inline(concurrent.futures.Executor):
    """Does what it is given before it returns: readers of receipts have no effect that an order could change."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def replaced(scheduler: Scheduler, draw: random.Random, is_gone: Callable[[dict[str, Any]], bool]) -> Iterator[None]:
    """Let clocks, threads and chance of the product be those of a simulated world.

    Args:
        is_gone: whether the driver that asks knows that an owner of a lease is dead.
    """
    clock = types.SimpleNamespace(
        monotonic=lambda: scheduler.now,
        time=lambda: scheduler.now,
        sleep=scheduler.sleep,
        perf_counter=lambda: scheduler.now,
    )
    numbers = itertools.count()
    names = types.SimpleNamespace(uuid4=lambda: types.SimpleNamespace(hex=f"{next(numbers):032x}"))
    threads = types.SimpleNamespace(
        Event=lambda: Event(scheduler), Thread=lambda target, name, daemon: Thread(scheduler, target, name)
    )

    with pytest.MonkeyPatch.context() as patch:
        for module in (lease, retries, launch, push):
            patch.setattr(module, "time", clock)
        patch.setattr(lease, "threading", threads)
        patch.setattr(lease, "_is_gone", is_gone)
        patch.setattr(retries, "_jitter", draw)
        for module in (lease, commits, run_file):
            patch.setattr(module, "uuid", names)
        patch.setattr(reading, "ThreadPoolExecutor", Inline)
        patch.setattr(launch, "ThreadPoolExecutor", lambda number, name: CommitThreads(scheduler, number))
        patch.setattr(launch, "PrometheusExporter", lambda *_: NoExporter())
        patch.setattr(claim.importlib.metadata, "version", lambda name: "1")
        level = logging.getLogger("vcf_batch").level
        logging.getLogger("vcf_batch").setLevel(logging.CRITICAL)
        yield
        logging.getLogger("vcf_batch").setLevel(level)
