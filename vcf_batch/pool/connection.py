"""The Ray cluster that a run uses: one that is there, or a new local one."""

import contextlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator

import ray
from ray.exceptions import AuthenticationError

from vcf_batch.driver.progress import awaiting
from vcf_batch.errors import UsageError, VcfBatchError, redact

_log = logging.getLogger(__name__)

STARTS = 2
"""Most starts of a local cluster, if Ray's own processes are not up within the 30 seconds that it gives them."""

MAX_TMPDIR_BYTES = 39
"""Longest TMPDIR below which the names of Ray's sockets, 68 bytes more, keep Linux's limit of 107."""

LEAST_BYTES = 100 << 20
"""Room in Ray's folder below which a start that fails is told with it."""

HEAD_SECONDS = 30.0
"""Seconds in which the head of a cluster has to answer: it may just be starting."""

HEAD_PAUSE_SECONDS = 1.0
"""Seconds between two attempts to reach it."""

MAX_PORT = 65_535
"""Largest port of TCP."""

_HOST_AND_PORT = re.compile(r"(?P<host>\[[\da-fA-F:.]+\]|[\w.-]+):(?P<port>\d{1,5})")

_TIMED_OUT = "timed out during startup"
"""Ray's words for that, in an exception without a class of its own."""

_TOKEN = (
    "A cluster with token authentication needs RAY_AUTH_MODE=token, and the cluster's token in the file that "
    "RAY_AUTH_TOKEN_PATH names (by default ~/.ray/auth_token)"
)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep Ray from taking SIGTERM while it starts: what its handler raises may be swallowed in a hook of a fork."""
    take = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = take


def _full_disk() -> str:
    """What is told if Ray's folder has hardly any room; else empty."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    with contextlib.suppress(OSError):
        if (free := shutil.disk_usage(folder).free) < LEAST_BYTES:
            return f". {folder}, where Ray keeps its files, has {free:,} bytes free: name another folder in RAY_TMPDIR"
    return ""


@contextlib.contextmanager
def _no_word_of_tokens() -> Iterator[None]:
    """Leave out Ray's warning that a new cluster has a token, which asks for nothing, and is no line of JSON."""

    def is_of_use(record: logging.LogRecord) -> bool:
        return "Token authentication is enabled for this Ray cluster" not in record.getMessage()

    log = logging.getLogger("ray._private.authentication.authentication_token_setup")
    log.addFilter(is_of_use)
    try:
        yield
    finally:
        log.removeFilter(is_of_use)


def _use_short_folder() -> None:
    """Let Ray keep its files in ``/tmp`` where it cannot use ``TMPDIR``: it takes short ASCII names only."""
    folder = os.environ.get("TMPDIR", "")
    if "RAY_TMPDIR" in os.environ or (folder.isascii() and len(folder) <= MAX_TMPDIR_BYTES):
        return
    _log.warning(
        "Ray keeps its own files in /tmp, because TMPDIR, %s, is not ASCII or longer than %d bytes. RAY_TMPDIR names "
        "another folder.",
        folder,
        MAX_TMPDIR_BYTES,
    )
    os.environ["RAY_TMPDIR"] = "/tmp"


def _await_head(address: str | None) -> None:
    """Wait until something takes connections at the address of a cluster's head.

    Ray itself would wait for minutes without a word. An address of another form, such as ``ray://HOST:PORT``, is left
    to Ray.

    Raises:
        UsageError: nothing did within :data:`HEAD_SECONDS`, or it is no address.
    """
    place = address or os.environ.get("RAY_ADDRESS", "")
    if not (match := _HOST_AND_PORT.fullmatch(place)):
        return
    host, port = match["host"].strip("[]"), int(match["port"])
    remedy = "Give the address of a head that runs to --address or RAY_ADDRESS, or start one with 'ray start --head'"
    if port > MAX_PORT:
        raise UsageError(f"no Ray cluster can be at {redact(place)}: ports end at {MAX_PORT}. {remedy}")
    end = time.monotonic() + HEAD_SECONDS
    while True:
        try:
            left = max(end - time.monotonic(), HEAD_PAUSE_SECONDS)
            socket.create_connection((host, port), timeout=left).close()
            return
        except UnicodeError as error:
            raise UsageError(f"no Ray cluster can be at {redact(place)}: {error}. {remedy}") from error
        except OSError as error:
            if time.monotonic() >= end:
                raise UsageError(
                    f"no Ray cluster answers at {redact(place)} within {HEAD_SECONDS:g} seconds: {error}. {remedy}"
                ) from error
        time.sleep(HEAD_PAUSE_SECONDS)


def _told(address: str | None) -> str:
    """What is about to happen, in words."""
    if address == "local":
        return "starting Ray on this machine"
    if place := address or os.environ.get("RAY_ADDRESS"):
        return f"joining the Ray cluster {redact(place)}"
    return "joining the Ray cluster of this machine, or starting one"


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray: to ``address``, else to the cluster this process runs in, else to a new local one.

    Raises:
        UsageError: no cluster answers at the address, it refuses the token, or Ray refuses to start.
        VcfBatchError: Ray did not come up on this machine, :data:`STARTS` times.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _use_short_folder()
    with awaiting(_told(address)):
        _connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    """Connect to Ray, and start it where none is: see :func:`cluster`."""
    _await_head(address)
    refused = f"cannot use the Ray cluster {redact(address) if address else '(RAY_ADDRESS or a new local one)'}"
    for number in range(1, STARTS + 1):
        try:
            with _own_sigterm(), _no_word_of_tokens():
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
            return
        except AuthenticationError as error:
            raise UsageError(f"{refused}: {error.message.rstrip('.')}. {_TOKEN}") from error
        except ConnectionError as error:  # Ray writes to standard error alone that a token was missing or wrong.
            raise UsageError(f"{refused}: {error}. {_TOKEN}") from error
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"{refused}: {error}{_full_disk()}") from error
        except OSError as error:
            raise UsageError(
                f"Ray cannot start on this machine: {error}. It keeps its token below HOME and its other files below "
                "RAY_TMPDIR, TMPDIR or /tmp: make both writable, or give it a token in RAY_AUTH_TOKEN"
            ) from error
        except Exception as error:
            if _TIMED_OUT not in str(error):
                raise
            ray.shutdown()
            if number == STARTS:
                raise VcfBatchError(
                    f"Ray did not start on this machine, {STARTS} times, within the 30 seconds that it allows. The "
                    "machine is busy or short of memory: try again when it is idle, or name a running cluster with "
                    "--address"
                ) from error
            _log.warning("Ray did not start within 30 seconds, as happens on a busy machine. It is started once more.")
