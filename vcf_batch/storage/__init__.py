"""Files on local paths and on every fsspec URL: read, listed, published whole. No other package does it.

A *url* is a local path, a ``file://`` URL, or a URL of any installed fsspec protocol (``s3://``, ``gs://``, ``memory://``).
Three promises hold on all of them:

* A file is published whole or not at all. Local files are written beside their place, flushed to disk and renamed;
  objects are put in one request (or one multipart upload that is completed last). No file is ever opened for writing
  under its final name: leaving ``with fs.open(url, "wb")`` through an exception publishes the part that was written.
* Listings are never cached: another writer's file is seen as soon as the storage shows it.
* Nothing waits for ever: connecting and reading have time limits, and what may pass (throttling, timeouts, resets) is
  tried a few times with growing pauses (:mod:`vcf_batch.storage.retries`).

Errors, the same on every storage, with credentials removed from their messages:

======================== ============================================================================================
``FileNotFoundError``    reading, moving, removing: no such file (also: a name that cannot exist, such as one too long)
``PermissionError``      reading, listing: the storage refuses
:class:`NotAFileError`   reading: a directory, pipe, socket or device stands there; it is not waited on
``FileExistsError``      :func:`publish_bytes` with ``create``: the file is there already
``StorageError``         everything else that storage or network do, and every failure of writing, refusals included
``UsageError``           no fsspec driver for the URL's protocol
======================== ============================================================================================
"""

from vcf_batch.storage.arrow import arrow_filesystem
from vcf_batch.storage.listing import list_checksums, list_files, list_tree
from vcf_batch.storage.paths import absolute, is_local, join, name, parent
from vcf_batch.storage.reading import (
    digest,
    download,
    exists,
    modified,
    open_read,
    read_bytes,
    read_text,
    refusals_as_storage_errors,
    size,
)
from vcf_batch.storage.retries import NotAFileError
from vcf_batch.storage.writing import move, publish_bytes, remove, remove_tree, remove_unfinished, upload

__all__ = [
    "NotAFileError",
    "absolute",
    "arrow_filesystem",
    "digest",
    "download",
    "exists",
    "is_local",
    "join",
    "list_checksums",
    "list_files",
    "list_tree",
    "modified",
    "move",
    "name",
    "open_read",
    "parent",
    "publish_bytes",
    "read_bytes",
    "read_text",
    "refusals_as_storage_errors",
    "remove",
    "remove_tree",
    "remove_unfinished",
    "size",
    "upload",
]
