"""The pass over all rows of a manifest before a run: what refuses it, and how many rows have what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vcf_batch.errors import ManifestError
from vcf_batch.manifest.columns import OPTIONS, shown
from vcf_batch.manifest.contract import SAFE_ID
from vcf_batch.manifest.repeats import RepeatFinder

if TYPE_CHECKING:
    from vcf_batch.manifest.manifest import Manifest

_SHOWN = 5
_ROWS_PER_CHECK = 65_536
_WEIGHT = r"\([^()]*:\s*[0-9]*\.?[0-9]+\s*\)"
"""A weight in a prompt as other programs read it: ``(word:1.2)``. Here it is text like any other."""


@dataclass
class Census:
    """Numbers of rows that have something."""

    rows: int
    having: dict[str, int | None] = field(default_factory=dict)
    """Rows with a value in each of :data:`~vcf_batch.manifest.columns.OPTIONS`; 0 where there is no such column, None
    where only the bytes of images tell."""
    weighted: int = 0
    """Rows whose prompt has a weight such as ``(word:1.2)``."""


def check(manifest: "Manifest") -> Census:
    """Read every row once and refuse empty prompts and missing, unsafe or repeated ids.

    Memory is bounded; hashes of the ids go through local scratch (24 bytes each). A mistake that concerns one row
    alone, such as an override out of range, is not refused here: it becomes the :attr:`Row.error` of its row.

    Raises:
        ManifestError: one error with each column, the number of wrong rows, and the places of the first ones.
        StorageError: the storage failed.
    """
    findings, total = _Findings(manifest), manifest.num_rows
    columns = [name for name in OPTIONS if name in manifest._columns]
    has_ids = "sample_id" in columns
    census = Census(total, dict.fromkeys(OPTIONS, 0))
    with RepeatFinder(total) as finder:
        for first_row, batch in manifest._batches(columns, 0, total, _ROWS_PER_CHECK, counting=True):
            prompts = _large(batch["prompt"])
            findings.add("prompt", "null", first_row, pc.is_null(prompts))
            findings.add("prompt", "empty", first_row, _each(_blank, prompts))
            census.weighted += pc.sum(_each(_weighted, prompts)).as_py() or 0
            for name in columns:
                before = census.having[name]
                here = _having(batch[name], manifest.embeds) if name in batch.schema.names else None
                census.having[name] = None if before is None or here is None else before + here
            if has_ids:
                ids = _large(batch["sample_id"])
                findings.add("sample_id", "null", first_row, pc.is_null(ids))
                findings.add("sample_id", "unsafe", first_row, _each(_unsafe, ids), ids)
                if not findings.of("sample_id"):
                    finder.add(_binary(ids), first_row)
        if has_ids and not findings.of("sample_id"):
            findings.add_repeats(finder)
    findings.raise_if_any()
    return census


def _having(column: pa.Array, embeds: bool) -> int:
    """Number of values that are not null, and no empty lists.

    Args:
        column: a column without fields that hold bytes.
        embeds: whether it has such fields, so that an image without a path may be there.
    """
    if pt.is_list(column.type) or pt.is_large_list(column.type) or pt.is_fixed_size_list(column.type):
        return pc.sum(pc.greater(pc.list_value_length(column), 0)).as_py() or 0
    if pt.is_struct(column.type) and not embeds:
        return len(column) - column.flatten()[0].null_count
    return len(column) - column.null_count


class _Findings:
    """Number of wrong rows for each column and complaint, and the places of the first ones."""

    _REMEDIES: Mapping[str, str] = {
        "null": "every row needs a value",
        "empty": "every row needs a prompt",
        "unsafe": "an id is 1 to 128 of the characters A-Z a-z 0-9 _ -",
        "repeated": "every id must be unique",
    }

    def __init__(self, manifest: "Manifest") -> None:
        self._manifest = manifest
        self._counts: dict[tuple[str, str], int] = {}
        self._examples: dict[tuple[str, str], list[str]] = {}

    def of(self, column: str) -> bool:
        return any(name == column for name, _ in self._counts)

    def add(
        self, column: str, complaint: str, first_row: int, offends: pa.Array, values: pa.Array | None = None
    ) -> None:
        """Record the rows that are true in ``offends``, one boolean per row from ``first_row`` on; null is false."""
        positions = np.flatnonzero(offends.fill_null(False).to_numpy(zero_copy_only=False))
        if not len(positions):
            return
        examples = []
        for position in positions[:_SHOWN].tolist():
            value = "" if values is None else f" ({shown(_binary(values.slice(position, 1))[0].as_py())})"
            examples.append(self._manifest.locate(first_row + position) + value)
        self._record(column, complaint, len(positions), examples)

    def add_repeats(self, finder: RepeatFinder) -> None:
        count, repeats = finder.repeats(_SHOWN)
        locate = self._manifest.locate
        if count:
            ids = [self._manifest.rows(repeat.row, repeat.row + 1, run_seed=0)[0].key for repeat in repeats]
            examples = [
                f"{locate(repeat.row)} ({key!r}, as {locate(repeat.first)})"
                for key, repeat in zip(ids, repeats, strict=True)
            ]
            self._record("sample_id", "repeated", count, examples)

    def raise_if_any(self) -> None:
        if not self._counts:
            return
        lines = []
        for (column, complaint), count in self._counts.items():
            first = "; ".join(self._examples[column, complaint])
            rows = "1 row is" if count == 1 else f"{count} rows are"
            named = self._manifest.mapped.get(column, column)
            lines.append(f"  column {named!r}: {rows} {complaint} ({self._REMEDIES[complaint]}), first: {first}")
        raise ManifestError(f"{self._manifest.url} breaks the manifest contract:\n" + "\n".join(lines))

    def _record(self, column: str, complaint: str, count: int, examples: list[str]) -> None:
        about = (column, complaint)
        self._counts[about] = self._counts.get(about, 0) + count
        self._examples[about] = (self._examples.get(about, []) + examples)[:_SHOWN]


def _each(judge: Callable[[pa.Array], pa.Array], texts: pa.Array) -> pa.Array:
    """Results of ``judge`` for each text; each distinct text of a dictionary is judged once."""
    return judge(texts.dictionary).take(texts.indices) if pa.types.is_dictionary(texts.type) else judge(texts)


def _large(texts: pa.Array) -> pa.Array:
    """Texts as large_string, or as a dictionary of them."""
    if isinstance(texts.type, pa.UuidType):
        return pa.array([value and str(value) for value in texts.to_pylist()], pa.large_string())
    return texts if pt.is_dictionary(texts.type) else texts.cast(pa.large_string())


def _binary(texts: pa.Array) -> pa.Array:
    """Texts as large_binary, however the file encodes them."""
    return texts.cast(pa.large_string()).cast(pa.large_binary())


def _unsafe(ids: pa.Array) -> pa.Array:
    return pc.invert(pc.match_substring_regex(_binary(ids), rf"\A{SAFE_ID}\z"))


def _blank(texts: pa.Array) -> pa.Array:
    texts = texts.cast(pa.large_string())
    try:
        return pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))
    except pa.ArrowInvalid:
        # A text that is not UTF-8 fails its row later. Here the batch is checked for ASCII white space instead.
        return pc.invert(pc.match_substring_regex(_binary(texts), r"[^\s]"))


def _weighted(texts: pa.Array) -> pa.Array:
    texts = texts.cast(pa.large_string())
    has_colon = pc.match_substring(texts, ":")
    if not pc.any(has_colon).as_py():
        return has_colon
    return pc.match_substring_regex(_binary(texts), _WEIGHT)
