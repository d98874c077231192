"""The receipts in an output, which tell what shards exist. One listing finds them all.

A shard without a receipt does not exist, and neither does one whose receipt names files that are missing or of another
size.
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
"""What follows the shard's name in the name of its receipt."""

_FILE_NAME = re.compile(rf"(\d{{5,}})({'|'.join(map(re.escape, [*shards.SUFFIXES.values(), SUFFIX]))})")
_READERS = 32
_RECEIPTS_AT_ONCE = 4096


def files_found(output_url: str) -> dict[str, list[str]]:
    """Which files of which shards there are, finished or not: what follows the shard's name, by its name.

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
    """The receipts of the shards that exist, by shard index, without holding them all.

    One listing finds them and tells whether their files are there in the right size; they are read side by side. What
    is not a receipt, or does not match its own name, counts as absent.

    Raises:
        StorageError: the output cannot be read.
    """
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output_url)
    yield from read_listed(output_url, sizes)


def complete(sizes: Mapping[str, int]) -> set[int]:
    """Indices of the shards that a listing has all files of."""
    found: Counter[str] = Counter(match[1] for match in map(_FILE_NAME.fullmatch, sizes) if match)
    return {int(name) for name, files in found.items() if files == len(shards.SUFFIXES) + 1}


def read_listed(output_url: str, sizes: Mapping[str, int], known: Set[int] = frozenset()) -> Iterator[Receipt]:
    """:func:`read` of a listing, name to size, without the shards whose index is ``known``.

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
            return b""  # gone since the listing, and no receipt either

    def receipt_in(data: bytes, stem: str) -> Receipt | None:
        try:
            receipt = Receipt.from_json(data)
        except ValueError:
            return None
        found = {kind: sizes.get(stem + suffix) for kind, suffix in shards.SUFFIXES.items()}
        said = {kind: entry.size for kind, entry in receipt.files.items()}
        own = receipt.shard.name == stem and receipt.shard.index == int(stem)
        return receipt if own and found == said else None

    # Threads wait for the storage and do nothing else: there is one interpreter, which they would only pass around.
    with ThreadPoolExecutor(_READERS) as threads:
        for begin in range(0, len(stems), _RECEIPTS_AT_ONCE):
            batch = stems[begin : begin + _RECEIPTS_AT_ONCE]
            # A piece for each thread: handing over one receipt would take longer than reading it from a disk.
            step = math.ceil(len(batch) / _READERS)
            pieces = [batch[first : first + step] for first in range(0, len(batch), step)]
            contents = itertools.chain.from_iterable(threads.map(lambda piece: [*map(content, piece)], pieces))
            yield from filter(None, map(receipt_in, contents, batch))
