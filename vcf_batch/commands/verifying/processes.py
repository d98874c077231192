"""Shards read in several processes of this machine, as the threads of one share a processor where Python works."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from vcf_batch.errors import VcfBatchError
from vcf_batch.output.shards import SHARD_READERS, side_by_side

READ_BY_A_PROCESS = 5_000
"""Rows, or shards of which some columns are read, for which one more process is worth its start of about a second."""

Part = TypeVar("Part")
"""What is read at once: a shard, or some."""
Verified = TypeVar("Verified")

_HELD = (signal.SIGINT, signal.SIGTERM)
"""Signals that this process answers for all: Ctrl-C reaches every process of a terminal."""


def default_processes(number: int) -> int:
    """The number of processes that read a number of rows, or some columns of a number of shards.

    It is the number of processors that this process may use, or less where there is little to read.
    """
    return max(1, min(len(os.sched_getaffinity(0)), number // READ_BY_A_PROCESS))


def read_in_processes(
    read: Callable[[Part], Verified], some: Iterable[Part], processes: int
) -> Iterator[tuple[Part, Verified]]:
    """Each shard, in order, with the result of ``read``, which runs in threads of several processes.

    Shards are read a few for each thread ahead, so memory does not grow with their number.

    Args:
        read: picklable, as are its results.
        some: the shards, or parts of several shards that are read by one thread.
        processes: 1 or more; 1 is this process.

    Raises:
        VcfBatchError: a process ended before its shards were read.
        Exception: whatever ``read`` raises.
    """
    if processes == 1:
        yield from side_by_side(read, some)
        return
    most = 2 * SHARD_READERS * processes
    left = enumerate(some)
    sent: dict[int, Part] = {}
    found: dict[int, Verified] = {}
    with _Processes(read, processes) as members:
        for number in itertools.count():
            for at, part in itertools.islice(left, most - len(sent)):
                sent[at] = part
                members.send(at, part)
            if not sent:
                return
            while number not in found:
                found.update(members.receive())
            yield sent.pop(number), found.pop(number)


class _Member:
    """A process that reads shards, and this side of its pipe."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, read), daemon=True)
        self.under_way = 0
        resource_tracker.ensure_running()  # as its own start would let the signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # which the process inherits
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()


class _Processes(Generic[Verified]):
    """Processes that read shards; leaving the block ends them."""

    def __init__(self, read: Callable[[Any], Verified], number: int) -> None:
        self._read, self._number = read, number
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        try:
            for _ in range(self._number):
                self._members.append(_Member(self._read))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for member in self._members:
            member.process.kill()  # it writes nothing
        for member in self._members:
            member.process.join()
            member.connection.close()

    def send(self, number: int, part: object) -> None:
        """Let the process with the least to do read a shard."""
        member = min(self._members, key=lambda member: member.under_way)
        with self._blamed(member):
            member.connection.send((number, part))
        member.under_way += 1

    def receive(self) -> dict[int, Verified]:
        """Wait for results, by the numbers that were sent."""
        found: dict[int, Verified] = {}
        members = {id(member.connection): member for member in self._members}
        for connection in wait([member.connection for member in self._members]):
            member = members[id(connection)]
            with self._blamed(member):
                number, result, error = member.connection.recv()
            if error:
                raise error
            member.under_way -= 1
            found[number] = result
        return found

    @contextlib.contextmanager
    def _blamed(self, member: _Member) -> Iterator[None]:
        """Tell what became of a process whose pipe is closed."""
        try:
            yield
        except (EOFError, OSError) as error:
            member.process.join()
            code = member.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise VcfBatchError(
                f"one of {self._number} processes that read shards {how}, as happens where memory runs out. Nothing "
                "is known of the shards that were not read: rerun the command, or with fewer --processes"
            ) from error


def _serve(connection: Connection, read: Callable[[Any], Any]) -> None:
    """Read what comes through a pipe, in threads, until its other end is closed."""
    lock = threading.Lock()

    def answer(number: int, part: object) -> None:
        result, error = None, None
        try:
            result = read(part)
        except Exception as raised:
            error = raised
        # An answer that does not come is waited for without end.
        except BaseException as raised:
            error = VcfBatchError(f"{type(raised).__name__}: {raised}")
        try:
            answered = pickle.dumps((number, result, error))
            if error:
                pickle.loads(answered)  # some exceptions are written, and cannot be read
        except Exception as unsent:
            failed = VcfBatchError(f"cannot hand on what {str(part)[:80]} gave: {error or unsent}")
            answered = pickle.dumps((number, None, failed))
        with lock:
            connection.send_bytes(answered)

    threads = ThreadPoolExecutor(SHARD_READERS, "shards")
    with contextlib.suppress(EOFError, OSError):
        while True:
            threads.submit(answer, *connection.recv())
    os._exit(0)  # whatever is being read, nobody waits for it
