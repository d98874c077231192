"""Files on web servers: addresses as browsers read them, and answers that are whole, in bounded time and size."""

import http.client
import io
import re
import socket
import string
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from typing import IO, Any

import idna

from vcf_batch import __version__
from vcf_batch.errors import RowError, StorageError, redact_name

WEB_TRIES = 3
WEB_PAUSE_SECONDS = 1.0
WEB_TIMEOUT_SECONDS = 20.0
"""Longest wait for a web server's next bytes."""
WEB_TOTAL_SECONDS = 120.0
"""Longest time for one file, all tries together: a server that sends single bytes cannot hold up a worker."""

WEB_PORTS = {"http": 80, "https": 443}
_BUSY = frozenset({408, 425, 429})
"""HTTP statuses that are retried, like all statuses from 500 on."""
_PATH = "".join(sorted(set(string.punctuation) - set('"<>`{}^')))
_QUERY = "".join(sorted(set(string.punctuation) - set("\"<>'")))
"""What browsers send as it is in a path and in a query, beside letters and digits."""
_HOST = re.compile(r"(?=.{1,253}$)[^.\s/?#@:\[\]\\%]{1,63}(\.[^.\s/?#@:\[\]\\%]{1,63})*\.?")
_GZIP, _GZIP_START = ("gzip", "x-gzip"), b"\x1f\x8b"


def fetch(url: str, limit: int, shown: str, refused: Callable[[str], bool]) -> bytes:
    """The file at a web address, or its first ``limit + 1`` bytes; retried if the server or the network fails.

    Args:
        url: the address, as :func:`parse` gives it.
        limit: largest number of bytes that the caller takes.
        shown: the file as messages name it, such as ``reference 'https://...'``.
        refused: whether files may not come from the address that a server redirects to.

    Raises:
        FileNotFoundError: the server has no such file.
        RowError: the server refuses, redirects to where no file may come from, or sends what cannot be unpacked.
        StorageError: the server or the network failed in every try.
    """
    deadline = time.monotonic() + WEB_TOTAL_SECONDS
    opener = urllib.request.build_opener(_Redirects(refused, shown), _Web(deadline))
    request = urllib.request.Request(_quoted(url), headers={"User-Agent": f"vcf-batch/{__version__}"})
    for number in range(1, WEB_TRIES + 1):
        try:
            with opener.open(request, timeout=WEB_TIMEOUT_SECONDS) as response:
                return _unpacked(_read_all(response, limit), response.headers.get("Content-Encoding", ""), limit, shown)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(shown) from error
            if error.code not in _BUSY and error.code < 500:
                raise RowError(f"{shown}: the web server answers {error.code}, not 200") from error
            trouble = f"the web server answers {error.code}"
        except (http.client.InvalidURL, ValueError) as error:
            # A server may redirect to something that is no address at all.
            raise RowError(f"{shown} is not, or leads to, a usable web address: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            trouble = f"{type(error).__name__}: {error}"
        if number == WEB_TRIES or time.monotonic() > deadline:
            break
        time.sleep(WEB_PAUSE_SECONDS * 2 ** (number - 1))
    raise StorageError(f"cannot read {shown} after {number} tries: {trouble}")


def parse(url: str) -> tuple[str, tuple[str, ...], str]:
    """Server and port, segments of the path, and the address with the server's name as it is looked up.

    Raises:
        ValueError: ``url`` is no address, or two programs could read it differently.
    """
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"{parts.scheme}:// needs a server name")
    if "@" in parts.netloc:
        raise ValueError("user names and passwords in web addresses are not used, because outputs repeat the address")
    # Servers resolve such segments differently: one that could lead out of a root is refused in every spelling.
    path = urllib.parse.unquote(parts.path)
    segments = [part for part in path.split("/") if part]
    if "\\" in parts.netloc + path or any(part.partition(";")[0] in (".", "..") for part in segments):
        raise ValueError("'.', '..' and backslashes are not allowed in web addresses")
    name, netloc = parts.hostname, parts.netloc
    if (not netloc.isascii() or "%" in netloc) and not netloc.startswith("["):
        name = _ascii_host(urllib.parse.unquote(name, errors="strict"))
        netloc = name if parts.port is None else f"{name}:{parts.port}"
    host = f"{name}:{WEB_PORTS[parts.scheme] if parts.port is None else parts.port}"
    address = urllib.parse.urlunsplit(parts._replace(netloc=netloc, fragment=""))
    return host, tuple(segments), address


def _ascii_host(name: str) -> str:
    """The name of a server as it is looked up: other letters are encoded as browsers do it, by UTS 46 and IDNA 2008.

    Raises:
        ValueError: the name is none.
    """
    labels = idna.uts46_remap(name, std3_rules=False).split(".")
    host = ".".join(label if label.isascii() else idna.alabel(label).decode() for label in labels)
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} is not the name of a server")
    return host


def _quoted(url: str) -> str:
    """A web address as it is sent: what browsers encode in a path and in a query is encoded, and nothing twice."""
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.quote(parts.path, safe=_PATH)
    return urllib.parse.urlunsplit(parts._replace(path=path, query=urllib.parse.quote(parts.query, safe=_QUERY)))


def _unpacked(data: bytes, encoding: str, limit: int, shown: str) -> bytes:
    """The body of a web server's answer. Some send gzip, although they are asked not to.

    Raises:
        RowError: the body is packed in another way, or damaged.
    """
    packing = encoding.strip().lower()
    if packing in ("", "identity") or (packing in _GZIP and not data.startswith(_GZIP_START)):
        return data  # some servers say so of files that are not packed
    if packing not in _GZIP:
        raise RowError(
            f"{shown} cannot be read because the web server sends it with the Content-Encoding "
            f"{encoding[:40]!r}; let it send the file as it is"
        )
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        unpacked = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise RowError(f"{shown}: the web server sends a damaged gzip stream ({error})") from error
    if not stream.eof and len(unpacked) <= limit:
        raise RowError(f"{shown}: the web server sends a gzip stream that is cut off")
    return unpacked


def _read_all(response: http.client.HTTPResponse, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while size <= limit and (chunk := response.read1(min(1 << 20, limit + 1 - size))):
        chunks.append(chunk)
        size += len(chunk)
    # read1 raises nothing when a connection breaks. Missing bytes are the network's fault, not the row's.
    if size <= limit and response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(chunks)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """HTTP handler that follows redirects only to places with allowed references."""

    def __init__(self, refused: Callable[[str], bool], shown: str) -> None:
        self._refused = refused
        self._shown = shown

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if self._refused(newurl):
            raise RowError(f"{self._shown} redirects to {redact_name(newurl)[:200]!r}, where none may come from")
        return super().redirect_request(req, fp, code, msg, headers, _quoted(parse(newurl)[2]))


class _UntilDeadline(io.RawIOBase):
    """A connection that is read until a deadline at most: a server may send even headers byte by byte."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._raw = connection.makefile("rb", buffering=0)
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not complete after {WEB_TOTAL_SECONDS:g} s")
        self._connection.settimeout(min(left, WEB_TIMEOUT_SECONDS))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Web(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """HTTP handler for answers that must be complete at ``deadline``."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> http.client.HTTPResponse:
        def answer(connection: socket.socket, **said: Any) -> http.client.HTTPResponse:
            response = http.client.HTTPResponse(connection, **said)
            response.fp.close()
            response.fp = io.BufferedReader(_UntilDeadline(connection, self._deadline))
            return response

        def connect(host: str, **options: Any) -> http.client.HTTPConnection:
            connection = http_class(host, **options)
            connection.response_class = answer
            return connection

        return super().do_open(connect, req, **options)
