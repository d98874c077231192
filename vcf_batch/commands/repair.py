"""Choose what a repair redoes: damaged and missing shards, and the rows that a condition selects.

The condition is SQL over the columns of the parquets. DuckDB evaluates it and can read the rows only: no file, no
network, no setting. What DuckDB does not close, the condition may not name: its tables of settings, secrets and
functions (by a subquery), and the functions that tell of anything but their arguments, the clock and chance.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pyarrow as pa

from vcf_batch.commands.verify import check
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output import sample_records, shards
from vcf_batch.output.output import Output
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import RowMask, Shard

_CLOSED: dict[str, Any] = {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "lock_configuration": True,
}

_CLOCK_AND_CHANCE = {
    *("now", "today", "current_date", "get_current_time", "get_current_timestamp", "transaction_timestamp"),
    *("random", "error"),
}
"""Functions that a condition may call although their result depends on more than their arguments."""


class Repair:
    """The choice of the shards and rows that a repair redoes.

    Args:
        output: the output.
        where: a condition on a row of a parquet, such as ``status = 'failed' OR clip_score < 0.2``.

    Raises:
        UsageError: ``where`` is not a condition on the output's columns, or the manifest cannot be read.
        RefusedError: the manifest has changed since the run.
    """

    def __init__(self, output: Output, where: str) -> None:
        manifest = output.need_manifest()
        self._output, self._where = output, where
        self._database = duckdb.connect(":memory:", config=_CLOSED)
        schema = sample_records.schema(manifest.carried_schema, manifest.reference_is_list)
        self._columns = [field.name for field in schema if self._takes(field)]
        self._relation(schema.empty_table())
        self._check_sight()
        self._selected(schema.empty_table())

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
        for finding in check(self._output):
            if finding.shard is None and finding.is_damage:
                raise DamageFound(str(finding))
            show(str(finding))
            if finding.shard is not None:
                redo[finding.shard.index] = bytes([True]) * len(finding.shard)
        whole = (shard for shard in self._output.plan if shard.index not in redo)
        for shard, selected in side_by_side(self._selected_of, whole):
            if any(selected):
                redo[shard.index] = selected
        rows = sum(selected.count(True) for selected in redo.values())
        show(f"{rows:,} rows in {len(redo):,} shards are to be generated again")
        return redo

    def _selected_of(self, shard: Shard) -> RowMask:
        """The rows of a shard that the condition selects."""
        selected = bytearray()
        with shards.open_parquet(shards.file_url(self._output.url, shard, "parquet")) as parquet:
            for batch in parquet.iter_batches(shards.ROWS_AT_ONCE, use_threads=False):
                keys = self._selected(pa.Table.from_batches([batch]))
                selected += bytes(key in keys for key in batch["key"].to_pylist())
        return bytes(selected)

    def _selected(self, rows: pa.Table) -> set[str]:
        """Keys of the rows for which the condition is true."""
        relation = self._relation(rows)
        try:
            return {key for (key,) in relation.project("key").fetchall()}
        except duckdb.Error as error:
            raise self._not_a_condition(str(error)) from error

    def _relation(self, rows: pa.Table) -> duckdb.DuckDBPyRelation:
        """The rows for which the condition is true, not evaluated yet."""
        try:
            # Threads do not share a cursor.
            return self._database.cursor().from_arrow(rows.select(self._columns)).filter(self._where)
        except duckdb.Error as error:
            raise self._not_a_condition(str(error)) from error

    def _check_sight(self) -> None:
        """Refuse a condition that sees more than a row."""
        ((text,),) = self._database.execute("SELECT json_serialize_sql(?)", [f"SELECT (\n{self._where}\n)"]).fetchall()
        parsed = json.loads(text)
        if parsed["error"]:
            raise self._not_a_condition(parsed["error_message"])
        outside, columns = _functions_that_see_more(self._database), {name.lower() for name in self._columns}
        for node in _nodes(parsed):
            if node.get("class") == "SUBQUERY" or ("from_table" in node and node["from_table"]["type"] != "EMPTY"):
                raise self._not_a_condition("a subquery sees more than the row; write the values out")
            names = [node["function_name"]] if "function_name" in node else node.get("column_names", [])[:1]
            for name in map(str.lower, names):
                # Some functions are called without parentheses, unless a column has their name.
                if name in outside and ("function_name" in node or name not in columns):
                    raise self._not_a_condition(f"{name} sees more than the row; leave it out")

    def _not_a_condition(self, reason: str) -> UsageError:
        return UsageError(
            f"--where {self._where!r} is not a condition on the columns {', '.join(self._columns)}: "
            f"{reason.splitlines()[0]}"
        )

    def _takes(self, field: pa.Field) -> bool:
        """Whether DuckDB knows the field's type. It lacks half-precision floats and decimals of more than 38 digits."""
        try:
            self._database.from_arrow(pa.schema([field]).empty_table()).fetchall()
        except duckdb.NotImplementedException:
            return False
        return True


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of a JSON document."""
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def _functions_that_see_more(database: duckdb.DuckDBPyConnection) -> set[str]:
    """Names of the functions whose result depends on more than their arguments, as this DuckDB says of itself."""
    known = database.execute(
        "SELECT lower(function_name), function_type, stability, macro_definition FROM duckdb_functions()"
    ).fetchall()
    found = {"version"} | {name for name, kind, stability, _ in known if kind == "scalar" and stability != "CONSISTENT"}
    found -= _CLOCK_AND_CHANCE
    macros = {(name, frozenset(re.findall(r"\w+", body.lower()))) for name, _, _, body in known if body}
    while more := {name for name, words in macros if "select" in words or words & found} - found:
        found |= more
    return found
