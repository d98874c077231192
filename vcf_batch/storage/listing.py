"""Listing of folders, at any depth, never from a cache."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vcf_batch.storage import local
from vcf_batch.storage.drivers import filesystem
from vcf_batch.storage.paths import as_local_path, is_local, join, name
from vcf_batch.storage.retries import retried

_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "etag")


def list_files(url: str) -> dict[str, int]:
    """Name and size of the files directly in a folder; ``{}`` if there is no such folder. One uncached listing.

    Raises:
        PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url):
        return _local_listing(url, local.files)
    return {name(entry["name"]): int(entry["size"] or 0) for entry in _entries(url) if entry["type"] == "file"}


def list_tree(url: str) -> dict[str, int]:
    """Relative path and size of all files under a folder, at any depth; ``{}`` if there is no such folder. Uncached.

    Raises:
        PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url):
        return _local_listing(url, local.tree)
    return {file: int(entry["size"] or 0) for file, entry in _walk(url)}


def list_some(url: str, most: int) -> list[str]:
    """Relative paths of at most ``most`` files under a folder, at any depth; ``[]`` if there is no such folder.

    Raises:
        PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url):
        return list(_local_listing(url, lambda folder: itertools.islice(local.tree(folder), most)))
    return [file for file, _ in itertools.islice(_walk(url), most)]


def list_checksums(url: str) -> dict[str, tuple[int, str | None]]:
    """Relative path, size and checksum (None if the store keeps none) of all files under a remote folder. Uncached.

    Raises:
        PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    return {file: (int(entry["size"] or 0), checksum(entry)) for file, entry in _walk(url)}


def checksum(entry: Mapping[str, Any]) -> str | None:
    """Checksum of a remote file, or a name of its version, from its driver's entry; None if the store keeps none."""
    return next((str(entry[key]) for key in _CHECKSUMS if entry.get(key)), None)


def _local_listing(url: str, files: Callable[[str], Iterator[tuple[str, int]]]) -> dict[str, int]:
    try:
        return retried("list", url, lambda: dict(files(as_local_path(url))))
    except FileNotFoundError:
        return {}


def _entries(url: str) -> list[dict[str, Any]]:
    """The driver's entries for a remote folder; ``[]`` if there is no such folder."""

    def listing() -> list[dict[str, Any]]:
        fs, path = filesystem(url)
        fs.invalidate_cache(path)
        return [entry for entry in fs.ls(path, detail=True) if entry["name"].rstrip("/") != path.rstrip("/")]

    try:
        return retried("list", url, listing)
    except FileNotFoundError:
        return []


def _walk(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Relative path and entry of each file under a remote folder, at any depth."""
    # Not fs.find: most drivers silently leave out folders that they fail to list.
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in _entries(join(url, folder)):
            path = f"{folder}/{name(entry['name'])}".removeprefix("/")
            if entry["type"] == "file":
                yield path, entry
            elif entry["type"] == "directory":
                folders.append(path)
