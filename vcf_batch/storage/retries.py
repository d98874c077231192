"""What goes wrong with storage and network: tried again where it may pass, else one set of errors on every storage.

Drivers name the same trouble in many ways. :func:`retried` runs one operation and gives its failure the name that
:mod:`vcf_batch.storage` promises, with credentials removed from the message.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vcf_batch.errors import StorageError, VcfBatchError, redact

ATTEMPTS = 6
"""How often an operation is tried in all while its failure may pass: enough where one call in five fails."""
PAUSE_SECONDS = 0.25
"""Before the second retried; three times as long before each further one."""
RETRY_SECONDS = 60.0
"""No new retried starts later than this after the first: some drivers wait minutes within one retried."""

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
# Drivers have error classes of their own; named here, so that no driver needs to be imported.
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

T = TypeVar("T")


class NotAFileError(OSError):
    """A directory, pipe, socket or device stands where a file was expected."""


Kinds = tuple[type[OSError], ...]
"""Errors that stay themselves because a caller of the operation can act on them."""

READING: Kinds = (FileNotFoundError, PermissionError, NotAFileError)
MOVING: Kinds = (FileNotFoundError,)


def retried(action: str, url: str, call: Callable[[], T], stay: Kinds = READING) -> T:
    """``call()``, again while its failure may pass; then the error that :mod:`vcf_batch.storage` promises for it.

    Args:
        action: what is done to ``url``, for the message: a verb.
        stay: errors that a caller of this operation can act on; all others become StorageErrors.
    """
    begin = time.monotonic()
    number = 0
    while True:
        number += 1
        try:
            return call()
        except Exception as error:
            cause = error
            # fsspec's web driver calls whatever goes wrong in looking a file up, timeouts too, a missing file.
            if url.startswith(_WEB) and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                cause = error.__cause__
            last = number == ATTEMPTS or time.monotonic() - begin > RETRY_SECONDS
            if last or not _may_pass(cause):
                told = translated(action, url, cause, number, stay)
                if told is error:
                    raise
                raise told from error
        time.sleep(PAUSE_SECONDS * 3 ** (number - 1) * (0.5 + _jitter.random()))


def _http_status(error: BaseException) -> int | None:
    """The status that the server answered with. A connection that broke has none, though aiohttp calls that 400."""
    if _classes(error) & _PASSING_CLASSES:
        return None
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for attribute in ("status", "status_code", "code"):
            if isinstance(status := getattr(candidate, attribute, None), int):
                return status
    return None


def _classes(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (VcfBatchError, *_MISTAKES)):
        return False
    return (
        isinstance(error, (TimeoutError, ConnectionError))
        or getattr(error, "errno", None) in _PASSING_ERRNO
        or _http_status(error) in _PASSING_HTTP
        or bool(_classes(error) & _PASSING_CLASSES)
    )


def translated(action: str, url: str, error: Exception, attempts: int, stay: Kinds) -> Exception:
    """The error that is promised for ``error``; ``error`` itself where it is a mistake of ours."""
    if isinstance(error, (VcfBatchError, *_MISTAKES)):
        return error
    where, status = redact(url), _http_status(error)
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
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    remedy = "credentials and permissions" if refused else "that the storage is reachable, exists and has room"
    return StorageError(f"cannot {action} {where}{tried}: {reason}. Check {remedy}.")


def _is_absent(url: str, error: Exception, status: int | None) -> bool:
    if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in _NO_SUCH_FILE:
        return True
    if "embedded null" in str(error) or _classes(error) & _ABSENT_CLASSES:
        return True
    # A web server that answers with 4xx has nothing at that address, whatever it calls that.
    refusals = range(400, 500) if url.startswith(_WEB) else (404, 410)
    return status in refusals and status not in _PASSING_HTTP
