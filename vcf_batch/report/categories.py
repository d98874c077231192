"""Counts of rows by the values of carried columns, before gates and after them."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from vcf_batch.manifest.carried import is_string
from vcf_batch.output_columns import COLUMNS

MOST_VALUES = 20
"""Most values of a column that is counted. Columns with more, such as captions, are no categories."""
LONGEST_VALUE = 80
"""Most characters of a value that is shown."""

NOT_CATEGORIES = frozenset({"run_fingerprint", "split"})


class Categories:
    """Counts of rows by value and status, for each carried column of few values. Memory does not grow with rows."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[tuple[str, str]]] = {}
        self._dropped: set[str] = set()

    def columns(self, schema: pa.Schema) -> list[str]:
        """The carried columns of a shard that are worth reading: texts, integers and truth values."""
        return [
            field.name
            for field in schema
            if field.name not in COLUMNS
            and field.name not in self._dropped | NOT_CATEGORIES
            and any(fits(field.type) for fits in (is_string, types.is_integer, types.is_boolean))
        ]

    def add(self, table: pa.Table) -> None:
        """Count the rows of a shard, a table with ``status`` and any of :meth:`columns`."""
        for name in self.columns(table.schema):
            if not types.is_null(table[name].type):
                self._add(name, table)

    def _add(self, name: str, table: pa.Table) -> None:
        values = pc.fill_null(table[name].cast(pa.string()), "(none)")
        groups = pa.table({"value": values, "status": table["status"]}).group_by(["value", "status"])
        if len(pc.unique(values)) <= MOST_VALUES:
            own = self._counts.setdefault(name, Counter())
            for record in groups.aggregate([([], "count_all")]).to_pylist():
                own[record["value"], record["status"]] += record["count_all"]
            if len({value for value, _ in own}) <= MOST_VALUES:
                return
        self._dropped.add(name)
        self._counts.pop(name, None)

    def tables(self) -> list[dict[str, object]]:
        """A table for each column with two values or more: name, heads, and a line for each value, the most frequent
        first. Columns whose values differ in every row are left out."""
        told: list[dict[str, object]] = []
        for name, counts in self._counts.items():
            rows: Counter[str] = Counter()
            for (value, _), count in counts.items():
                rows[value] += count
            if len(rows) > 1 and (len(rows) < rows.total() or rows.total() < 3):
                told.append({"name": name, "lines": [self._line(counts, value) for value, _ in rows.most_common()]})
        return told

    def _line(self, counts: Counter[tuple[str, str]], value: str) -> list[object]:
        own = {status: counts[value, status] for status in ("success", "rejected", "failed")}
        shown = value if len(value) <= LONGEST_VALUE else value[: LONGEST_VALUE - 1] + "…"
        return [shown, sum(own.values()), own["rejected"], own["failed"], own["success"]]
