"""The images below a folder, found by what their first bytes say and not by their names."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.images import FORMATS
from vcf_batch.images.kinds import RAW, START_BYTES, SVG, XML, kind_of

_THREADS = 32
"""Files whose first bytes are read at a time. On object stores each one is a request of some 20 ms."""
_FILES_AT_ONCE = 8192
NAMES_SHOWN = 3

_RAW = (".3fr", ".arw", ".cr2", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".nef", ".nrw", ".pef", ".sr2", ".srw")
"""Suffixes of photographs as cameras store them. They are TIFF files, and what is read of one may be its thumbnail."""


_LINK = "a link to a folder or to nothing, or no file; name the folder itself"


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """The files below a folder: those that references may be, and the others by reason."""

    uris: Sequence[str]
    """The images, sorted: relative to the manifest's folder if they lie in it, else absolute."""
    skipped: Mapping[str, Sequence[str]]
    """Reason to the names of the files that are left out for it, as they can be shown; sorted."""

    def told(self) -> list[str]:
        """Lines for people: for each reason the number of files, a remedy and the first names."""
        lines = []
        for reason, names in self.skipped.items():
            more = ", ..." if len(names) > NAMES_SHOWN else ""
            lines.append(f"skipped: {len(names):,} files ({reason}): {', '.join(names[:NAMES_SHOWN])}{more}")
        return lines


def find(
    folder: str, manifest: str, watch: Callable[[Iterator[str], int], Iterator[str]] = lambda names, total: names
) -> ImageFiles:
    """Find the images below a folder, at any depth. The first bytes of every file are read, many files at a time.

    Only the beginning decides: an image that is cut short is found, and its row fails.

    Args:
        folder: a path or any fsspec URL. Links to folders in it are not followed.
        manifest: the manifest that will name the images. It is itself no image and not counted.
        watch: gets the names of the files and their number, and hands the names on.

    Raises:
        UsageError: there is no such folder, it cannot be listed, or it holds no image.
        StorageError: the storage failed.
    """
    folder, manifest = storage.absolute(folder), storage.absolute(manifest)
    base = storage.parent(manifest).rstrip("/") + "/"
    sizes = _listed(folder)
    uris: list[str] = []
    skipped: dict[str, list[str]] = {_LINK: [*map(_shown, _unfollowed(folder))]} if storage.is_local(folder) else {}
    names = watch((name for name in sorted(sizes) if storage.join(folder, name) != manifest), len(sizes))
    with ThreadPoolExecutor(_THREADS, "images") as threads:
        while some := list(islice(names, _FILES_AT_ONCE)):
            reasons = threads.map(lambda name: _obstacle(folder, name, sizes[name]), some)
            for name, reason in zip(some, reasons, strict=True):
                if reason is None:
                    uris.append(storage.join(folder, name).removeprefix(base))
                else:
                    skipped.setdefault(reason, []).append(_shown(name))
    found = ImageFiles(uris, {reason: names for reason, names in sorted(skipped.items()) if names})
    if not uris:
        files = "\n  ".join(["", *found.told()]) if found.skipped else " It is empty."
        raise UsageError(f"the folder of references {folder} holds no image ({', '.join(FORMATS)}).{files}")
    return found


def _unfollowed(folder: str) -> Iterator[str]:
    """Names of links to folders, links to nothing, pipes and devices below a local folder."""
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = os.path.join(place, name)
            is_folder, is_file = os.path.isdir(path), os.path.isfile(path)
            if (is_folder and os.path.islink(path)) or not (is_folder or is_file):
                yield os.path.relpath(path, folder)


def _listed(folder: str) -> dict[str, int]:
    """Name and size of each file below a folder that is there."""
    try:
        sizes = storage.list_tree(folder)
        if not sizes:
            storage.size(folder)
            raise UsageError(f"{folder} is a file; name the folder that holds the images")
    except FileNotFoundError as error:
        raise UsageError(f"there is no folder of images {folder}; check its name") from error
    except PermissionError as error:
        raise UsageError(f"cannot list the images in {folder}: {error}") from error
    except storage.NotAFileError:
        pass
    return sizes


def _obstacle(folder: str, name: str, size: int) -> str | None:
    """The reason why a file is no reference; None for an image of a format that is read."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8; rename them"
    url = storage.join(folder, name)
    try:
        start = storage.read_start(url, START_BYTES) if size else storage.read_bytes(url, START_BYTES)
    except PermissionError:
        return "permission denied; check their permissions"
    except (FileNotFoundError, storage.NotAFileError):
        return "gone meanwhile"
    kind = kind_of(start)
    if kind and kind.name == "TIFF" and name.lower().endswith(_RAW):
        kind = RAW
    if kind in (None, SVG, XML):
        return "no image" if start else "empty"
    return f"{kind.name}; {kind.remedy}" if kind.remedy else None


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace("\n", "\\n")
