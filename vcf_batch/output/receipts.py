"""The receipts in an output. One listing finds all of them, and they say which shards exist.

A shard does not exist if it has no receipt, or if a file that its receipt names is missing or has another size.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor

from vcf_batch import storage
from vcf_batch.output import shards
from vcf_batch.records import Receipt

SUFFIX = "_stats.json"
"""End of a receipt's file name, after the shard's name."""

_FILE_NAME = re.compile(rf"(\d{{5,}})({'|'.join(map(re.escape, [*shards.SUFFIXES.values(), SUFFIX]))})")
_READERS = 32
_RECEIPTS_AT_ONCE = 4096


def files_found(output_url: str) -> dict[str, list[str]]:
    """The files of all shards in the output, finished or not: shard name to the suffixes of its files.

    Raises:
        StorageError: the output cannot be read.
    """
    with storage.refusals_as_storage_errors():
        names = storage.list_files(output_url)
    found: dict[str, list[str]] = {}
    for match in filter(None, map(_FILE_NAME.fullmatch, names)):
        found.setdefault(match[1], []).append(match[2])
    return found


def read(output_url: str) -> Iterator[Receipt]:
    """Yield the receipts of the shards that exist, in order of shard index, without holding all of them.

    One listing finds the receipts and checks the sizes of their files. Several receipts are read at the same time. A
    file that is not a receipt, or a receipt of another shard than its name says, counts as absent.

    Raises:
        StorageError: the output cannot be read.
    """
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output_url)
    yield from read_listed(output_url, sizes)


def complete(sizes: Mapping[str, int]) -> set[int]:
    """Indices of the shards whose files are all in a listing of name to size."""
    found: Counter[str] = Counter(match[1] for match in map(_FILE_NAME.fullmatch, sizes) if match)
    return {int(name) for name, files in found.items() if files == len(shards.SUFFIXES) + 1}


def read_listed(output_url: str, sizes: Mapping[str, int], known: Set[int] = frozenset()) -> Iterator[Receipt]:
    """Yield the receipts as :func:`read` does, from a listing of name to size, except those whose index is ``known``.

    Raises:
        StorageError: the output cannot be read.
    """
    found = filter(None, map(_FILE_NAME.fullmatch, sizes))
    stems = sorted((match[1] for match in found if match[2] == SUFFIX and int(match[1]) not in known), key=int)

    def content(stem: str) -> bytes:
        try:
            with storage.refusals_as_storage_errors():
                return storage.read_bytes(storage.join(output_url, stem + SUFFIX))
        except FileNotFoundError:
            return b""  # The file was deleted since the listing. Empty bytes are not a receipt.

    def receipt_in(data: bytes, stem: str) -> Receipt | None:
        try:
            receipt = Receipt.from_json(data)
        except ValueError:
            return None
        found = {kind: sizes.get(stem + suffix) for kind, suffix in shards.SUFFIXES.items()}
        said = {kind: entry.size for kind, entry in receipt.files.items()}
        own = receipt.shard.name == stem and receipt.shard.index == int(stem)
        return receipt if own and found == said else None

    # Threads only wait for the storage. Parsing in threads would gain nothing, because only one runs Python at a time.
    with ThreadPoolExecutor(_READERS) as threads:
        for begin in range(0, len(stems), _RECEIPTS_AT_ONCE):
            batch = stems[begin : begin + _RECEIPTS_AT_ONCE]
            # Each thread gets one piece: handing over a single receipt takes longer than reading it from a disk.
            step = math.ceil(len(batch) / _READERS)
            pieces = [batch[first : first + step] for first in range(0, len(batch), step)]
            contents = itertools.chain.from_iterable(threads.map(lambda piece: [*map(content, piece)], pieces))
            yield from filter(None, map(receipt_in, contents, batch))
