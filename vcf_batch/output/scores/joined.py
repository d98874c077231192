"""The rows of an output with the columns of its scores beside them."""

import copy
from collections.abc import Collection, Iterable, Iterator

import pyarrow as pa

from vcf_batch.errors import DamageFound
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.output.scores.store import ScoreStore, field_of
from vcf_batch.records import Shard


class JoinedScores:
    """The scores of an output, joined to its rows by key. Threads may share it.

    A shard that lacks a score, as it was not scored or was replaced since, has null in its columns. Embeddings, which
    searches alone read, are left out.

    Args:
        output_url: the output.

    Raises:
        DamageFound: the definition of a score is damaged.
        StorageError: the storage failed.
    """

    def __init__(self, output_url: str) -> None:
        self._store = ScoreStore(output_url)
        self.definitions = [score for score in self._store.definitions() if not score.is_embedding]

    def with_any(self, columns: Collection[str]) -> "JoinedScores":
        """Those of the scores alone that have one of some columns, for other processes to read.

        Raises:
            StorageError: the storage failed.
        """
        found = copy.copy(self)
        found.definitions = [
            score for score in self.definitions if any(column.name in columns for column in score.columns)
        ]
        if any(score.is_search for score in found.definitions):
            _ = found._store.among  # all receipts are read for it, so not in each process
        return found

    @property
    def fields(self) -> list[pa.Field]:
        """A field for each column of each score, in the order of the scores' names."""
        return [field_of(column) for score in self.definitions for column in score.columns]

    def schema(self, rows: pa.Schema) -> pa.Schema:
        """The schema of an output's rows with these fields behind them."""
        return pa.schema([*rows, *self.fields])

    def lacking(self, receipt: Receipt) -> list[str]:
        """Names of the scores that a shard lacks.

        Raises:
            DamageFound: the scores of the shard are damaged.
            StorageError: the storage failed.
        """
        own = receipt.shard, receipt.parquet_hash
        return [score.name for score in self.definitions if not self._is_there(score, *own)]

    def entries(self, receipt: Receipt) -> list[str]:
        """Name and hash of each file of scores of a shard.

        Raises:
            StorageError: the storage failed.
        """
        own = receipt.shard, receipt.parquet_hash
        found = ((score.name, self._store.found(score, *own)) for score in self.definitions)
        return [f"{name} {each.parquet.sha256}" for name, each in found if each and not isinstance(each, Damaged)]

    def batches(self, rows: Iterable[pa.RecordBatch], shard: Shard, parquet_hash: str) -> Iterator[pa.RecordBatch]:
        """Rows of a shard, in order and from its first one on, with the columns of its scores behind their own.

        Args:
            rows: the rows, which have the column ``key``.
            shard: the shard.
            parquet_hash: hex SHA-256 of its parquet by its receipt.

        Raises:
            DamageFound: the scores of the shard are damaged, or are those of other rows.
            StorageError: the storage failed.
        """
        tables = [
            (score, self._store.read(score, shard) if self._is_there(score, shard, parquet_hash) else None)
            for score in self.definitions
        ]
        start = 0
        for batch in rows:
            columns = [*batch.columns]
            for score, table in tables:
                part = None if table is None else table.slice(start, batch.num_rows)
                if part is not None and part["key"].combine_chunks() != batch["key"]:
                    raise DamageFound(
                        f"the score {score.name!r} of shard {shard.name} has other keys than the shard; delete "
                        "its receipt, and score again"
                    )
                columns += [
                    pa.nulls(batch.num_rows, field_of(column).type)
                    if part is None
                    else part[column.name].combine_chunks()
                    for column in score.columns
                ]
            yield pa.RecordBatch.from_arrays(columns, schema=self.schema(batch.schema.remove_metadata()))
            start += batch.num_rows

    def _is_there(self, score: ScoreDefinition, shard: Shard, parquet_hash: str) -> bool:
        found = self._store.found(score, shard, parquet_hash)
        if isinstance(found, Damaged):
            raise DamageFound(f"{found.reason}; delete it, and score again")
        return found is not None
