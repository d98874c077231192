"""The embeddings that a search by a CLIP compares, read from a score of the output that holds them."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from vcf_batch.commands.score.duplicates.comparison import Comparison
from vcf_batch.commands.score.duplicates.near_embeddings import SAMPLED, EmbeddingComparison, clusters
from vcf_batch.commands.score.duplicates.searched_rows import Compared, SearchedShard
from vcf_batch.errors import DamageFound, Unfinished
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged
from vcf_batch.output.scores.definition import SCORES_FOLDER, ScoreDefinition
from vcf_batch.output.scores.receipt import ScoreReceipt
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import Shard

_WIDTH = np.dtype("<f2")


class EmbeddingReader:
    """Reader of the embeddings that a search by ``clip`` compares. Threads may share it.

    Args:
        output: the output.
        definition: the search.
        embedding: the score that holds the embeddings.
        finished: the shards, each with the hex SHA-256 of its parquet.
    """

    def __init__(
        self, output: Output, definition: ScoreDefinition, embedding: ScoreDefinition, finished: Mapping[Shard, str]
    ) -> None:
        self._output, self._definition, self._embedding, self._finished = output, definition, embedding, finished
        self._store = ScoreStore(output.url)

    def comparisons(self) -> dict[str, Comparison]:
        """The comparison for each column of the search. Of many rows, some whole shards are the sample.

        Raises:
            UsageError: faiss is not installed.
            Unfinished, DamageFound, StorageError: see :meth:`read`.
        """
        rows, shards = sum(map(len, self._finished)), [*self._finished]
        number = clusters(rows)
        sampled = [shards[0]]
        if number > 1:
            sampled = shards[:: max(1, rows // (SAMPLED * number))]
        parts = [(part.images.values, part.references.values) for _, part in side_by_side(self.read, sampled)]
        names = (column.name for column in self._definition.columns)
        cosine = self._definition.fields["cosine"]
        return {
            name: EmbeddingComparison(cosine, rows, _joined(own))
            for name, own in zip(names, zip(*parts, strict=True), strict=True)
        }

    def read(self, shard: Shard) -> SearchedShard:
        """Read the embeddings of a shard.

        Raises:
            Unfinished: it has none.
            DamageFound: they cannot be read.
            StorageError: the storage failed.
        """
        found = self._store.found(self._embedding, shard, self._finished[shard])
        if isinstance(found, Damaged):
            raise DamageFound(f"{found.reason}; delete it, and search again")
        if not isinstance(found, ScoreReceipt):
            raise Unfinished(f"shard {shard.name} of {self._output.url} came or changed meanwhile; rerun the command")
        table = self._store.read(self._embedding, shard)
        images, references = (self._compared(shard, table[column.name]) for column in self._embedding.columns)
        return SearchedShard(table["key"].combine_chunks(), images, references, found.without, found.reason)

    def _compared(self, shard: Shard, column: pa.ChunkedArray) -> Compared:
        values = [value for value in column.to_pylist() if value is not None]
        width = len(values[0]) if values else _WIDTH.itemsize
        if not width or width % _WIDTH.itemsize or any(len(value) != width for value in values):
            raise DamageFound(
                f"{SCORES_FOLDER}/{self._embedding.name}/{shard.name}.parquet has embeddings of different lengths; "
                "delete it, and search again"
            )
        has = column.is_valid().combine_chunks().to_numpy(zero_copy_only=False)
        return Compared(has, np.frombuffer(b"".join(values), _WIDTH).reshape(len(values), width // _WIDTH.itemsize))


def _joined(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """Embeddings of several shards, ``[s, D]``; ``[0, 1]`` for none."""
    there = [part for part in parts if len(part)]
    return np.concatenate(there) if there else np.empty((0, 1), _WIDTH)
