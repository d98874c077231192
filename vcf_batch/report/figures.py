"""The figures of an output: counts, scores, failures, throughput, and rows worth looking at.

Receipts and parquets are read once, several shards at a time. Memory does not grow with the number of rows.
"""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vcf_batch import storage
from vcf_batch.driver.progress import steps
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output import shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.scores.joined import JoinedScores
from vcf_batch.output.shards import side_by_side
from vcf_batch.output.sums import RunSums
from vcf_batch.records import Shard, Status
from vcf_batch.report.categories import Categories

EXTREMES = 8
"""Number of best rows, and of worst rows, kept for each score."""
RANDOM = 32
"""Number of rows in the random sample."""
POINTS = 400
"""Most rows drawn at random for the scatter plot. Each has a picture in the page."""
MAX_CAUSES = 500
"""Most causes of failure counted separately; further causes are counted together."""
MAX_INTERVALS = 240
"""Most intervals that the time of a run is divided into."""


class Score(NamedTuple):
    """How people read a score."""

    label: str
    higher_is_better: bool


SCORE_LABELS: Mapping[str, Score] = {
    "clip_score": Score("Prompt", True),
    "clip_reference": Score("Reference", True),
    "lpips": Score("Distance", False),
    "content_alignment": Score("Content", True),
    "style_similarity": Score("Style", True),
}
"""Scores of a report, by their column."""

_SETTINGS = ("fusion", "strength", "pno_steps")
_COLUMNS = ("key", "status", "error_message", "prompt", "reference", "seed", *_SETTINGS, *SCORE_LABELS)
_VARYING = re.compile(
    r"""(?P<text>'[^']*'|"[^"]*"|\S*[/\\]\S*|\b[\w-]+\.[A-Za-z]\w{2,4}\b)|(?P<number>\b[0-9a-f]{16,}\b|\d[\d,.]*\d|\d)"""
)
_CAUSE_LENGTH = 240


class Histogram:
    """Counts of values in bins of one width, :data:`STEP`, which doubles while they span :data:`MOST_BINS` or more."""

    STEP = 0.001
    MOST_BINS = 10_000

    def __init__(self) -> None:
        self._step = self.STEP
        self._bins: Counter[float] = Counter()
        """Number of values by the number of their bin, a whole number. Bin 0 begins at 0."""
        self._sum = 0.0
        self.low, self.high = np.inf, -np.inf

    def add(self, values: NDArray[np.float64]) -> None:
        """Count finite values."""
        if not len(values):
            return
        self._sum += float(values.sum())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        there, step = self._bins, self._step
        while self.high // self._step - self.low // self._step >= self.MOST_BINS:
            self._step *= 2
        if self._step != step:
            self._bins = Counter()
            for place, count in there.items():
                self._bins[place // (self._step / step)] += count
        for place, count in zip(*np.unique(values // self._step, return_counts=True), strict=True):
            self._bins[float(place)] += int(count)

    @property
    def count(self) -> int:
        return self._bins.total()

    @property
    def mean(self) -> float:
        """Mean of the values. Needs at least one value."""
        return self._sum / self.count

    def quantile(self, share: float) -> float:
        """The value that a ``share`` (0 to 1) of the values does not exceed, to half a bin. Needs a value at least."""
        places = sorted(self._bins)
        counts = np.cumsum([self._bins[place] for place in places])
        place = places[int(np.searchsorted(counts, max(share * self.count, 1)))]
        return min(max((place + 0.5) * self._step, self.low), self.high)

    def bars(self, most: int = 40) -> tuple[float, float, list[int]]:
        """Start, width and heights of at most ``most`` bars over the range of the values. Needs at least one value."""
        low, high = min(self._bins), max(self._bins)
        widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
        per_bar = next(n for n in widths if high // n - low // n < most)
        first = low // per_bar
        heights = [0] * int(high // per_bar - first + 1)
        for place, count in self._bins.items():
            heights[int(place // per_bar - first)] += count
        return first * per_bar * self._step, per_bar * self._step, heights


class Chosen(NamedTuple):
    """A row kept because its ``order`` is among the lowest."""

    order: float
    number: int
    record: dict[str, Any]
    """The row's values in the parquet columns that this module reads."""


class Lowest:
    """The ``most`` rows with the lowest order."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.rows: list[Chosen] = []

    def add(self, order: NDArray[np.float64], start: int, table: pa.Table) -> None:
        """Add the rows of a shard.

        Args:
            order: one number per row, ``[n]``; NaN leaves a row out.
            start: number of the shard's first row.
            table: the rows, in order.
        """
        bound = self.rows[-1].order if len(self.rows) == self._most else np.inf
        near = np.flatnonzero(order < bound)
        near = near[np.argsort(order[near], kind="stable")[: self._most]]
        records = table.take(pa.array(near)).to_pylist()
        found = map(Chosen, order[near].tolist(), (near + start).tolist(), records)
        self.rows = sorted([*self.rows, *found], key=lambda row: row[:2])[: self._most]


class Intervals:
    """Rows finished over time. Intervals double in length before there are more than :data:`MAX_INTERVALS`."""

    def __init__(self) -> None:
        self.seconds = 1.0
        self.begin, self.end = np.inf, -np.inf
        self._rows: Counter[int] = Counter()

    def add(self, begin: float, end: float, rows: int) -> None:
        """Add ``rows`` rows, spread evenly from ``begin`` to ``end`` (seconds since 1970)."""
        self.begin, self.end = min(self.begin, begin), max(self.end, end)
        while self.end // self.seconds - self.begin // self.seconds >= MAX_INTERVALS:
            self.seconds *= 2
            merged: Counter[int] = Counter()
            for place, count in self._rows.items():
                merged[place // 2] += count
            self._rows = merged
        first, last = int(begin // self.seconds), int(end // self.seconds)
        for place in range(first, last + 1):
            low, high = max(begin, place * self.seconds), min(end, (place + 1) * self.seconds)
            self._rows[place] += rows * ((high - low) / (end - begin) if end > begin else 1)  # type: ignore[assignment]

    def rates(self) -> tuple[float, list[float]]:
        """Start of the first interval in seconds since 1970, and the rows per second in each interval."""
        first, last = int(self.begin // self.seconds), int(self.end // self.seconds)
        rates = []
        for place in range(first, last + 1):
            low, high = max(self.begin, place * self.seconds), min(self.end, (place + 1) * self.seconds)
            if high > low:
                rates.append(self._rows[place] / (high - low))
        return first * self.seconds, rates


@dataclass
class Cause:
    """A cause of failure: rows without a sample, with messages that differ only in names and numbers."""

    status: Status
    text: str
    count: int
    example_key: str
    example: str


@dataclass
class Figures(RunSums):
    """Sums over the finished shards of an output, and rows worth looking at."""

    scores: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in SCORE_LABELS})
    best: dict[str, Lowest] = field(default_factory=lambda: {name: Lowest(EXTREMES) for name in SCORE_LABELS})
    worst: dict[str, Lowest] = field(default_factory=lambda: {name: Lowest(EXTREMES) for name in SCORE_LABELS})
    random: Lowest = field(default_factory=lambda: Lowest(RANDOM))
    points: Lowest = field(default_factory=lambda: Lowest(POINTS))
    added: dict[str, Histogram] = field(default_factory=dict)
    """Scores that were added to the output, by their column."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Number of rows that are duplicates of another one, by the column that names it."""
    categories: Categories = field(default_factory=Categories)
    causes: dict[tuple[str, str], Cause] = field(default_factory=dict)
    intervals: Intervals = field(default_factory=Intervals)
    damaged: dict[str, str] = field(default_factory=dict)
    """Names of the shards that are damaged, each with the reason."""

    @property
    def rows(self) -> int:
        return self.counts.total()

    def add(self, receipt: Receipt) -> None:
        super().add(receipt)
        if "ended" in receipt.timings:
            end = datetime.fromisoformat(receipt.timings["ended"]).timestamp()
            self.intervals.add(end - receipt.worker_seconds, end, len(receipt.shard))

    def add_rows(self, shard: Shard, table: pa.Table) -> None:
        """Add the rows of a shard, a table with the columns :data:`_COLUMNS` and those of :attr:`added`.

        It may have carried columns, which are counted.
        """
        self.categories.add(table.drop_columns([*self.added, *self.duplicates]))
        succeeded = np.array([status == "success" for status in table["status"].to_pylist()])
        lots = np.where(succeeded, _lots(np.arange(shard.start, shard.stop)), np.nan)
        self.random.add(lots, shard.start, table)
        self.points.add(lots, shard.start, table)
        for name, score in SCORE_LABELS.items():
            values = np.where(succeeded, table[name].to_numpy(), np.nan)
            self.scores[name].add(values[np.isfinite(values)])
            worse = -values if score.higher_is_better else values
            self.best[name].add(worse, shard.start, table)
            self.worst[name].add(-worse, shard.start, table)
        for name, histogram in self.added.items():
            values = table[name].to_numpy()
            histogram.add(values[np.isfinite(values)])
        for name in self.duplicates:
            self.duplicates[name] += table.num_rows - table[name].null_count
        self.add_failures(table.filter(pa.array(~succeeded)))

    def add_failures(self, table: pa.Table) -> None:
        """Add rows without a sample, a table with key, status and error message."""
        for record in table.select(["key", "status", "error_message"]).to_pylist():
            self._add_failure(**record)

    def _add_failure(self, key: str, status: Status, error_message: str | None) -> None:
        message = error_message or "no reason given"
        text = cause_of(message)
        if (status, text) not in self.causes and len(self.causes) >= MAX_CAUSES:
            text = "other causes"
        cause = self.causes.setdefault((status, text), Cause(status, text, 0, key, message))
        cause.count += 1


def read(output: Output) -> Figures:
    """Read the finished shards of an output, whether its run has ended or not.

    Raises:
        UsageError: no shard is finished.
        DamageFound: a parquet is damaged, incomplete or of another version; or every shard is damaged.
        StorageError: the storage failed.
    """
    scores = JoinedScores(output.url)
    numbers = [field.name for field in scores.fields if pa.types.is_float64(field.type)]
    figures = Figures(
        added={name: Histogram() for name in numbers},
        duplicates={field.name: 0 for field in scores.fields if field.name not in numbers},
    )

    def finished() -> Iterator[Receipt]:
        for found in output.examine():
            if isinstance(found, Damaged):
                figures.damaged[found.name] = found.reason
            else:
                figures.add(found)
                yield found

    def rows(receipt: Receipt) -> pa.Table:
        table = read_rows(output, receipt.shard, figures.categories.columns)
        batches = scores.batches(table.combine_chunks().to_batches(), receipt.shard, receipt.parquet_hash)
        return pa.Table.from_batches(batches, scores.schema(table.schema.remove_metadata()))

    for receipt, table in steps(side_by_side(rows, finished()), "reading", len(output.plan), "shard"):
        figures.add_rows(receipt.shard, table)
    if figures.damaged and not figures.done:
        name, reason = next(iter(figures.damaged.items()))
        raise DamageFound(f"{output.url} has no shard that is whole; of shard {name}, {reason}; see 'vcf-batch verify'")
    if not figures.done:
        raise UsageError(f"{output.url} has no finished shard to show; generate into it first")
    return figures


def cause_of(message: str) -> str:
    """A message with placeholders for the parts that differ between rows: quoted texts, paths, file names, numbers."""
    plain = _VARYING.sub(lambda match: "…" if match["text"] else "N", " ".join(message.split()))
    return plain if len(plain) <= _CAUSE_LENGTH else plain[: _CAUSE_LENGTH - 1] + "…"


def setting_of(record: Mapping[str, Any]) -> str:
    """The method of a row in a few words, such as ``concat 0.5``."""
    if not record["strength"] or not record["reference"]:
        return "text only"
    pno = f", PNO {record['pno_steps']}" if record["pno_steps"] else ""
    return f"{record['fusion']} {record['strength']:g}{pno}"


@contextlib.contextmanager
def parquet_of(output: Output, shard: Shard) -> Iterator[pq.ParquetFile]:
    """Open the parquet of a finished shard.

    Raises:
        DamageFound: it cannot be read, now or as long as the block lasts.
        StorageError: the storage failed.
    """
    name = shards.file_name(shard, "parquet")
    try:
        with shards.open_parquet(storage.join(output.url, name)) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise DamageFound(f"{name} cannot be read: {error}; 'vcf-batch verify' tells what else is damaged") from error


def read_rows(
    output: Output, shard: Shard, further: Callable[[pa.Schema], Sequence[str]] = lambda schema: ()
) -> pa.Table:
    """The rows of a finished shard, a table with the columns :data:`_COLUMNS`.

    Args:
        output: the output.
        shard: the shard.
        further: chooses further columns from the schema.

    Raises:
        DamageFound: the parquet is damaged, incomplete or of another version.
        StorageError: the storage failed.
    """
    name = shards.file_name(shard, "parquet")
    with parquet_of(output, shard) as parquet:
        table = parquet.read([*_COLUMNS, *further(parquet.schema_arrow)], use_threads=False)
    if missing := set(_COLUMNS) - set(table.column_names):
        raise DamageFound(f"{name} has no column {', '.join(sorted(missing))}: another version wrote it")
    if table.num_rows != len(shard):
        raise DamageFound(f"{name} has {table.num_rows} rows, its receipt says {len(shard)}; see 'vcf-batch verify'")
    return table


def _lots(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Pseudo-random number in [0, 1) for each row number, always the same for the same row (SplitMix64).

    A random sample therefore keeps its rows while a run goes on, except those displaced by new rows.
    """
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / np.float64(2**53)
