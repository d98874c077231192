"""Files on local paths and fsspec URLs: read, listed and published whole. No other package uses fsspec.

A *url* is a local path, a ``file://`` URL, or a URL of any installed fsspec protocol (``s3://``, ``gs://``, ``memory://``).
Three promises hold on all of them:

* A file is published whole or not at all. Local files are written under a temporary name in the same folder, flushed to
  disk and renamed; objects are put in one request (or one multipart upload, completed at the end). No file is ever
  opened for writing under its final name, because an exception inside ``with fs.open(url, "wb")`` publishes the part
  written so far.
* Listings are never cached: another writer's file is seen as soon as the storage shows it.
* Nothing waits forever: connecting and reading have time limits. A request that fails for a passing reason (throttling,
  a timeout, a reset) is retried a few times with growing pauses (:mod:`vcf_batch.storage.retries`).

Errors, the same on every storage, with credentials removed from their messages:

======================== ============================================================================================
``FileNotFoundError``    reading, moving, removing: there is no such file, or its name is impossible (too long)
``PermissionError``      reading, listing: the storage refuses access
:class:`NotAFileError`   reading: the path is a directory, pipe, socket or device; opening it does not block
``FileExistsError``      :func:`publish_bytes` with ``create``: the file exists already; :func:`move` with a version:
                         the file has another one
``StorageError``         any other failure of storage or network, and every failure to write, refused access included
``UsageError``           any operation: no fsspec driver is installed for the URL's protocol
======================== ============================================================================================
"""

from vcf_batch.storage.arrow import arrow_filesystem
from vcf_batch.storage.listing import list_checksums, list_files, list_some, list_tree
from vcf_batch.storage.paths import absolute, is_local, join, name, parent
from vcf_batch.storage.reading import (
    Stamp,
    digest,
    download,
    exists,
    modified,
    open_read,
    read_bytes,
    read_start,
    read_text,
    reading_threads,
    refusals_as_storage_errors,
    remote_checksum,
    size,
    stamp,
    version,
)
from vcf_batch.storage.retries import NotAFileError
from vcf_batch.storage.writing import move, publish_bytes, remove, remove_tree, remove_unfinished, upload

__all__ = [
    "NotAFileError",
    "Stamp",
    "absolute",
    "arrow_filesystem",
    "digest",
    "download",
    "exists",
    "is_local",
    "join",
    "list_checksums",
    "list_files",
    "list_some",
    "list_tree",
    "modified",
    "move",
    "name",
    "open_read",
    "parent",
    "publish_bytes",
    "read_bytes",
    "read_start",
    "read_text",
    "reading_threads",
    "refusals_as_storage_errors",
    "remote_checksum",
    "remove",
    "remove_tree",
    "remove_unfinished",
    "size",
    "stamp",
    "upload",
    "version",
]
