"""A condition on the rows of an output, in SQL over the columns of its parquets.

DuckDB evaluates it and can read the rows only: no file, no network, no setting. What DuckDB does not close, the
condition may not name: its tables of settings, secrets and functions (by a subquery), and the functions that tell of
anything but their arguments, the clock and chance.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from vcf_batch.errors import UsageError

_CLOSED: dict[str, Any] = {
    "enable_external_access": False,
    "python_enable_replacements": False,
}

_CLOCK_AND_CHANCE = {
    *("now", "today", "current_date", "get_current_time", "get_current_timestamp", "transaction_timestamp"),
    *("random", "error"),
}
"""Functions that a condition may call although their result depends on more than their arguments."""

_WITHOUT_NAMES = ("STAR", "POSITIONAL_REFERENCE")
"""Expressions that stand for columns without naming them, such as ``COLUMNS(*)`` and ``#1``."""


class Condition:
    """A condition on a row. Threads may share it.

    Args:
        where: the condition, such as ``status = 'failed' OR clip_score < 0.2``.
        schema: the columns of the rows.
        is_repeatable: whether it has to select the same rows each time, so that clock and chance are refused.

    Raises:
        UsageError: ``where`` is not a condition on these columns.
    """

    def __init__(self, where: str, schema: pa.Schema, is_repeatable: bool = False) -> None:
        self._where, self._is_repeatable = where, is_repeatable
        self._database = duckdb.connect(":memory:", config=_CLOSED)
        # Times are compared with texts in this zone, wherever the process runs.
        self._database.execute("SET GLOBAL TimeZone = 'UTC'")
        self._database.execute("SET GLOBAL lock_configuration = true")
        self._columns = [field.name for field in schema if self._takes(field)]
        self.columns: Sequence[str] = self._columns
        """Columns that have to be in the rows of :meth:`keys`: the key, and those that the condition reads."""
        self._relation(schema.empty_table())
        self.columns = self._read(self._check_sight())
        self.keys(schema.empty_table())

    def keys(self, rows: pa.Table) -> set[str]:
        """Keys of the rows for which the condition is true.

        A call takes some milliseconds, whatever the number of rows: give many at once.

        Args:
            rows: a table with at least :attr:`columns`.

        Raises:
            UsageError: the condition does not fit a row.
        """
        relation = self._relation(rows)
        try:
            return {key for (key,) in relation.project("key").fetchall()}
        except duckdb.Error as error:
            raise self._not_a_condition(str(error)) from error

    def _relation(self, rows: pa.Table) -> duckdb.DuckDBPyRelation:
        """The rows for which the condition is true, not evaluated yet."""
        try:
            # Threads do not share a cursor.
            return self._database.cursor().from_arrow(rows.select([*self.columns])).filter(self._where)
        except duckdb.Error as error:
            raise self._not_a_condition(str(error)) from error

    def _check_sight(self) -> list[dict[str, Any]]:
        """Refuse a condition that sees more than a row; the objects of its syntax tree."""
        ((text,),) = self._database.execute("SELECT json_serialize_sql(?)", [f"SELECT (\n{self._where}\n)"]).fetchall()
        parsed = json.loads(text)
        if parsed["error"]:
            raise self._not_a_condition(parsed["error_message"])
        outside, columns = _functions_that_see_more(self._database), {name.lower() for name in self._columns}
        outside |= _CLOCK_AND_CHANCE - {"error"} if self._is_repeatable else set()
        nodes = [*_nodes(parsed)]
        for node in nodes:
            if node.get("class") == "SUBQUERY" or ("from_table" in node and node["from_table"]["type"] != "EMPTY"):
                raise self._not_a_condition("a subquery sees more than the row; write the values out")
            names = [node["function_name"]] if "function_name" in node else node.get("column_names", [])[:1]
            for name in map(str.lower, names):
                # Some functions are called without parentheses, unless a column has their name.
                if name in outside and ("function_name" in node or name not in columns):
                    raise self._not_a_condition(f"{name} sees more than the row; leave it out")
        return nodes

    def _read(self, nodes: list[dict[str, Any]]) -> list[str]:
        """The columns that a condition reads, and the key. All of them if it reads some without their names."""
        if any(node.get("class") in _WITHOUT_NAMES for node in nodes):
            return self._columns
        # A name may be that of a field or a parameter: to read a column more does not change the result.
        named = {name.lower() for node in nodes for name in node.get("column_names", [])}
        alike = Counter(name.lower() for name in self._columns)
        for name in self._columns:
            if name.lower() in named and alike[name.lower()] > 1:
                others = " and ".join(other for other in self._columns if other.lower() == name.lower())
                raise self._not_a_condition(f"{others} are one name in SQL, which tells no case of letters")
        return [name for name in self._columns if name == "key" or name.lower() in named]

    def _not_a_condition(self, reason: str) -> UsageError:
        return UsageError(
            f"{self._where!r} is not a condition on the columns {', '.join(self._columns)}: {reason.splitlines()[0]}"
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
