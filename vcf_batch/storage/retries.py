"""Retries of failed requests, and one set of errors for every storage.

Drivers report the same failure in many ways. :func:`retried` repeats a request while its failure may pass, and then
raises the error that :mod:`vcf_batch.storage` lists for it, with credentials removed from the message.
"""

import errno
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vcf_batch.errors import StorageError, VcfBatchError, redact
from vcf_batch.storage import room
from vcf_batch.storage.paths import as_local_path, is_local

TRIES = 6
"""Most tries of one request, the first included: enough if one call in five fails."""
PAUSE_SECONDS = 0.25
"""Pause before the second try; each further pause is three times as long."""
RETRY_SECONDS = 60.0
"""Time since the first try after which no other one starts, because some drivers wait for minutes within one try."""

_WEB = ("http://", "https://")

_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_PASSING_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETUNREACH,
    errno.ENOTEMPTY,
    errno.EREMOTEIO,
    errno.ESTALE,
}
_PASSING_HTTP = {408, 409, 425, 429, 500, 502, 503, 504}
# Error classes of the drivers, by name, so that no driver needs to be imported.
_PASSING_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseStreamingError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
}
_ABSENT_CLASSES = {"InvalidURL", "TooManyRedirects"}
_REFUSED_CLASSES = {"NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError"}
_MISTAKES = (TypeError, AttributeError, LookupError, AssertionError, NotImplementedError, MemoryError)

_jitter = random.Random()

Result = TypeVar("Result")


class NotAFileError(OSError):
    """A directory, pipe, socket or device stands where a file was expected."""


Kinds = tuple[type[OSError], ...]
"""Types of error that do not become a StorageError, because the caller can act on them."""

READING: Kinds = (FileNotFoundError, PermissionError, NotAFileError)
MOVING: Kinds = (FileNotFoundError,)


def retried(
    action: str, url: str, call: Callable[[], Result], stay: Kinds = READING, needed: int | None = None
) -> Result:
    """Run ``call``, repeat it while its failure may pass, then raise the error listed in :mod:`vcf_batch.storage`.

    Args:
        action: verb for the message, such as ``read``.
        url: the file or folder, for the message.
        call: the request; called without arguments.
        stay: types of error that the caller can act on; all others become a StorageError.
        needed: number of bytes that are written; None if it is not known.
    """
    begin = time.monotonic()
    number = 0
    while True:
        number += 1
        try:
            return call()
        except Exception as error:
            cause = error
            # fsspec's web driver reports any failure to look a file up, timeouts included, as a missing file.
            if url.startswith(_WEB) and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                cause = error.__cause__
            pause = PAUSE_SECONDS * 3 ** (number - 1) * (0.5 + _jitter.random())
            last = number == TRIES or time.monotonic() - begin + pause > RETRY_SECONDS
            if last or not may_pass(cause):
                told = translated(action, url, cause, number, stay, needed)
                if told is error:
                    raise
                raise told from error
        time.sleep(pause)


def http_status(error: BaseException) -> int | None:
    """The HTTP status of the server's answer. A broken connection has none, although aiohttp reports status 400."""
    if _classes(error) & _PASSING_CLASSES:
        return None
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder in (candidate, response):  # the client of Hugging Face has it in the response alone
            for attribute in ("status", "status_code", "code"):
                if isinstance(status := getattr(holder, attribute, None), int):
                    return status
    return None


def _classes(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def may_pass(error: Exception) -> bool:
    """Whether a request that failed so is worth another try."""
    if isinstance(error, (VcfBatchError, *_MISTAKES)):
        return False
    return (
        isinstance(error, (TimeoutError, ConnectionError))
        or getattr(error, "errno", None) in _PASSING_ERRNO
        or http_status(error) in _PASSING_HTTP
        or bool(_classes(error) & _PASSING_CLASSES)
    )


def translated(
    action: str, url: str, error: Exception, tries: int, stay: Kinds, needed: int | None = None
) -> Exception:
    """The error that :mod:`vcf_batch.storage` lists for ``error``; ``error`` itself if it is a mistake in the code."""
    if isinstance(error, (VcfBatchError, *_MISTAKES)):
        return error
    where, status = redact(url), http_status(error)
    reason = redact(f"{type(error).__name__}: {error}")
    refused = isinstance(error, PermissionError) or status in (401, 403) or bool(_classes(error) & _REFUSED_CLASSES)
    known: OSError | None = None
    if isinstance(error, FileExistsError) or status == 412:
        known = FileExistsError(errno.EEXIST, "the file is there already", where)
    elif refused:
        known = PermissionError(errno.EACCES, f"refused ({reason}); check credentials and permissions", where)
    elif isinstance(error, (NotAFileError, IsADirectoryError)) or getattr(error, "errno", None) == errno.ENXIO:
        known = NotAFileError(errno.EISDIR, "not a regular file", where)
    elif _is_absent(url, error, status):
        known = FileNotFoundError(errno.ENOENT, f"no such file (HTTP {status})" if status else "no such file", where)
    if isinstance(known, stay):
        return known
    if is_local(url) and room.is_full(error):
        state = room.told(os.path.dirname(as_local_path(url)), needed)
        return StorageError(f"cannot {action} {where}: {state}. Make room there, or name a folder on a larger disk.")
    tried = f" after {tries} tries" if tries > 1 else ""
    remedy = "credentials and permissions" if refused else "that the storage is reachable, exists and has room"
    return StorageError(f"cannot {action} {where}{tried}: {reason}. Check {remedy}.")


def _is_absent(url: str, error: Exception, status: int | None) -> bool:
    if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in _NO_SUCH_FILE:
        return True
    if "embedded null" in str(error) or _classes(error) & _ABSENT_CLASSES:
        return True
    # The other 4xx answers of a web server mean that it has no file at that address.
    refusals = range(400, 500) if url.startswith(_WEB) else (404, 410)
    return status in refusals and status not in _PASSING_HTTP
