"""What tells references apart: the SHA-256 of their bytes."""

import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from vcf_batch.commands.export.references import REMEMBERED
from vcf_batch.commands.score.scoring import require_manifest
from vcf_batch.errors import RowError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.output.output import Output
from vcf_batch.records import Reference, Row, Shard


class ReferenceTokens:
    """What tells references apart: the SHA-256 of their bytes. Threads may share it.

    Args:
        output: the output. Its manifest is needed for references whose hashes are in no column.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._reader: ReferenceReader | None = None
        self._remembered = functools.lru_cache(REMEMBERED)(self._digest)

    def tokens(
        self, shard: Shard, keys: Sequence[str], names: Sequence[Any], given: Sequence[Any]
    ) -> tuple[list[bytes | None], list[str]]:
        """The hash of the reference of each image; of several references, their hashes one behind the other.

        Args:
            shard: the shard of the images.
            keys: their keys.
            names: their column ``reference``.
            given: their column :data:`REFERENCE_HASH`.

        Returns:
            The hashes, None without a reference, and why references cannot be read.

        Raises:
            UsageError: the manifest is needed, and cannot be read.
            StorageError: the storage failed.
        """
        found: dict[str, bytes | None] = {}
        unknown: set[str] = set()
        for key, name, value in zip(keys, names, given, strict=True):
            hashes = [value] if isinstance(value, str) else value or [None]
            if not name:
                found[key] = None
            elif all(hashes):
                found[key] = b"".join(map(bytes.fromhex, hashes))
            else:
                unknown.add(key)
        errors: list[str] = []
        for row in self._rows(shard) if unknown else ():
            if row.key in unknown:
                try:
                    found[row.key] = b"".join(map(self._hash, row.references))
                except RowError as error:
                    found[row.key] = None
                    errors.append(f"{row.key}: {error}")
        return [found.get(key) for key in keys], errors

    def _rows(self, shard: Shard) -> Iterator[Row]:
        with self._lock:
            if self._reader is None:
                require_manifest(self._output)
                config, base = self._output.config, self._output.need_manifest().base
                self._reader = ReferenceReader(base, config.reference_root, config.max_pixels)
        return self._output.manifest_rows(shard.start, shard.stop)

    def _hash(self, reference: Reference) -> bytes:
        if reference.sha256:
            return bytes.fromhex(reference.sha256)
        return self._digest(reference) if reference.data is not None else self._remembered(reference)

    def _digest(self, reference: Reference) -> bytes:
        assert self._reader
        return hashlib.sha256(self._reader.read_bytes(reference)).digest()
