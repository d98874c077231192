"""``_scores/NAME/00000_stats.json``: the receipt of a shard's scores, written last."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vcf_batch.records import FileEntry, Shard


@dataclass(frozen=True, slots=True)
class ScoreReceipt:
    """The receipt of a shard's scores. Dates, timings and host names live only here, never in the parquet."""

    shard: Shard
    of: str
    """Hex SHA-256 of the parquet of the output's shard that was scored."""
    fingerprint: str
    """That of the score's definition."""
    fields: Mapping[str, Any]
    """Those of the score's definition: kind, identities of the models, settings."""
    parquet: FileEntry
    """Size and hash of the file of scores."""
    counts: Mapping[str, int]
    """Number of rows that have a value, by column."""
    means: Mapping[str, float | None]
    """Mean of those values, by column of numbers; None without one."""
    without: int = 0
    """Number of rows with an image that could not be scored."""
    reason: str | None = None
    """Why the first of them could not."""
    device: Mapping[str, Any] | None = None
    """The device type, as :func:`vcf_batch.worker.device_type.describe` tells it."""
    timings: Mapping[str, Any] | None = None
    among: str | None = None
    """Of a search, the digest of the shards that were searched, see :func:`among`; else None."""

    def to_json(self) -> bytes:
        """The receipt as indented UTF-8 JSON with sorted keys."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ScoreReceipt":
        """Read back :meth:`to_json`.

        Raises:
            ValueError: the bytes are not a receipt.
        """
        try:
            there = json.loads(data)
            there["shard"], there["parquet"] = Shard(**there["shard"]), FileEntry(**there["parquet"])
            receipt = cls(**there)
            shard, rows = receipt.shard, len(receipt.shard)
            numbers = [shard.index, shard.start, rows, receipt.parquet.size, receipt.without, *receipt.counts.values()]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(f"its numbers are {numbers}")
            if not all(type(mean) in (float, int, type(None)) for mean in receipt.means.values()):
                raise ValueError(f"its means are {dict(receipt.means)}")
            return receipt
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a receipt of scores: {error}") from error


def among(finished: Iterable[tuple[str, str]]) -> str:
    """Hex SHA-256 of a set of shards.

    Args:
        finished: the name of each shard and the hex SHA-256 of its parquet, in order.
    """
    digest = hashlib.sha256()
    for name, parquet_hash in finished:
        digest.update(f"{name} {parquet_hash}\n".encode())
    return digest.hexdigest()
