"""An output for those who work with it in Python: its rows, images and sums, and its cell in a notebook."""

import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.output import receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.scores.joined import JoinedScores
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import Shard
from vcf_batch.report import notebook_cell, status, thumbnails
from vcf_batch.report.condition import Condition
from vcf_batch.report.figures import parquet_of
from vcf_batch.report.status import Status

_FOUND = ["key", "status", "error_message"]


class OpenOutput(Output):
    """An output that a run has written, finished or not: ``vcf_batch.Output("out/demo")``.

    Nothing is written. What is not committed, or is damaged, is left out; ``vcf-batch verify`` names it. In a notebook,
    an output that is the last line of a cell shows its state, its model and its first pictures.

    Args:
        url: folder or URL that a run has written.
        changes: settings that have changed, such as ``{"manifest": URL}`` of a manifest that has moved.

    Raises:
        UsageError: there is no output.
        RefusedError: another version of vcf-batch wrote it.
        DamageFound: ``run.json`` is missing or damaged.
        StorageError: the storage failed.
    """

    def rows(self, where: str | None = None) -> Iterator[dict[str, Any]]:
        """Rows of the finished shards, in the order of the manifest, each as a dictionary of its columns.

        Scores that were added to the output are further columns.

        They are streamed: one row group, of :data:`vcf_batch.output.shards.ROWS_PER_GROUP` rows, is held at once.
        ``pandas.DataFrame(output.rows(...))`` holds them all.

        Args:
            where: a condition in SQL on the columns, such as ``status = 'success' AND clip_score > 0.3``, as ``repair``
                takes it; None gives all rows. It is checked at once, if a shard is finished.

        Raises:
            UsageError: ``where`` is not a condition on the columns.
            DamageFound: a parquet cannot be read.
            StorageError: the storage failed.
        """
        finished = (found for found in self.examine() if isinstance(found, Receipt))
        first = next(finished, None)
        if first is None:
            return iter(())
        scores, condition = JoinedScores(self.url), None
        if where is not None:
            with parquet_of(self, first.shard) as parquet:
                condition = Condition(where, scores.schema(parquet.schema_arrow))
        return self._rows(itertools.chain((first,), finished), scores, condition)

    def image(self, key: str) -> Image.Image:
        """The image of a row.

        Its shard is found by its keys, of which no more than one row group is held at once for each of
        :data:`vcf_batch.output.shards.SHARD_READERS` threads. A key that is a row's number is looked for in its own
        shard first.

        Args:
            key: the row's key, see the column ``key``.

        Returns:
            An RGB image.

        Raises:
            UsageError: no finished shard has a row with this key, or the row has no image.
            DamageFound: a file of the shard cannot be read.
            StorageError: the storage failed.
        """
        shard, row = self._find(key)
        if row["status"] != "success":
            raise UsageError(f"row {key!r} has no image, it is {row['status']}: {row['error_message']}")
        return thumbnails.picture(shards.file_url(self.url, shard, "tar"), key, self.config.image_format)

    def summary(self) -> Status:
        """The state of the run: rows by status, means of the scores, speed, devices, causes of failures.

        ``print`` tells it in words as ``vcf-batch status`` does, and its ``to_dict()`` has plain JSON types.

        Raises:
            DamageFound: a parquet is damaged.
            StorageError: the storage failed.
        """
        return status.of(self)

    def __repr__(self) -> str:
        return f"Output({notebook_cell.address(self)!r})"

    def _repr_html_(self) -> str:
        return notebook_cell.render(self)

    def _rows(
        self, finished: Iterator[Receipt], scores: JoinedScores, condition: Condition | None
    ) -> Iterator[dict[str, Any]]:
        for receipt in finished:
            with parquet_of(self, receipt.shard) as parquet:
                rows = parquet.iter_batches(shards.ROWS_PER_GROUP, use_threads=False)
                for batch in scores.batches(rows, receipt.shard, receipt.parquet_hash) if scores.definitions else rows:
                    if condition is not None:
                        keys = condition.keys(pa.Table.from_batches([batch]))
                        batch = batch.filter(pa.array([key in keys for key in batch["key"].to_pylist()]))
                    yield from batch.to_pylist()

    def _find(self, key: str) -> tuple[Shard, dict[str, Any]]:
        """The finished shard with a key, and the values of its row."""
        with storage.refusals_as_storage_errors():
            complete = receipts.complete(storage.list_files(self.url))
        indices = [index for index in sorted(complete) if index < len(self.plan)]
        # A stable sort: the shard of the row with this number comes first.
        likely = self.plan.index_of(int(key)) if key.isascii() and key.isdecimal() else None
        indices.sort(key=lambda index: index != likely)
        there = (self.plan[index] for index in indices)
        for shard, row in side_by_side(lambda shard: self._row_of(shard, key), there):
            receipt = receipts.read_one(self.url, shard) if row else None
            if row and receipt and receipt.fingerprint in self.fingerprints:
                return shard, row
        raise UsageError(
            f"none of the {len(indices):,} finished shards has a row with the key {key!r}; rows() has the column 'key'"
        )

    def _row_of(self, shard: Shard, key: str) -> dict[str, Any] | None:
        """The values of a key's row; None if the shard has no such row."""
        with parquet_of(self, shard) as parquet:
            for group in range(parquet.num_row_groups):
                if not _may_hold(parquet.metadata.row_group(group), key):
                    continue
                table = parquet.read_row_group(group, _FOUND, use_threads=False)
                for row in table.filter(pc.equal(table["key"], key)).to_pylist():
                    return row
        return None


def _may_hold(group: pq.RowGroupMetaData, key: str) -> bool:
    """Whether a row group may have a key, as the statistics of its column tell."""
    columns = (group.column(place) for place in range(group.num_columns))
    found = next((column.statistics for column in columns if column.path_in_schema == "key"), None)
    return found is None or not found.has_min_max or found.min <= key <= found.max
