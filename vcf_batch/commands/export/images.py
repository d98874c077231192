"""The images of rows, read from the tars of the outputs as they are: no image is decoded or encoded again."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

from vcf_batch import storage
from vcf_batch.commands.export.shard_files import IMAGE
from vcf_batch.commands.export.sources import Sources, SourceShard, reading
from vcf_batch.errors import DamageFound
from vcf_batch.output import shards
from vcf_batch.storage import tar
from vcf_batch.storage.tar import Member


class ShardImages:
    """The images of a shard; a context manager. The tar is opened when the first one is asked for.

    Args:
        sources: the outputs.
        shard: a committed shard of theirs.
        names: those of :data:`vcf_batch.records.TRIPLET` that are read too. No row has their hash, so the whole tar is
            compared with its receipt before.
    """

    def __init__(self, sources: Sources, shard: SourceShard, names: tuple[str, ...]) -> None:
        self._sources, self._shard, self._names = sources, shard, names
        self._ending = shard.source.output.config.image_format
        self._stack = contextlib.ExitStack()
        self._members: Iterator[Member] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, record: Mapping[str, Any]) -> dict[str, bytes]:
        """The images of a row with an image, by name. Rows are asked for in their order.

        Raises:
            DamageFound: the tar is damaged, or has another image than the row says.
            StorageError: the storage failed.
        """
        with reading(self._shard), storage.refusals_as_storage_errors():
            if self._members is None:
                if self._names:
                    self._sources.check_hash(self._shard, "tar")
                url = shards.file_url(self._shard.source.output.url, self._shard.shard, "tar")
                self._members = tar.members(self._stack.enter_context(storage.open_read(url)))
            key = record["key"]
            wanted = {f"{key}.{self._ending}": IMAGE, **{f"{key}.{name}.{self._ending}": name for name in self._names}}
            found: dict[str, bytes] = {}
            for member in self._members:
                if member.name in wanted:
                    found[wanted[member.name]] = member.read()
                    if len(found) == len(wanted):
                        break
            else:
                raise DamageFound(f"{self._shard} has no image of row {key!r} in its tar; see 'vcf-batch verify'")
        if hashlib.sha256(found[IMAGE]).hexdigest() != record["sha256"]:
            raise DamageFound(
                f"{self._shard} has another image of row {key!r} than its parquet says; see 'vcf-batch verify'"
            )
        return found
