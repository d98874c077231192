"""One run owns an output: a lease and a heartbeat, kept in the output itself.

``_lease.json`` names the owner. If several drivers start at once, only one can create the file. It is never
overwritten, and its owner deletes it at the end. Until then the owner writes a rising number, the heartbeat, into
``_lease.beat``. A driver that finds a lease watches the heartbeat: while it changes, the owner is alive. If it stays
the same for :data:`EXPIRY_SECONDS`, the watcher takes the lease over. It does so at once if the owner was a process of
this machine and has ended. The watcher measures time with its own clock only; it never compares clocks of two machines.

An owner may be suspended and wake up after another driver took over, so it checks its lease before each commit
(:meth:`Lease.confirm`). It may even be suspended between this check and the commit. By then the new owner has emptied
the staging folder, so no file is left to move, and an existing receipt is never overwritten. On object stores two gaps
of one request remain; :func:`vcf_batch.output.commits.commit` and :func:`vcf_batch.output.commits.clean` describe them.
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

LEASE_NAME = "_lease.json"
HEARTBEAT = "_lease.beat"
HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 28.0
"""Seconds without a new heartbeat after which an owner counts as dead. A living owner's heartbeat may be late because a
request to an object store hangs for 20 seconds before it is given up and sent once more."""
WAIT_SECONDS = 30.0
"""Seconds that a driver waits for a living owner to end before it gives up."""
WATCH_SECONDS = 2 * HEARTBEAT_SECONDS
"""Seconds that a read-only command (plan, status) watches an owner when file dates do not show whether it is alive."""
LOOK_SECONDS = 0.5
RELEASE_PAUSES = (1.0, 4.0)
"""Seconds before each further try to delete a lease whose storage fails."""
MAX_LEASE_BYTES = 1 << 16

_log = logging.getLogger(__name__)


class Lease:
    """The right to commit to an output, as long as :meth:`confirm` does not raise. :func:`hold` makes it."""

    def __init__(self, output: str) -> None:
        self.token = uuid.uuid4().hex
        """Unique name of this lease."""
        self.lost: RefusedError | None = None
        """The error to raise after another driver took over; None while no takeover is known."""
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
            RefusedError: another driver took over; this run must not commit anything more.
            StorageError: the storage failed.
        """
        found = self._read()
        if _parsed(found).get("token") != self.token:
            cause = (
                f"after {EXPIRY_SECONDS:g} seconds without a heartbeat, as when a process is suspended, "
                f"{_described(found)} took over"
                if found is not None
                else f"its {LEASE_NAME} is gone. Another run took over and has ended, or somebody deleted the file"
            )
            self.lost = RefusedError(f"this run no longer owns {self._output}: {cause}. Finished shards are kept.")
            raise self.lost

    def acquire(self) -> None:
        """Become the owner.

        Raises:
            RefusedError: another living run owns the output.
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
            seen, now = (found, self._read(HEARTBEAT)), time.monotonic()
            if watched is None:
                _log.warning("%s is held by %s.", redact(self._output), _described(found))
            if seen != watched:
                watched, changed = seen, now
            if _is_gone(_parsed(found)) or now - changed >= EXPIRY_SECONDS:
                if self._delete(found):
                    _log.warning("That run has died; taking over.")
            elif now - begin >= WAIT_SECONDS:
                raise RefusedError(
                    f"{self._output} is held by another run, which is alive: {_described(found)}. "
                    "Wait until it has ended, or stop it, and rerun this command; or use another output."
                )
            else:
                time.sleep(LOOK_SECONDS)

    def keep(self) -> None:
        """Write heartbeats until the lease is released or lost."""
        for heartbeat in itertools.count():
            if self._ended.wait(HEARTBEAT_SECONDS):
                return
            try:
                self.confirm()
                storage.publish_bytes(_url(self._output, HEARTBEAT), str(heartbeat).encode())
            except RefusedError:
                return
            except StorageError:
                # Commits fail for the same reason and report it. The next heartbeat is a new try.
                continue

    def release(self, keeper: threading.Thread) -> None:
        """Delete the lease, so that the next driver can begin at once.

        If the storage fails, this is tried again after each of :data:`RELEASE_PAUSES`. Then the lease stays and
        expires, and the log says so.
        """
        self._ended.set()
        for pause in (*RELEASE_PAUSES, None):
            try:
                found = self._read()
                if found is not None and _parsed(found).get("token") == self.token:  # It may be the next owner's.
                    self._delete(found)
            except StorageError as error:
                if pause is not None:
                    time.sleep(pause)
                    continue
                _log.warning(
                    "%s could not be deleted: %s. It expires after %g seconds.",
                    redact(_url(self._output)),
                    error,
                    EXPIRY_SECONDS,
                )
            break
        keeper.join(HEARTBEAT_SECONDS)
        with contextlib.suppress(StorageError):
            # This may delete the next owner's heartbeat, which does no harm: it is soon written again.
            storage.remove(_url(self._output, HEARTBEAT), missing_ok=True)

    def _delete(self, found: bytes) -> bool:
        """Delete a lease that was found; False if another one is there meanwhile, which stays.

        On S3 the lease that was looked at is deleted, and no other (``If-Match``). A local one is moved away before it
        is compared, and put back where it is another: an owner that looks for its lease in that moment takes it for
        lost. On other storages one request lies between look and deletion.
        """
        url, aside = _url(self._output), _url(self._output, f".tmp-{self.token}")
        with storage.refusals_as_storage_errors():
            try:
                version = storage.version(url)
                if self._read() != found:
                    return False
                if not storage.is_local(url):
                    storage.remove(url, missing_ok=True, version=version)
                    return True
                storage.move(url, aside)
            except (FileNotFoundError, FileExistsError):
                return False
            try:
                moved = storage.read_bytes(aside)
            except FileNotFoundError:
                return False  # The next owner has deleted it with what killed writers leave.
            if moved != found:
                with contextlib.suppress(FileExistsError):
                    storage.publish_bytes(url, moved, create=True)
            storage.remove(aside, missing_ok=True)
            return moved == found

    def _read(self, name: str = LEASE_NAME) -> bytes | None:
        with storage.refusals_as_storage_errors():
            return _read(self._output, name)


@contextlib.contextmanager
def hold(output: str) -> Iterator[Lease]:
    """Own an output while the block runs. Waits until another owner has ended or its lease has expired.

    Raises:
        RefusedError: another living run owns the output.
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
    """The owner of an output, as anyone who can read the output sees it."""

    host: str
    pid: int
    started: str
    """ISO date."""
    silent: float | None
    """Seconds since the last heartbeat, by the clocks of the storage and of this machine. None if the storage keeps no
    dates."""
    alive: bool


def owner(output: str) -> Owner | None:
    """The owner of an output; None if it has none. Writes nothing.

    If the clocks do not show whether the owner is alive, its heartbeat is watched for :data:`WATCH_SECONDS`.

    Raises:
        StorageError: the storage failed.
    """
    with storage.refusals_as_storage_errors():
        found = _read(output)
        if found is None:
            return None
        dates = [_modified(output, name) for name in (LEASE_NAME, HEARTBEAT)]
        known = _parsed(found)
        silent = min((time.time() - date for date in dates if date is not None), default=None)
        lives = silent is not None and abs(silent) < EXPIRY_SECONDS
        alive = not _is_gone(known) and (lives or _heartbeat_changes(output))
    return Owner(str(known.get("host")), known.get("pid", 0), str(known.get("started")), silent, alive)


def is_seen(output: str, token: str) -> bool:
    """Whether this machine can read the lease named ``token``, which proves that it uses the owner's storage.

    Raises:
        PermissionError, StorageError: the storage cannot be read.
    """
    return _parsed(_read(output)).get("token") == token


def _url(output: str, name: str = LEASE_NAME) -> str:
    return storage.join(output, name)


def _read(output: str, name: str = LEASE_NAME) -> bytes | None:
    try:
        return storage.read_bytes(_url(output, name), limit=MAX_LEASE_BYTES)
    except FileNotFoundError:
        return None


def _modified(output: str, name: str) -> float | None:
    try:
        return storage.modified(_url(output, name))
    except FileNotFoundError:
        return None


def _heartbeat_changes(output: str) -> bool:
    """Whether the heartbeat changes within :data:`WATCH_SECONDS`."""
    first, deadline = _read(output, HEARTBEAT), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        if _read(output, HEARTBEAT) != first:
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _parsed(lease: bytes | None) -> dict[str, Any]:
    """The content of a lease; empty if there is no lease or the file is not a lease."""
    try:
        record = json.loads(lease or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _described(lease: bytes) -> str:
    owner = _parsed(lease)
    return f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')}"


def _machine() -> str | None:
    """Name of this boot of the kernel and this container, in which process numbers are unique; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _birth(pid: int) -> str | None:
    """Start time of a living process in clock ticks; None if it is dead. A later process of the same number differs."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner has certainly ended. Only an owner on this machine can be checked."""
    machine, pid = _machine(), owner.get("pid")
    if machine is None or machine != owner.get("machine") or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
        return _birth(pid) != owner.get("birth")
    except ProcessLookupError:
        return True
    except OSError:  # The process is alive and belongs to another user.
        return False
