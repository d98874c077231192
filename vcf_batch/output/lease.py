"""One run owns an output: a lease and a heartbeat, kept in the output itself.

``_lease.json`` names the owner. Of several drivers that come at once, one can create it; it is never overwritten, and
its owner deletes it at the end. Meanwhile the owner counts in ``_lease.beat``. Whoever finds a lease watches: while the
beat changes, the owner lives. If it stays the same for :data:`EXPIRY_SECONDS`, the lease is taken over; at once where
its owner was a process of this machine that is gone. Only changes that the watcher sees within its own time count;
clocks of different machines are never compared.

An owner may be suspended and wake up after another driver took over, so it asks before each commit
(:meth:`Lease.confirm`). Should it be suspended between that question and the commit, then the new owner has emptied the
staging folder and there is nothing left to move, and a receipt is created, never overwritten. Where a shard is replaced
on an object store, a few requests remain in which that is not enough (:func:`vcf_batch.output.commits.commit`).
"""

import contextlib
import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vcf_batch import storage
from vcf_batch.errors import RefusedError, StorageError, redact

NAME = "_lease.json"
BEAT = "_lease.beat"
BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 28.0
"""A beat that stays the same for so long is a dead owner's. A living one's may be late by a request to an object store
that hangs until it is given up after 20 seconds, and sent once more."""
WAIT_SECONDS = 30.0
"""How long a driver watches a living owner, which may be about to end, before it gives up."""
WATCH_SECONDS = 2 * BEAT_SECONDS
"""How long a read-only command (plan, status) watches an owner when timestamps do not show whether it is alive."""
LOOK_SECONDS = 0.5
MAX_BYTES = 1 << 16

_log = logging.getLogger(__name__)


class Lease:
    """The right to commit to an output, while :meth:`confirm` says so. Made by :func:`hold`."""

    def __init__(self, output: str) -> None:
        self.token = uuid.uuid4().hex
        """Names this lease and no other."""
        self.lost: RefusedError | None = None
        """What to raise, once it is known that another driver took over."""
        self._output = output
        self._owner = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": (machine := _machine()),
            "birth": _birth(os.getpid()) if machine else None,
        }
        self._ended = threading.Event()

    def confirm(self) -> None:
        """Ask the storage whether this run still owns the output.

        Raises:
            RefusedError: another driver took over; nothing may be committed any more.
            StorageError: the storage failed.
        """
        found = self._read()
        if _parsed(found).get("token") != self.token:
            self.lost = RefusedError(
                f"this run no longer owns {self._output}: after {EXPIRY_SECONDS:g} seconds without a "
                f"sign of life, as of a suspended process, {_described(found)} took over. What was finished is kept."
            )
            raise self.lost

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            RefusedError: another run owns the output, and is alive.
            StorageError: the storage failed.
        """
        begin = changed = time.monotonic()
        watched: tuple[bytes, bytes | None] | None = None
        while True:
            found = self._read()
            if found is None:
                with contextlib.suppress(FileExistsError):
                    storage.publish_bytes(_url(self._output), json.dumps(self._owner, indent=2).encode(), create=True)
                    return
                continue
            seen, now = (found, self._read(BEAT)), time.monotonic()
            if watched is None:
                _log.warning("%s is held by %s.", redact(self._output), _described(found))
            if seen != watched:
                watched, changed = seen, now
            if _is_gone(_parsed(found)) or now - changed >= EXPIRY_SECONDS:
                if self._read() == found:  # else another watcher was faster, and this is its lease
                    _log.warning("That run has died; taking over.")
                    storage.remove(_url(self._output), missing_ok=True)
            elif now - begin >= WAIT_SECONDS:
                raise RefusedError(
                    f"{self._output} is held by another run, which is alive: {_described(found)}. "
                    "Wait until it has ended, or stop it, and rerun this command; or use another output."
                )
            else:
                time.sleep(LOOK_SECONDS)

    def keep(self) -> None:
        """Give signs of life until the lease is released or lost."""
        for beat in itertools.count():
            if self._ended.wait(BEAT_SECONDS):
                return
            try:
                self.confirm()
                storage.publish_bytes(_url(self._output, BEAT), str(beat).encode())
            except RefusedError:
                return
            except StorageError:
                # Commits have the same trouble, and say so; the next beat tries again.
                continue

    def release(self, keeper: threading.Thread) -> None:
        """Let the next driver begin at once. If the storage does not allow it, the lease expires."""
        self._ended.set()
        with contextlib.suppress(RefusedError, StorageError):
            self.confirm()
            storage.remove(_url(self._output), missing_ok=True)
        keeper.join(BEAT_SECONDS)
        with contextlib.suppress(StorageError):
            storage.remove(_url(self._output, BEAT), missing_ok=True)  # the next owner's, even: it beats again

    def _read(self, name: str = NAME) -> bytes | None:
        with storage.refusals_as_storage_errors():
            return _read(self._output, name)


@contextlib.contextmanager
def hold(output: str) -> Iterator[Lease]:
    """Own an output for as long as the block lasts. Waits for another owner to end or to expire.

    Raises:
        RefusedError: another run owns the output, and is alive.
        StorageError: the storage failed.
    """
    lease = Lease(output)
    lease.acquire()
    keeper = threading.Thread(target=lease.keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease.release(keeper)


@dataclass(frozen=True)
class Owner:
    """Who holds an output, as anybody can tell who sees it."""

    host: str
    pid: int
    started: str
    """ISO date."""
    silent: float | None
    """Seconds since the last sign of life, by the clocks of the storage and of this machine; None where the storage
    keeps no dates."""
    alive: bool


def owner(output: str) -> Owner | None:
    """Who holds an output; None if nobody does. Writes nothing.

    Where the clocks leave a doubt whether the owner lives, its beat is watched for :data:`WATCH_SECONDS`.

    Raises:
        StorageError: the storage failed.
    """
    with storage.refusals_as_storage_errors():
        found = _read(output)
        if found is None:
            return None
        dates = [_modified(output, name) for name in (NAME, BEAT)]
        known = _parsed(found)
        silent = min((time.time() - date for date in dates if date is not None), default=None)
        lives = silent is not None and abs(silent) < EXPIRY_SECONDS
        alive = not _is_gone(known) and (lives or _beats(output))
    return Owner(str(known.get("host")), known.get("pid", 0), str(known.get("started")), silent, alive)


def is_seen(output: str, token: str) -> bool:
    """Whether this machine sees a lease: the proof that it sees the storage that the owner sees.

    Raises:
        PermissionError, StorageError: the storage cannot be asked.
    """
    return _parsed(_read(output)).get("token") == token


def _url(output: str, name: str = NAME) -> str:
    return storage.join(output, name)


def _read(output: str, name: str = NAME) -> bytes | None:
    try:
        return storage.read_bytes(_url(output, name), limit=MAX_BYTES)
    except FileNotFoundError:
        return None


def _modified(output: str, name: str) -> float | None:
    try:
        return storage.modified(_url(output, name))
    except FileNotFoundError:
        return None


def _beats(output: str) -> bool:
    """Whether the owner gives a sign of life while it is watched."""
    first, deadline = _read(output, BEAT), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        if _read(output, BEAT) != first:
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _parsed(lease: bytes | None) -> dict[str, Any]:
    """What a lease says; nothing where there is none, or what is there is no lease."""
    try:
        record = json.loads(lease or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _described(lease: bytes | None) -> str:
    if lease is None:
        return "another run, which has ended,"
    owner = _parsed(lease)
    return f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')}"


def _machine() -> str | None:
    """What process numbers count on: this boot of the kernel, this container. None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _birth(pid: int) -> str | None:
    """When a living process began, in ticks of this machine; None if it is dead. Tells it from a later namesake."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner provably runs no more: it was a process of this very machine."""
    machine, pid = _machine(), owner.get("pid")
    if machine is None or machine != owner.get("machine") or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
        return _birth(pid) != owner.get("birth")
    except ProcessLookupError:
        return True
    except OSError:  # alive, and another user's
        return False
