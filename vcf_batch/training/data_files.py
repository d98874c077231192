"""The files of a data set for training: named one by one, by braces, by a pattern, or by a folder."""

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vcf_batch import storage
from vcf_batch.errors import RefusedError, UsageError
from vcf_batch.output import receipts, run_file
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged
from vcf_batch.output.run_file import AnotherVersion
from vcf_batch.training import loose_images

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Endings of the names of tars, in small letters. How a tar is compressed is seen by its first bytes."""
PARQUETS = (".parquet",)
PATH_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")
"""Endings of the names of tables whose images are files of their own."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the table of an ``imagefolder``."""
LAYOUTS = (
    "training data are WebDataset tars (KEY.jpg|jpeg|png|webp with KEY.txt or KEY.json; .tar, .tar.gz, .tar.bz2 or "
    ".tar.xz), Parquet files (a column of images or of their paths, and one of captions), tables of paths and captions "
    "(.jsonl, .csv, .tsv, or .json as COCO has it), folders of such images and texts, or of images with metadata.jsonl "
    "or metadata.csv, named by a file, a folder, braces such as {00000..00031}.tar, or a pattern of *, ? and [0-9]"
)
MOST_FILES = 1_000_000
"""Largest number of names that braces may stand for."""

_UNREAD = (".tar.zst", ".tar.lz4", ".tar.lzma", ".tar.z", ".zip", ".7z", ".rar", ".zst", ".lmdb", ".arrow", ".tfrecord")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)(?:\.\.(\d+))?|([A-Za-z])\.\.([A-Za-z])|([^{}]*,[^{}]*))\}")
_MAGIC = re.compile(r"[*?\[]")
_WEB = ("http://", "https://")
_FINGERPRINT = b'"fingerprint"'
"""What the records and receipts of every version of this project have, and no file of img2dataset."""
_THREADS = 8


@dataclass
class Found:
    """The files of a data set, in order, and what has to be told about them."""

    sizes: dict[str, int] = field(default_factory=dict)
    """URL and size in bytes of each file; of a folder of images and texts, its URL with a slash at the end."""
    remarks: list[str] = field(default_factory=list)


def kind_of(url: str) -> str:
    """The kind of a file by its name: ``tar``, ``parquet``, ``table``, or a ``folder`` of images and texts."""
    path = _path(url)
    if path.endswith("/"):
        return "folder"
    return "tar" if path.endswith(TARS) else "parquet" if path.endswith(PARQUETS) else "table"


def file_name(url: str) -> str:
    """Name of a file; of a web address without its query, which may be signed anew each day."""
    return storage.name(url.partition("?")[0] if url.startswith(_WEB) else url)


def find(url: str) -> Found:
    """The files that ``url`` stands for, in the order of braces, and of names where a folder or a pattern is listed.

    Of a folder, one kind is read: tars, or else Parquet files, since img2dataset writes these as the index of its tars;
    or else the tables of an ``imagefolder``, or else images with a text beside each. Of an output of this project, only
    the tars that are committed are read.

    Raises:
        UsageError: there are no such files, or they are of a kind that is not read.
        RefusedError, DamageFound: an output below the folder cannot be read.
        OSError, StorageError: the storage failed.
    """
    if url.startswith("pipe:"):
        raise UsageError(f"{url} is a command, and none is run: name the files themselves, at any URL; {LAYOUTS}")
    url = storage.absolute(url)
    # A name may hold braces: what exists is meant.
    if not _BRACES.search(url) or (not url.startswith(_WEB) and storage.exists(url)):
        return _find_one(url)
    names = list(itertools.islice(braces(url), MOST_FILES + 1))
    if len(names) > MOST_FILES:
        raise UsageError(f"the braces in {url} stand for more than {MOST_FILES:,} names")
    found = Found()
    with ThreadPoolExecutor(_THREADS) as threads:
        for each in threads.map(_find_one, dict.fromkeys(names)):
            found.sizes |= each.sizes
            found.remarks += each.remarks
    kinds = sorted({kind_of(file) for file in found.sizes})
    if len(kinds) > 1:
        raise UsageError(f"{url} stands for data of several kinds ({', '.join(kinds)}); train on one kind at a time")
    return found


def braces(text: str) -> Iterator[str]:
    """Yield the names that a text with braces stands for: ``{000..127}``, ``{0..8..2}``, ``{a..c}`` and ``{a,b}``.

    As in WebDataset, the numbers have the digits of the longer bound if one of several digits
    begins with 0. A name that nested braces give twice is given twice.
    """
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    first, last, step, letter, last_letter, listed = match.groups()
    options: Iterable[str]
    if first:
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in (first, last))
        digits = max(len(first), len(last)) if padded else 1
        options = (f"{number:0{digits}}" for number in _range(int(first), int(last), int(step or 1) or 1))
    elif letter:
        options = map(chr, _range(ord(letter), ord(last_letter), 1))
    else:
        options = listed.split(",")
    for option in options:
        yield from braces(text[: match.start()] + option + text[match.end() :])


def _range(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


def _find_one(url: str) -> Found:
    try:
        size = storage.size(url)
    except storage.NotAFileError:
        return _chosen(url, *_in_folder(url))
    except FileNotFoundError:
        if url.startswith(_WEB) or not _MAGIC.search(url):
            raise UsageError(f"{url}: there is no such file or folder; {LAYOUTS}") from None
        return _matching(url)
    if not _path(url).endswith(TARS + PARQUETS + PATH_TABLES):
        raise UsageError(f"{url} is a file of another kind; {LAYOUTS}")
    return Found({url: size})


def _matching(url: str) -> Found:
    """The files that match a pattern, in which ``**`` stands for folders at any depth."""
    scheme, colon, path = url.rpartition("://")
    parts, known = path.split("/"), 0
    for number, part in enumerate(parts[:-1], 1):
        # A folder's name may hold the signs of a pattern: what exists is meant.
        if _MAGIC.search(part) and not storage.exists(scheme + colon + "/".join(parts[:number])):
            break
        known = number
    folder, pattern = scheme + colon + ("/".join(parts[:known]) or ("" if colon else "/")), parts[known:]
    listed = storage.list_files(folder) if len(pattern) == 1 and "**" not in pattern else storage.list_tree(folder)
    matched = {name: size for name, size in listed.items() if _matches(name.split("/"), pattern)}
    if not matched:
        raise UsageError(f"no file matches {url}; {LAYOUTS}")
    return _chosen(folder, matched, [], url)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path matches. A name that begins with a dot or ``_`` matches only what begins so too."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _matches(parts, pattern[1:]):
        return True
    if not parts or (parts[0][:1] in (".", "_") and parts[0][:1] != pattern[0][:1]):
        return False
    if pattern[0] == "**":
        return _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _in_folder(url: str) -> tuple[dict[str, int], list[str]]:
    """Relative path and size of the files in a folder at any depth, without those that no reader is meant to see."""
    tree = storage.list_tree(url)
    remarks: list[str] = []
    for file in sorted(name for name in tree if storage.name(name) == run_file.RUN_FILE_NAME):
        folder = file.rpartition("/")[0]
        output = storage.join(url, folder) if folder else url
        try:
            if not _holds_run(output):
                continue
            committed, left_out = _committed(output)
        except AnotherVersion as error:
            pattern = storage.join(output, "*.tar")
            raise AnotherVersion(
                f"{error}. The pattern '{pattern}' reads its tars, whether committed or not"
            ) from error
        remarks += left_out
        inside = f"{folder}/" if folder else ""
        tree = {
            name: size
            for name, size in tree.items()
            if not name.startswith(inside) or (inside + storage.name(name) == name and storage.name(name) in committed)
        }
    return {name: size for name, size in tree.items() if not re.search(r"(^|/)[._]", name)}, remarks


def _holds_run(url: str) -> bool:
    """Whether a folder's ``run.json`` is that of a run of this project, whole or damaged.

    Any other file of this name is of a training or somebody's, and tells nothing of the tars beside it.

    Raises:
        AnotherVersion: it is of a run of another layout.
        StorageError: the storage failed.
    """
    shards = receipts.files_found(url)
    if not shards:
        return False
    try:
        there = run_file.read_document(url)
    except AnotherVersion:
        raise
    except RefusedError:
        there = None
    if there is not None:
        return "manifest" in there
    # A record that is damaged, or that its driver left empty, is known by its own or a receipt's fingerprint.
    stats = [name + receipts.RECEIPT_SUFFIX for name, files in shards.items() if receipts.RECEIPT_SUFFIX in files]
    own = storage.read_bytes(storage.join(url, run_file.RUN_FILE_NAME), limit=run_file.MAX_RUN_FILE_BYTES)
    return any(_FINGERPRINT in data for data in (own, *(storage.read_bytes(storage.join(url, f)) for f in stats[:1])))


def _committed(url: str) -> tuple[set[str], list[str]]:
    """Names of the tars of an output that are committed, and what has to be told about the others."""
    output = Output(url)
    names, damaged, left = set[str](), list[Damaged](), len(output.plan)
    for found in output.examine():
        if isinstance(found, Damaged):
            damaged.append(found)
            continue
        left -= 1
        if found.counts["success"]:
            names.add(found.shard.name + receipts.FILE_SUFFIXES["tar"])
    if damaged:
        raise UsageError(
            f"{url} has {len(damaged):,} damaged shards, the first {damaged[0].name}: {damaged[0].reason}; mend it "
            f"with 'vcf-batch repair {url}', or name the tars to train on"
        )
    return names, [f"{url}: {left:,} of {len(output.plan):,} shards are not generated yet"] if left else []


def _chosen(folder: str, listed: dict[str, int], remarks: list[str], named: str = "") -> Found:
    """The tars among the listed files, or else those of the next kind of which there are any."""
    endings = Counter(_ending(name) for name in listed)
    for kind in (TARS, PARQUETS, METADATA, PATH_TABLES if named else ()):
        names = sorted(name for name in listed if name.lower().endswith(kind))
        if kind is METADATA:
            names = [name for name in names if storage.name(name).lower() in METADATA]
        if names:
            unread = sorted(name for name in listed if name.lower().endswith(_UNREAD))
            if unread:
                remarks = [*remarks, f"{named or folder}: {len(unread):,} files are not read, the first is {unread[0]}"]
            return Found({storage.join(folder, name): listed[name] for name in names}, remarks)
    if not named and loose_images.holds_pairs([*listed]):
        return Found({folder.rstrip("/") + "/": sum(listed.values())}, remarks)
    there = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(4))
    found = f" but {there}" if there else ", and no other file"
    told = "".join(f" ({remark})" for remark in remarks)
    raise UsageError(f"{named or folder} holds no .tar or .parquet file{found}{told}; {LAYOUTS}")


def _ending(name: str) -> str:
    dot = storage.name(name).rpartition(".")
    return f".{dot[2].lower()}" if dot[1] else "files without an ending"


def _path(url: str) -> str:
    """A URL without the query of a web address, in small letters."""
    return (url.partition("?")[0] if url.startswith(_WEB) else url).lower()
