"""Reference images of rows: permission to read them, reading and decoding.

A manifest may come from anyone, so references are opened only in places that the user allowed: under the manifest's own
folder (in object storage: its own bucket) and under the roots named with ``--reference-root``. Places are compared
after ``..`` and local links are resolved, and the resolved path is the one that is opened, folder by folder from its
root on and without following a link, because links may have been changed since.
"""

import errno
import hashlib
import http.client
import io
import os
import re
import socket
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from PIL import Image

from vcf_batch import __version__, images, storage
from vcf_batch.errors import RowError, StorageError, UsageError, redact
from vcf_batch.records import Reference

MAX_REFERENCE_BYTES = 256 * 2**20
"""Largest file that is read. An uncompressed image at the default limit of 64 million pixels has 192 MB."""

WEB_TRIES = 3
WEB_PAUSE_SECONDS = 1.0
WEB_TIMEOUT_SECONDS = 20.0
"""Longest wait for a web server's next bytes."""
WEB_TOTAL_SECONDS = 120.0
"""Longest time for one file, all tries together: a server that sends single bytes cannot hold up a worker."""

_BUCKET_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"})
_LONGEST_KEY = 1024
_WEB_PORTS = {"http": 80, "https": 443}
_WEB_BUSY = frozenset({408, 425, 429})
"""HTTP statuses that are retried, like all statuses from 500 on."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class _Place:
    """Normalised location of a file or folder: a folder contains a file if its segments begin the file's."""

    scheme: str
    """Empty for local paths."""
    host: str
    """Bucket or server; empty for local paths."""
    segments: tuple[str, ...]
    url: str
    """The address that is opened: the absolute path without links, or the URL without ``..``."""

    def holds(self, other: "_Place") -> bool:
        return (self.scheme, self.host, self.segments) == (
            other.scheme,
            other.host,
            other.segments[: len(self.segments)],
        )


class ReferenceReader:
    """Reader of one manifest's references. It keeps no open connection and no state, so threads may share it.

    Args:
        base: the folder or URL that relative references resolve against. References under it are allowed, unless it is
            a web address: web addresses are allowed only under ``roots``.
        roots: further folders, buckets or web addresses with allowed references.
        max_pixels: largest width times height; a larger image fails its row before it is decoded.

    Raises:
        UsageError: a root names no folder, bucket or server, or contains a password.
    """

    def __init__(self, base: str, roots: Sequence[str], max_pixels: int) -> None:
        self._base = storage.absolute(base)
        self._max_pixels = max_pixels
        self._roots = [_root(root) for root in roots]
        try:
            place = _place(self._base)
        except ValueError as error:
            raise UsageError(f"the manifest's folder {_shown(base)} cannot hold references: {error}") from error
        if place.scheme in _BUCKET_SCHEMES:
            place = _Place(place.scheme, place.host, (), f"{place.scheme}://{place.host}")
        if place.scheme not in _WEB_PORTS:
            self._roots.insert(0, place)

    def policy_error(self, reference: Reference) -> str | None:
        """The reason why this reference may not be read; None if it may. Nothing is opened.

        Local links are followed, so :meth:`read` decides the same way.
        """
        if reference.data is not None:
            return None
        try:
            self._locate(reference)
        except RowError as error:
            return str(error)
        return None

    def read(self, reference: Reference) -> Image.Image:
        """The reference as an RGB image (see :func:`vcf_batch.images.decode`). Embedded bytes are always allowed.

        Raises:
            RowError: the reference is not allowed, missing, not a file, too large, damaged or not an image, or its
                bytes do not have the hash that the manifest gives.
            StorageError: storage, network or a web server failed or refused this machine, or the allowed folder itself
                is missing on it.
        """
        shown = _shown(reference.uri) if reference.uri is not None else "(embedded bytes)"
        if reference.data is not None:
            data = reference.data
        else:
            place, root = self._locate(reference)
            data = self._fetch(place, root, shown)
        if reference.sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != reference.sha256:
            raise RowError(
                f"reference {shown} has the SHA-256 {found}, and the manifest says {reference.sha256}: put the image "
                "back that the manifest means and repair the run, or correct the manifest for a new run"
            )
        try:
            return images.decode(data, self._max_pixels)
        except RowError as error:
            raise RowError(f"reference {shown}: {error}") from error

    def _locate(self, reference: Reference) -> tuple[_Place, _Place]:
        """The reference's place and the root that allows it."""
        uri = reference.uri
        if not uri:
            raise RowError("the reference has neither a URI nor embedded bytes; give one, or null for text only")
        shown = _shown(uri)
        if uri[:5].lower() == "data:":
            raise RowError(f"reference {shown} is a data URI; embed the bytes in a struct<bytes, path> column instead")
        try:
            place = _place(self._resolve(uri))
        except ValueError as error:
            raise RowError(f"reference {shown} is not a usable path or URL: {error}") from error
        root = self._root_of(place)
        if place.scheme not in ("", *_WEB_PORTS) and not place.segments:
            raise RowError(f"reference {shown} names a bucket or server, not a file in it")
        if root is None:
            leads = "" if place.url == uri else f" (it leads to {_shown(place.url)})"
            allowed = ", ".join(_shown(root.url) for root in self._roots) or "none"
            raise RowError(
                f"reference {shown} lies outside the places that references may come from{leads}; allowed: {allowed}. "
                f"Allow its own with --reference-root {_shown(storage.parent(place.url.partition('?')[0]))}"
            )
        return place, root

    def _root_of(self, place: _Place) -> _Place | None:
        return next((root for root in self._roots if root.holds(place)), None)

    def _resolve(self, uri: str) -> str:
        if _SCHEME.match(uri) or os.path.isabs(uri):
            return uri
        return os.path.join(self._base, uri) if storage.is_local(self._base) else f"{self._base.rstrip('/')}/{uri}"

    def _fetch(self, place: _Place, root: _Place, shown: str) -> bytes:
        try:
            if place.scheme in _WEB_PORTS:
                data = self._fetch_web(place.url, shown)
            else:
                data = storage.read_bytes(place.url, MAX_REFERENCE_BYTES + 1, None if place.scheme else root.url)
        except FileNotFoundError as error:
            if not root.scheme and not os.path.isdir(root.url):
                raise StorageError(
                    f"{root.url}, where reference {shown} should be, is not there on this machine; every node "
                    "must see it"
                ) from error
            raise RowError(f"reference {shown} does not exist") from error
        except PermissionError as error:
            # Credentials, and permissions of a mounted folder, may differ between machines: the row is not to blame.
            raise StorageError(
                f"reference {shown} may not be read on this machine; check its permissions and the credentials there"
            ) from error
        except storage.NotAFileError as error:
            raise RowError(f"reference {shown} is a folder, pipe or device, not a file") from error
        if len(data) > MAX_REFERENCE_BYTES:
            raise RowError(f"reference {shown} is larger than the limit of {MAX_REFERENCE_BYTES} bytes; shrink it")
        return data

    def _fetch_web(self, url: str, shown: str) -> bytes:
        """Read at most ``MAX_REFERENCE_BYTES + 1`` bytes of a web address; retry if the server or the network fails."""
        deadline = time.monotonic() + WEB_TOTAL_SECONDS
        opener = urllib.request.build_opener(_Redirects(self, shown), _Web(deadline))
        # Quote the spaces and non-ASCII letters that occur in manifests; quoted characters stay as they are.
        request = urllib.request.Request(
            urllib.parse.quote(url, safe=string.punctuation), headers={"User-Agent": f"vcf-batch/{__version__}"}
        )
        for number in range(1, WEB_TRIES + 1):
            try:
                with opener.open(request, timeout=WEB_TIMEOUT_SECONDS) as response:
                    return _read_all(response)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410):
                    raise FileNotFoundError(shown) from error
                if error.code not in _WEB_BUSY and error.code < 500:
                    raise RowError(f"reference {shown}: the web server answers {error.code}, not 200") from error
                trouble = f"the web server answers {error.code}"
            except http.client.InvalidURL as error:
                raise RowError(f"reference {shown} is not a usable web address") from error
            except (OSError, http.client.HTTPException) as error:
                trouble = f"{type(error).__name__}: {error}"
            if number == WEB_TRIES or time.monotonic() > deadline:
                break
            time.sleep(WEB_PAUSE_SECONDS * 2 ** (number - 1))
        raise StorageError(f"cannot read reference {shown} after {number} tries: {trouble}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """HTTP handler that follows redirects only to places with allowed references."""

    def __init__(self, reader: ReferenceReader, shown: str) -> None:
        self._reader = reader
        self._shown = shown

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if self._reader.policy_error(Reference(uri=newurl)) is not None:
            raise RowError(f"reference {self._shown} redirects to {_shown(newurl)}, where none may come from")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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


def _root(url: str) -> _Place:
    """The place of a root that the user named.

    Raises:
        UsageError: the root is not a usable folder, bucket or web address.
    """
    try:
        if not url:
            raise ValueError("it is empty")
        return _place(storage.absolute(url))
    except ValueError as error:
        raise UsageError(
            f"--reference-root {_shown(url)} is not a usable folder, bucket or web address: {error}"
        ) from error


def _place(url: str) -> _Place:
    """Normalise an absolute path or a URL.

    Raises:
        ValueError: ``url`` names no place, or two programs could read it differently.
    """
    match = _SCHEME.match(url)
    if match is None or match[1].lower() == "file":
        path = url[match.end() :] if match else url
        if not os.path.isabs(path):
            raise ValueError("a file URL needs an absolute path, as in file:///folder/image.png")
        try:
            path = os.path.realpath(path)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
            raise ValueError("its links are changed while they are followed") from error
        return _Place("", "", tuple(part for part in path.split("/") if part), path)
    scheme, rest = match[1].lower(), url[match.end() :]
    if scheme in _WEB_PORTS:
        return _web_place(scheme, url)
    if "::" in url:
        raise ValueError("chained URLs ('::') are not followed")
    host, _, path = rest.partition("/")
    if not host:
        raise ValueError(f"{scheme}:// needs a bucket or host name")
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            if not segments:
                raise ValueError("'..' leads out of the bucket or host")
            segments.pop()
        elif segment != ".":
            segments.append(segment)
    if scheme in _BUCKET_SCHEMES and len(path.encode()) > _LONGEST_KEY:
        raise ValueError(f"object names have at most {_LONGEST_KEY} bytes")
    # A trailing slash makes no difference; elsewhere, object keys may have empty segments.
    while segments and not segments[-1]:
        segments.pop()
    return _Place(scheme, host, tuple(segments), "/".join([f"{scheme}://{host}", *segments]))


def _web_place(scheme: str, url: str) -> _Place:
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"{scheme}:// needs a server name")
    if "@" in parts.netloc:
        raise ValueError("user names and passwords in web addresses are not used, because outputs repeat the address")
    # Servers resolve such segments differently: one that could lead out of a root is refused in every spelling.
    path = urllib.parse.unquote(parts.path)
    segments = [part for part in path.split("/") if part]
    if "\\" in parts.netloc + path or any(part.partition(";")[0] in (".", "..") for part in segments):
        raise ValueError("'.', '..' and backslashes are not allowed in web addresses")
    host = f"{parts.hostname}:{_WEB_PORTS[scheme] if parts.port is None else parts.port}"
    address = urllib.parse.urlunsplit((scheme, parts.netloc, parts.path, parts.query, ""))
    return _Place(scheme, host, tuple(segments), address)


def _read_all(response: http.client.HTTPResponse) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while size <= MAX_REFERENCE_BYTES and (chunk := response.read1(min(1 << 20, MAX_REFERENCE_BYTES + 1 - size))):
        chunks.append(chunk)
        size += len(chunk)
    # read1 raises nothing when a connection breaks. Missing bytes are the network's fault, not the row's.
    if size <= MAX_REFERENCE_BYTES and response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(chunks)


def _shown(url: str) -> str:
    """A URI as messages show it: quoted, without credentials, of bounded length."""
    text = redact(url)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
