"""Choose what a repair redoes: damaged and missing shards, and the rows that a condition selects or a file names."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import pyarrow as pa

from vcf_batch.commands.verify import Finding, check, check_receipts
from vcf_batch.commands.verifying.processes import default_processes, read_in_processes
from vcf_batch.driver.progress import plural, steps
from vcf_batch.errors import DamageFound, UsageError, VcfBatchError
from vcf_batch.manifest.columns import shown
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.output.scores.joined import JoinedScores
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import RowMask, Shard
from vcf_batch.report.condition import Condition
from vcf_batch.setup.job import schema_of

JUDGED_AT_ONCE = 1 << 14
"""Rows that a condition is evaluated for at once, but for those of the last shard."""
_PIECE = 16
"""Most shards that are read one after the other by a thread: to hand over a single one takes as long as to read it."""
_PIECE_ROWS = 4096
"""About the most rows of these shards."""
SHOWN_KEYS = 5
"""Keys of a file that are shown in a message."""


class Repair:
    """The choice of the shards and rows that a repair redoes.

    Args:
        output: the output.
        where: the condition, see :class:`vcf_batch.report.condition.Condition`.
        trust_receipts: whether a shard counts as whole if its files have the sizes in its receipt. Else all files are
            read first, as :func:`vcf_batch.commands.verify.check` does.
        keys: keys of rows to redo, beside those that the condition selects.
        processes: number of processes that read; None chooses by what there is to read.

    Raises:
        UsageError: ``where`` is not a condition on the output's columns, no row has one of the keys, or the manifest
            cannot be read.
        RefusedError: the manifest has changed since the run.
    """

    def __init__(
        self,
        output: Output,
        where: str,
        trust_receipts: bool = False,
        keys: Collection[str] = (),
        processes: int | None = None,
    ) -> None:
        manifest = output.need_manifest()
        self._output, self._trust_receipts, self._processes = output, trust_receipts, processes
        scores = JoinedScores(output.url)
        self._condition = Condition(where, scores.schema(schema_of(output.config, manifest)))
        self._reader = _ColumnReader(output.url, self._condition.columns, scores.with_any(self._condition.columns))
        self._keys = frozenset(keys)
        self._refuse_unknown_keys(manifest)

    def rows(self, show: Callable[[str], None]) -> dict[int, RowMask]:
        """Read the output and choose the rows to redo.

        Args:
            show: called with a line for each damaged or missing shard, and with a summary at the end.

        Returns:
            See :attr:`vcf_batch.setup.job.Job.redo`.

        Raises:
            UsageError: the condition does not fit a row.
            DamageFound: the output has damage that generating again cannot repair.
            StorageError: the storage failed.
        """
        redo: dict[int, RowMask] = {}
        for finding in self._findings():
            if finding.shard is None and finding.is_damage:
                raise DamageFound(str(finding))
            show(str(finding))
            if finding.shard is not None:
                redo[finding.shard.index] = bytes([True]) * len(finding.shard)
        whole = (shard for shard in self._output.plan if shard.index not in redo)
        count = len(self._output.plan) - len(redo)
        for shard, selected in steps(self._each(whole, count), "judging", count, "shard"):
            if isinstance(selected, DamageFound):
                show(f"{shard.name}: {selected}")
                redo[shard.index] = bytes([True]) * len(shard)
            elif any(selected):
                redo[shard.index] = selected
        if self._trust_receipts:
            keeping = [self._output.plan[index] for index, selected in redo.items() if not all(selected)]
            for shard, has_receipt in side_by_side(self._has_receipt, keeping):
                if not has_receipt:
                    show(f"{shard.name}: its receipt is damaged, and tells nothing of the samples that would stay")
                    redo[shard.index] = bytes([True]) * len(shard)
        rows = sum(selected.count(True) for selected in redo.values())
        where = plural(len(redo), "shard")
        show(f"{plural(rows, 'row')} in {where} {'is' if rows == 1 else 'are'} to be generated again")
        return redo

    def _has_receipt(self, shard: Shard) -> bool:
        """Whether a shard has a receipt of the run, which tells the device of the samples that stay."""
        receipt = receipts.read_one(self._output.url, shard)
        return receipt is not None and receipt.fingerprint in self._output.fingerprints

    def _findings(self) -> Iterator[Finding]:
        if self._trust_receipts:
            return check_receipts(self._output)
        return check(self._output, processes=self._processes or default_processes(self._output.plan.num_rows))

    def _refuse_unknown_keys(self, manifest: Manifest) -> None:
        """Refuse keys that no row of the manifest has, which knows those of damaged shards too."""
        if not self._keys:
            return
        if unknown := sorted(self._keys.difference(manifest.keys())):
            told = ", ".join(shown(key) for key in unknown[:SHOWN_KEYS])
            told += f" and {len(unknown) - SHOWN_KEYS:,} more" if len(unknown) > SHOWN_KEYS else ""
            keys = f"{plural(len(self._keys), 'key')} of --keys {'is' if len(unknown) == 1 else 'are'}"
            rows = plural(self._output.plan.num_rows, "row")
            raise UsageError(
                f"{len(unknown):,} of {keys} of no row of {self._output.url}, which has {rows}: {told}. "
                "Take them out of the file, or name the output that they are of"
            )

    def _each(self, some: Iterable[Shard], count: int) -> Iterator[tuple[Shard, RowMask | DamageFound]]:
        """The rows of each shard that are selected or named, or what is wrong with its parquet.

        Many shards are judged at once, as a query takes longer than its rows do.
        """
        waiting: list[tuple[Shard, pa.Table]] = []
        rows = 0
        left, size = iter(some), min(_PIECE, 1 + count // 1000, 1 + _PIECE_ROWS // self._output.plan.shard_size)
        processes = min(self._processes or default_processes(count), 1 + count // size)
        pieces = iter(lambda: [*itertools.islice(left, size)], [])
        read = (zip(piece, found, strict=True) for piece, found in read_in_processes(self._reader, pieces, processes))
        for shard, found in itertools.chain.from_iterable(read):
            if isinstance(found, DamageFound):
                yield shard, found
                continue
            if rows >= JUDGED_AT_ONCE or (waiting and not found.schema.equals(waiting[0][1].schema)):
                yield from self._judge(waiting)
                waiting, rows = [], 0
            waiting.append((shard, found))
            rows += found.num_rows
        yield from self._judge(waiting)

    def _judge(self, waiting: Sequence[tuple[Shard, pa.Table]]) -> Iterator[tuple[Shard, RowMask]]:
        """The rows that are selected or named, of shards with the same columns. A run has each key once."""
        if waiting:
            selected = self._condition.keys(pa.concat_tables(table for _, table in waiting))
            for shard, table in waiting:
                yield shard, bytes(key in selected or key in self._keys for key in table["key"].to_pylist())


class _ColumnReader:
    """Reader of the columns that a condition needs. Picklable, and threads may share it.

    Args:
        output_url: the output.
        columns: names of columns of its rows or of its scores.
        scores: its scores.
    """

    def __init__(self, output_url: str, columns: Collection[str], scores: JoinedScores) -> None:
        self._output_url, self._columns, self._scores = output_url, [*columns], scores

    def __call__(self, some: Sequence[Shard]) -> list[pa.Table | DamageFound]:
        """For each shard its columns, or what is wrong with its parquet.

        Raises:
            StorageError: the storage failed.
            DamageFound: the scores of a shard are damaged.
        """
        return [self._read_or_fault(shard) for shard in some]

    def _read_or_fault(self, shard: Shard) -> pa.Table | DamageFound:
        try:
            found = self._read(shard)
        except VcfBatchError:
            raise
        # A damaged file may hold anything.
        except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
            return DamageFound(f"its columns cannot be read: {str(error).partition(chr(10))[0]}")
        if found.num_rows != len(shard):
            return DamageFound(f"its parquet has {found.num_rows} rows, and it has {len(shard)}")
        return found

    def _read(self, shard: Shard) -> pa.Table:
        with shards.open_parquet(shards.file_url(self._output_url, shard, "parquet")) as parquet:
            # It leaves out columns that are not there. To ask for the schema first takes as long as to read.
            table = parquet.read(self._columns, use_threads=False)
        if table.num_columns < len(self._columns):
            receipt = receipts.read_one(self._output_url, shard)
            if receipt is None:
                raise ValueError(f"{shard.name}{receipts.RECEIPT_SUFFIX} is damaged, so its scores cannot be found")
            batches = self._scores.batches(table.to_batches(), shard, receipt.parquet_hash)
            table = pa.Table.from_batches(batches, self._scores.schema(table.schema))
        return table.select(self._columns)
