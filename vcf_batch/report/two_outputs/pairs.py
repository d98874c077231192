"""Rows of two outputs, paired by their keys, and what has changed between them.

Both are read once, in the order of their manifests. A row waits for its partner, in memory or, beyond a number of
rows, in scratch. So memory is bounded, and scratch takes about 1 KB for each row that waits.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vcf_batch.driver.progress import steps
from vcf_batch.errors import UsageError
from vcf_batch.output import shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.scores.definition import ScoreColumn
from vcf_batch.output.scores.joined import JoinedScores
from vcf_batch.report.figures import EXTREMES, SCORE_LABELS, parquet_of
from vcf_batch.report.two_outputs.unpaired import PairedRow, UnpairedRows
from vcf_batch.storage import scratch

_OWN = ("key", "status", "prompt", "reference", "strength", "sha256")


@dataclass(frozen=True, slots=True)
class Change:
    """A score of a row in both outputs."""

    gain: float
    """How much better it is in the second one."""
    sides: tuple[PairedRow, PairedRow]


@dataclass
class ScoreChange:
    """A score of all rows that have it in both outputs."""

    name: str
    higher_is_better: bool
    rows: int = 0
    better: int = 0
    worse: int = 0
    """Number of rows that have it better, and worse, in the second output."""
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    improved: list[Change] = field(default_factory=list)
    worsened: list[Change] = field(default_factory=list)
    """The rows with the largest gains and losses, the largest first."""

    @property
    def means(self) -> tuple[float | None, float | None]:
        """Its mean in each output, over these rows; None without one."""
        first, second = (total / self.rows if self.rows else None for total in self.sums)
        return first, second

    def add(self, sides: tuple[PairedRow, PairedRow]) -> None:
        """Add a row, unless one of its values is missing."""
        given = (side.record.get(self.name) for side in sides)
        values: list[float] = [value for value in given if value is not None and math.isfinite(value)]
        if len(values) < 2:
            return
        gain = (values[1] - values[0]) * (1 if self.higher_is_better else -1)
        self.rows += 1
        self.better += gain > 0
        self.worse += gain < 0
        self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
        if gain > 0:
            self.improved = _kept([*self.improved, Change(gain, sides)])
        elif gain < 0:
            self.worsened = _kept([*self.worsened, Change(gain, sides)])


def _kept(changes: list[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: (-abs(change.gain), change.sides[0].number))[:EXTREMES]


@dataclass
class TwoOutputs:
    """What two outputs have in common, and what not."""

    both: int = 0
    """Number of keys that both have."""
    alone: tuple[int, int] = (0, 0)
    """Number of keys that the first one alone has, and the second."""
    unlike: int = 0
    """Number of keys whose rows have another prompt or another reference in the second output. They are compared all
    the same."""
    same: int = 0
    """Number of keys whose images have the same bytes."""
    gained: int = 0
    lost: int = 0
    """Number of keys with an image in the second output alone, and in the first alone."""
    scores: list[ScoreChange] = field(default_factory=list)

    def add(self, first: PairedRow, second: PairedRow) -> None:
        """Add a row that both have."""
        self.both += 1
        asked = [(side.record["prompt"], side.record["reference"]) for side in (first, second)]
        self.unlike += asked[0] != asked[1]
        has = [side.record["status"] == "success" for side in (first, second)]
        self.gained += has == [False, True]
        self.lost += has == [True, False]
        if all(has):
            self.same += first.record["sha256"] == second.record["sha256"]
            for score in self.scores:
                score.add((first, second))

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON types, with the keys of the largest changes."""
        return {
            "both": self.both,
            "unlike": self.unlike,
            "first_alone": self.alone[0],
            "second_alone": self.alone[1],
            "same_image": self.same,
            "image_gained": self.gained,
            "image_lost": self.lost,
            "scores": {
                score.name: {
                    "rows": score.rows,
                    "means": [*score.means],
                    "better": score.better,
                    "worse": score.worse,
                    "improved": [_told(change, score.name) for change in score.improved],
                    "worsened": [_told(change, score.name) for change in score.worsened],
                }
                for score in self.scores
            },
        }


def _told(change: Change, name: str) -> dict[str, Any]:
    first, second = (side.record[name] for side in change.sides)
    return {"key": change.sides[0].record["key"], "first": first, "second": second}


def compare(first: Output, second: Output) -> TwoOutputs:
    """Compare the finished rows of two outputs.

    Scores are those of runs, and those that were added to both under one name, if it is known which way is better.

    Raises:
        UsageError: no key is in both.
        DamageFound: a parquet or the scores of a shard are damaged.
        StorageError: the storage failed, or scratch is full.
    """
    joined = [JoinedScores(output.url) for output in (first, second)]
    added = [_added(each) for each in joined]
    common = [name for name, better in added[0].items() if added[1].get(name) is better]
    ways = {name: label.higher_is_better for name, label in SCORE_LABELS.items()}
    ways |= {name: added[0][name] for name in common}
    found = TwoOutputs(scores=[ScoreChange(name, better) for name, better in ways.items()])
    streams = [_rows(output, scores, common) for output, scores in zip((first, second), joined, strict=True)]
    with scratch.temporary("the rows without a partner") as folder:
        unpaired = UnpairedRows(folder, first.plan.num_rows + second.plan.num_rows)
        longer = max(first.plan.num_rows, second.plan.num_rows)
        for sides in steps(itertools.zip_longest(*streams), "comparing", longer, "row"):
            for at, side in enumerate(sides):
                if side and (pair := unpaired.meet(at, side)):
                    found.add(*pair)
        for pair in unpaired.pairs():
            found.add(*pair)
    found.alone = unpaired.alone[0], unpaired.alone[1]
    if not found.both:
        raise UsageError(
            f"{first.url} and {second.url} have no key in common, so no row of one can be compared with a row of the "
            "other; make both of the same manifest"
        )
    found.scores = [score for score in found.scores if score.rows]
    return found


def _added(scores: JoinedScores) -> dict[str, bool]:
    columns: Iterable[ScoreColumn] = (column for score in scores.definitions for column in score.columns)
    return {
        column.name: column.higher_is_better
        for column in columns
        if column.type == "number" and column.higher_is_better is not None
    }


def _rows(output: Output, scores: JoinedScores, added: Iterable[str]) -> Iterator[PairedRow]:
    """The rows of the finished shards, in order."""
    names = [*_OWN, *SCORE_LABELS]
    for receipt in output.examine():
        if not isinstance(receipt, Receipt):
            continue
        number = receipt.shard.start
        with parquet_of(output, receipt.shard) as parquet:
            rows: Iterable[Any] = parquet.iter_batches(shards.ROWS_PER_GROUP, columns=names, use_threads=False)
            for batch in scores.batches(rows, receipt.shard, receipt.parquet_hash) if added else rows:
                for record in batch.to_pylist():
                    yield PairedRow(number, record)
                    number += 1
