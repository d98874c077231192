"""The scores of an output: their definitions, and the files of each shard, put into their places and found again."""

import functools
import io
import json
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch import storage
from vcf_batch.errors import DamageFound, RefusedError, StorageError
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import RECEIPT_SUFFIX, Damaged, Receipt
from vcf_batch.output.scores.definition import (
    CALIBRATION_NAME,
    SCORES_FOLDER,
    ColumnType,
    ScoreColumn,
    ScoreDefinition,
)
from vcf_batch.output.scores.receipt import ScoreReceipt, among
from vcf_batch.output.shards import ROWS_PER_GROUP
from vcf_batch.records import Shard

PARQUET = ".parquet"
_MOST_BYTES = 1 << 22
_TYPES: Mapping[ColumnType, pa.DataType] = {"number": pa.float64(), "key": pa.string(), "vector": pa.binary()}


class ScoreStore:
    """The scores of an output. Threads may share it.

    Args:
        output_url: the output.
    """

    def __init__(self, output_url: str) -> None:
        self._output = output_url
        self._folder = storage.join(output_url, SCORES_FOLDER)

    @functools.cached_property
    def among(self) -> str:
        """The digest of the finished shards, see :func:`vcf_batch.output.scores.receipt.among`. It is read once.

        Raises:
            StorageError: the storage failed.
        """
        finished = (found for found in Output(self._output).examine() if isinstance(found, Receipt))
        return among((found.shard.name, found.parquet_hash) for found in finished)

    def definitions(self) -> list[ScoreDefinition]:
        """The scores that the output has, whether every shard has them or not, by their names.

        Raises:
            DamageFound: a definition is damaged.
            StorageError: the storage failed.
        """
        with storage.refusals_as_storage_errors():
            names = sorted(name for name in storage.list_files(self._folder) if name.endswith(".json"))
        found = (self.definition(name.removesuffix(".json")) for name in names if name != CALIBRATION_NAME)
        return [each for each in found if each is not None]

    def definition(self, name: str) -> ScoreDefinition | None:
        """The definition of a score; None if there is none.

        Raises:
            DamageFound: it is damaged.
            StorageError: the storage failed.
        """
        place = f"{SCORES_FOLDER}/{name}.json"
        try:
            with storage.refusals_as_storage_errors():
                found = ScoreDefinition.from_json(storage.read_bytes(storage.join(self._output, place), _MOST_BYTES))
        except FileNotFoundError:
            return None
        except (storage.NotAFileError, ValueError) as error:
            raise DamageFound(
                f"{place} is damaged: {error}; delete it and the folder {SCORES_FOLDER}/{name}, and score again"
            ) from error
        if found.name != name:
            raise DamageFound(f"{place} is the definition of {found.name!r}; delete it, and score again")
        return found

    def claim(self, definition: ScoreDefinition, publish: bool = True) -> ScoreDefinition:
        """Publish a definition, or find that the output has this very score. For the owner of the output.

        The definition of a score that no shard has yet is replaced.

        Args:
            definition: the score.
            publish: whether the definition is written.

        Returns:
            The definition, with the columns that are there.

        Raises:
            RefusedError: the score is there by other models or settings, or with other columns.
            DamageFound: its definition is damaged.
            StorageError: the storage failed.
        """
        there = self.definition(definition.name)
        if there is not None and there.fingerprint != definition.fingerprint and self.count(there.name):
            raise RefusedError(_difference(self._output, there, definition))
        if there is not None and there.fingerprint == definition.fingerprint:
            if not definition.columns or there.columns == definition.columns:
                return there
            if there.columns:
                names = [", ".join(column.name for column in each.columns) for each in (there, definition)]
                raise RefusedError(
                    f"the score {there.name!r} of {self._output} has the columns {names[0]}, and now gives {names[1]}: "
                    f"give it another name, as in --with {definition.fields['kind']}:NAME=..."
                )
        if publish:
            storage.publish_bytes(storage.join(self._folder, f"{definition.name}.json"), definition.to_json())
        return definition

    def found(self, definition: ScoreDefinition, shard: Shard, parquet_hash: str) -> ScoreReceipt | Damaged | None:
        """The receipt of a shard's scores; None if the shard, as it is now, was not scored.

        Those of a search count as absent too once any other shard has changed, or one more is finished.

        Args:
            definition: a score of the output.
            shard: the shard.
            parquet_hash: hex SHA-256 of the shard's own parquet by its receipt.

        Raises:
            StorageError: the storage failed.
        """
        name = f"{definition.name}/{shard.name}"
        try:
            with storage.refusals_as_storage_errors():
                data = storage.read_bytes(storage.join(self._folder, name + RECEIPT_SUFFIX), _MOST_BYTES)
            there = ScoreReceipt.from_json(data)
        except FileNotFoundError:
            return None
        except (storage.NotAFileError, ValueError) as error:
            return Damaged(name, f"{name}{RECEIPT_SUFFIX} is damaged: {error}")
        if there.of != parquet_hash or (definition.is_search and there.among != self.among):
            return None
        if there.fingerprint != definition.fingerprint or there.shard != shard:
            return Damaged(name, f"{name}{RECEIPT_SUFFIX} is that of another score or shard")
        try:
            with storage.refusals_as_storage_errors():
                size = storage.size(storage.join(self._folder, name + PARQUET))
        except (FileNotFoundError, storage.NotAFileError):
            return Damaged(name, f"{name}{PARQUET} is missing")
        if size != there.parquet.size:
            return Damaged(name, f"{name}{PARQUET} has {size} bytes, its receipt says {there.parquet.size}")
        return there

    def count(self, name: str) -> int:
        """Number of shards with a receipt of a score, by one listing; those of shards replaced since count too.

        Raises:
            StorageError: the storage failed.
        """
        with storage.refusals_as_storage_errors():
            return sum(file.endswith(RECEIPT_SUFFIX) for file in storage.list_files(storage.join(self._folder, name)))

    def commit(self, definition: ScoreDefinition, parquet: bytes, receipt: ScoreReceipt) -> None:
        """Put the scores of a shard into their place: the older receipt goes first, and the new one comes last.

        Only the owner of the output calls this, right after it has confirmed its lease. If it is suspended in here and
        loses the lease, what it writes does no harm: a score of a shard that has changed since counts as absent, and
        that of another one is the same.

        Raises:
            StorageError: the storage failed.
        """
        place = storage.join(self._folder, definition.name, receipt.shard.name)
        storage.remove(place + RECEIPT_SUFFIX, missing_ok=True)
        storage.publish_bytes(place + PARQUET, parquet)
        storage.publish_bytes(place + RECEIPT_SUFFIX, receipt.to_json())

    def read(self, definition: ScoreDefinition, shard: Shard) -> pa.Table:
        """The scores of a shard that has a receipt: ``key``, then the columns of the score.

        Raises:
            DamageFound: the file is missing, or is not what scoring writes.
            StorageError: the storage failed.
        """
        place = f"{SCORES_FOLDER}/{definition.name}/{shard.name}{PARQUET}"
        expected = schema(definition)
        try:
            with storage.refusals_as_storage_errors(), storage.open_read(storage.join(self._output, place)) as file:
                table = pq.read_table(file, use_threads=False)
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamageFound(f"{place} cannot be read: {told}; delete it, and score again") from error
        if table.schema.names == ["key"]:  # of a function that no row of the shard was shown to
            nulls = [pa.nulls(table.num_rows, field.type) for field in [*expected][1:]]
            table = pa.table([table["key"], *nulls], schema=expected)
        if not table.schema.equals(expected) or table.num_rows != len(shard):
            raise DamageFound(
                f"{place} has {table.num_rows} rows of {', '.join(table.schema.names)}; the shard has {len(shard)}, "
                f"and the score {', '.join(expected.names)}: delete it, and score again"
            )
        return table


def schema(definition: ScoreDefinition) -> pa.Schema:
    """The schema of a score's parquets."""
    return pa.schema([("key", pa.string()), *map(field_of, definition.columns)])


def field_of(column: ScoreColumn) -> pa.Field:
    """The field of a column in tables."""
    return pa.field(column.name, _TYPES[column.type])


def parquet_bytes(
    definition: ScoreDefinition, keys: Sequence[str], values: Mapping[str, Sequence[float | str | bytes | None]]
) -> bytes:
    """The parquet of a shard's scores. The same values give the same bytes, with the same version of pyarrow.

    Args:
        keys: the keys of the shard's rows, in order.
        values: the values of each column of the definition, one for each key.
    """
    own = schema(definition)
    columns = [pa.array(keys, pa.string()), *(pa.array(values[field.name], field.type) for field in [*own][1:])]
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=own), file, row_group_size=ROWS_PER_GROUP)
    return file.getvalue()


def _difference(output_url: str, there: ScoreDefinition, now: ScoreDefinition) -> str:
    names = sorted(there.fields.keys() | now.fields.keys())
    lines = "".join(
        f"  {name}: {json.dumps(there.fields.get(name))} there, {json.dumps(now.fields.get(name))} now\n"
        for name in names
        if there.fields.get(name) != now.fields.get(name)
    )
    return (
        f"{output_url} has a score {now.name!r} already, by other models or settings; they differ in:\n{lines}"
        f"Give this one another name, as in --with {now.fields['kind']}:NAME=..., or delete {SCORES_FOLDER}/{now.name} "
        f"and {SCORES_FOLDER}/{now.name}.json there."
    )
