"""The files that rows name, references and LoRAs: permission to read them, reading, and decoding of images.

A manifest may come from anyone, so files are opened only in places that the user allowed: under the manifest's own
folder (in object storage: its own bucket) and under the roots named with ``--reference-root``. Places are compared
after ``..`` and local links are resolved, and the resolved path is the one that is opened, folder by folder from its
root on and without following a link, because links may have been changed since.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from vcf_batch import images, storage
from vcf_batch.errors import RowError, StorageError, UsageError, VcfBatchError, redact_name
from vcf_batch.manifest import web_reading
from vcf_batch.records import MAX_LORA_BYTES, Reference, Row

MAX_REFERENCE_BYTES = 256 * 2**20
"""Largest file that is read. An uncompressed image at the default limit of 64 million pixels has 192 MB."""

_BUCKET_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"})
_LONGEST_KEY = 1024
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


def is_relative(uri: str) -> bool:
    """Whether a reference starts at the manifest's folder, rather than being an absolute path or a URL."""
    return not (_SCHEME.match(uri) or os.path.isabs(uri))


class FileReader:
    """Reader of the files that one manifest's rows name.

    It keeps no open connection and no state, so threads may share it.

    Args:
        base: the folder or URL that relative names resolve against. Files under it are allowed, unless it is a web
            address: web addresses are allowed only under ``roots``.
        roots: further folders, buckets or web addresses with allowed files.

    Raises:
        UsageError: a root names no folder, bucket or server, or contains a password.
    """

    what = "reference"
    """The files, in messages."""
    max_bytes = MAX_REFERENCE_BYTES
    """Largest file that is read."""

    def __init__(self, base: str, roots: Sequence[str]) -> None:
        self._base = storage.absolute(base)
        self._roots = [_root(root) for root in roots]
        try:
            place = _place(self._base)
        except ValueError as error:
            raise UsageError(f"the manifest's folder {_shown(base)} cannot hold references: {error}") from error
        if place.scheme in _BUCKET_SCHEMES:
            place = _Place(place.scheme, place.host, (), f"{place.scheme}://{place.host}")
        if place.scheme not in web_reading.WEB_PORTS:
            self._roots.insert(0, place)

    def policy_error(self, reference: Reference) -> str | None:
        """The reason why this reference may not be read; None if it may. Nothing is opened.

        Local links are followed, so :meth:`read` decides the same way.
        """
        if reference.data is not None:
            return None
        try:
            with _blamed(self._named(reference)):
                self._locate(reference)
        except RowError as error:
            return str(error)
        return None

    def _refuses(self, url: str) -> bool:
        return self.policy_error(Reference(uri=url)) is not None

    def read_bytes(self, reference: Reference) -> bytes:
        """The file as it is. Embedded bytes are always allowed.

        Raises:
            RowError: the file is not allowed, missing, not a file or too large, or its bytes do not have the hash that
                the manifest gives.
            StorageError: storage, network or a web server failed or refused this machine, or the allowed folder itself
                is missing on it.
        """
        shown = self._named(reference)
        with _blamed(shown):
            return self._content(reference, shown)

    def _named(self, reference: Reference) -> str:
        """What messages call a file, such as ``reference 'a.png'``."""
        return f"{self.what} {_shown(reference.uri) if reference.uri is not None else '(embedded bytes)'}"

    def _content(self, reference: Reference, shown: str) -> bytes:
        if reference.data is not None:
            data = reference.data
        else:
            place, root = self._locate(reference)
            data = self._fetch(place, root, shown)
        if reference.sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != reference.sha256:
            raise RowError(
                f"{shown} has the SHA-256 {found}, and the manifest says {reference.sha256}: put the "
                "image back that the manifest means and repair the run, or correct the manifest for a new run"
            )
        return data

    def _locate(self, reference: Reference) -> tuple[_Place, _Place]:
        """The reference's place and the root that allows it."""
        uri = reference.uri
        if not uri:
            raise RowError("the reference has neither a URI nor embedded bytes; give one, or null for text only")
        shown = self._named(reference)
        if uri[:5].lower() == "data:":
            raise RowError(f"{shown} is a data URI; embed the bytes in a struct<bytes, path> column instead")
        try:
            place = _place(self._resolve(uri))
        except ValueError as error:
            raise RowError(f"{shown} is not a usable path or URL: {error}") from error
        root = self._root_of(place)
        if place.scheme not in ("", *web_reading.WEB_PORTS) and not place.segments:
            raise RowError(f"{shown} names a bucket or server, not a file in it")
        if root is None:
            leads = "" if place.url == uri else f" (it leads to {_shown(place.url)})"
            allowed = ", ".join(_shown(root.url) for root in self._roots) or "none"
            raise RowError(
                f"{shown} lies outside the places that {self.what}s may come from{leads}; allowed: {allowed}. "
                f"Allow its own with --reference-root {_shown(storage.parent(place.url.partition('?')[0]))}"
            )
        return place, root

    def _root_of(self, place: _Place) -> _Place | None:
        return next((root for root in self._roots if root.holds(place)), None)

    def _resolve(self, uri: str) -> str:
        if not is_relative(uri):
            return uri
        return os.path.join(self._base, uri) if storage.is_local(self._base) else f"{self._base.rstrip('/')}/{uri}"

    def _fetch(self, place: _Place, root: _Place, shown: str) -> bytes:
        try:
            if place.scheme in web_reading.WEB_PORTS:
                data = web_reading.fetch(place.url, self.max_bytes, shown, self._refuses)
            else:
                data = storage.read_bytes(place.url, self.max_bytes + 1, None if place.scheme else root.url)
        except FileNotFoundError as error:
            if not root.scheme and not os.path.isdir(root.url):
                raise StorageError(
                    f"{root.url}, where {shown} should be, is not there on this machine; every node must see it"
                ) from error
            raise RowError(f"{shown} does not exist") from error
        except PermissionError as error:
            # Credentials, and permissions of a mounted folder, may differ between machines: the row is not to blame.
            raise StorageError(
                f"{shown} may not be read on this machine; check its permissions and the credentials there"
            ) from error
        except storage.NotAFileError as error:
            raise RowError(f"{shown} is a folder, pipe or device, not a file") from error
        if len(data) > self.max_bytes:
            raise RowError(f"{shown} is larger than the limit of {self.max_bytes} bytes; shrink it")
        return data


class ReferenceReader(FileReader):
    """Reader of one manifest's references.

    Args:
        base, roots: see :class:`FileReader`.
        max_pixels: largest width times height; a larger image fails its row before it is decoded.

    Raises:
        UsageError: see :class:`FileReader`.
    """

    def __init__(self, base: str, roots: Sequence[str], max_pixels: int) -> None:
        super().__init__(base, roots)
        self._max_pixels = max_pixels

    def read(self, reference: Reference) -> Image.Image:
        """The reference as an RGB image (see :func:`vcf_batch.images.decode`). Embedded bytes are always allowed.

        Raises:
            RowError: the reference is not allowed, missing, not a file, too large, damaged or not an image, or its
                bytes do not have the hash that the manifest gives.
            StorageError: storage, network or a web server failed or refused this machine, or the allowed folder itself
                is missing on it.
        """
        shown = self._named(reference)
        with _blamed(shown):
            data = self._content(reference, shown)
            try:
                return images.decode(data, self._max_pixels, shown)
            except RowError as error:
                raise RowError(f"{shown}: {error}") from error


class LoraReader(FileReader):
    """Reader of the LoRAs that one manifest's rows name."""

    what = "LoRA"
    max_bytes = MAX_LORA_BYTES


def refusal(row: Row, references: ReferenceReader, loras: LoraReader) -> str | None:
    """The reason why a file that a row names may not be read; None if all may. Nothing is opened."""
    named = [Reference(uri=lora.source) for lora in row.overrides.get("lora", ()) if lora.is_file]
    reasons = (*map(references.policy_error, row.images), *map(loras.policy_error, named))
    return next(filter(None, reasons), None)


def read_under(folder: str, path: str) -> bytes:
    """The bytes of an image file that a data set names by its path.

    Args:
        folder: folder or URL that relative paths start at, and that holds the file whatever links and ``..`` lead to.
        path: a relative or absolute path, or a URL.

    Raises:
        RowError: the file lies elsewhere, is missing, no file or too large, or has a web address.
        StorageError: the storage failed, or the folder is missing on this machine.
    """
    shown, option = _shown(path), "name the folder that holds all of them with --image-folder"
    try:
        root = _place(storage.absolute(folder))
        place = _place(storage.join(root.url, path) if is_relative(path) else path)
    except ValueError as error:
        raise RowError(f"its image {shown} is not a usable path or URL: {error}") from error
    if place.scheme in web_reading.WEB_PORTS:
        raise RowError(f"its image {shown} is at a web address: download the images first, as img2dataset does")
    if not root.holds(place):
        raise RowError(f"its image {shown} lies outside {_shown(folder)}; {option}")
    try:
        data = storage.read_bytes(place.url, MAX_REFERENCE_BYTES + 1, None if place.scheme else root.url)
    except FileNotFoundError as error:
        if not root.scheme and not os.path.isdir(root.url):
            raise StorageError(f"{root.url}, which holds the images, is not there on this machine") from error
        raise RowError(f"its image {shown} is not in {_shown(folder)}; {option}") from error
    except storage.NotAFileError as error:
        raise RowError(f"its image {shown} is a folder, pipe or device, not a file") from error
    except PermissionError as error:
        raise StorageError(f"its image {shown} may not be read on this machine; check its permissions") from error
    if len(data) > MAX_REFERENCE_BYTES:
        raise RowError(f"its image {shown} has more than {MAX_REFERENCE_BYTES:,} bytes; shrink it")
    return data


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
    if scheme in web_reading.WEB_PORTS:
        return _Place(scheme, *web_reading.parse(url))
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


@contextlib.contextmanager
def _blamed(shown: str) -> Iterator[None]:
    """Turn whatever else reading a file may raise into the row's error, so that it kills no worker.

    Raises:
        RowError: with the class of the error that was raised.
        StorageError: the system could not do what it was asked for.
        MemoryError, VcfBatchError: they pass.
    """
    try:
        yield
    except (MemoryError, VcfBatchError):
        raise
    except OSError as error:
        raise StorageError(f"cannot read {shown}: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise RowError(f"{shown} cannot be read: {type(error).__name__}: {error}") from error


def _shown(url: str) -> str:
    """A URI as messages show it: quoted, without credentials, of bounded length."""
    text = redact_name(url)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
