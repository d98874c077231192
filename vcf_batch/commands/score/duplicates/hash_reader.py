"""What a search compares, read from the parquets of an output."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa

from vcf_batch.commands.export.sources import REFERENCE_HASH
from vcf_batch.commands.score.duplicates import near_hashes
from vcf_batch.commands.score.duplicates.comparison import Comparison, HashComparison, TokenComparison
from vcf_batch.commands.score.duplicates.search import REFERENCE_PHASH
from vcf_batch.commands.score.duplicates.searched_rows import Compared, SearchedShard
from vcf_batch.commands.score.duplicates.tokens import ReferenceTokens
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output import shards
from vcf_batch.output.output import Output
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.records import Shard


class HashReader:
    """Reader of the hashes that a search by ``phash`` compares. Threads may share it.

    Args:
        output: the output.
        definition: the search.
        columns: names of the columns of the output's parquets.
    """

    def __init__(self, output: Output, definition: ScoreDefinition, columns: Collection[str]) -> None:
        self._output, self._definition = output, definition
        self._by_phash = definition.fields["references"] == "phash"
        column = REFERENCE_PHASH if self._by_phash else REFERENCE_HASH
        self._wanted = ["key", "status", "phash", "reference", *([column] if column in columns else [])]
        self._tokens = ReferenceTokens(output)

    def comparisons(self) -> dict[str, Comparison]:
        """The comparison for each column of the search."""
        images, references = (column.name for column in self._definition.columns)
        distance = self._definition.fields["distance"]
        return {
            images: HashComparison(distance),
            references: HashComparison(distance) if self._by_phash else TokenComparison(),
        }

    def read(self, shard: Shard) -> SearchedShard:
        """Read what the search needs of a shard.

        Raises:
            UsageError: a hash is none, or the manifest is needed and not there.
            DamageFound: the parquet cannot be read.
            StorageError: the storage failed.
        """
        name = shards.file_name(shard, "parquet")
        try:
            with shards.open_parquet(shards.file_url(self._output.url, shard, "parquet")) as parquet:
                table = parquet.read(self._wanted, use_threads=False)
            succeeded = np.array([status == "success" for status in table["status"].to_pylist()], bool)
            images = table.filter(pa.array(succeeded))
            hashes = np.array([int(value, 16) for value in images["phash"].to_pylist()], np.uint64)
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamageFound(f"{name} of {self._output.url} cannot be read: {told}; see 'vcf-batch verify'") from error
        if len(table) != len(shard):
            raise DamageFound(f"{name} of {self._output.url} has {len(table)} rows, its receipt says {len(shard)}")
        tokens, errors = self._references(shard, images)
        values: Any = [token for token in tokens if token is not None]
        if self._by_phash:
            values = np.array([int.from_bytes(value) for value in values], np.uint64)
        has = np.zeros(len(table), bool)
        has[succeeded] = [token is not None for token in tokens]
        keys, reason = table["key"].combine_chunks(), next(iter(errors), None)
        return SearchedShard(keys, Compared(succeeded, hashes), Compared(has, values), len(errors), reason)

    def _references(self, shard: Shard, images: pa.Table) -> tuple[list[bytes | None], list[str]]:
        """What tells the reference of each image from others, and why references cannot be read."""
        column = self._wanted[-1]
        keys, names = images["key"].to_pylist(), images["reference"].to_pylist()
        given = images[column].to_pylist() if column != "reference" else [None] * len(images)
        if self._by_phash:
            return [_phash(key, value) for key, value in zip(keys, given, strict=True)], []
        return self._tokens.tokens(shard, keys, names, given)


def _phash(key: str, value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        token = bytes.fromhex(value)
    except ValueError:
        token = b""
    if len(token) != near_hashes.BITS // 8:
        raise UsageError(
            f"{REFERENCE_PHASH} of row {key!r} is {value[:40]!r}; it must be 16 hex digits, or null. Mend the "
            "manifest, or rename the column, for a new run"
        )
    return token
