"""A worker that scores: a shard in, the files of its scores out. No Ray here, so it is tested without a cluster."""

import hashlib
import itertools
import math
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from vcf_batch import storage
from vcf_batch.errors import StorageError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.shown import ImageScorer, Seen, Value
from vcf_batch.output import receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.scores.receipt import ScoreReceipt
from vcf_batch.output.scores.store import ScoreStore, parquet_bytes
from vcf_batch.records import FileEntry, Shard
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.storage import scratch
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.device import Device
from vcf_batch.worker.scoring import scorers
from vcf_batch.worker.scoring.job import ScoredShard, ScoreJob, needs
from vcf_batch.worker.scoring.pictures import Seat, ShardPictures
from vcf_batch.worker.scoring.resolved_score import IMAGES_AT_ONCE, column_name, with_columns

TURN_WAIT_SECONDS = 5.0
"""Seconds after which a shard that waits for its turn notes progress."""


def load(job: ScoreJob) -> "ScoringWorker":
    """Fetch and load the models of all scores.

    Raises:
        ModelError, UsageError, StorageError: see :func:`vcf_batch.worker.scoring.scorers.load`.
        NodeError: this node cannot compute as the others do.
    """
    scratch.clean()
    device = Device.set_up(job.config)
    return ScoringWorker(job, device, [scorers.load(score, device.kind) for score in job.scores])


class ScoringWorker:
    """Scorer of shards.

    Two shards may be under way at once, each in a thread of its own: while one is scored, the other is read.

    Args:
        job: the output and its scores.
        device: the device of the scorers.
        scorers: a scorer for each score of the job.
    """

    def __init__(self, job: ScoreJob, device: Device, scorers: Sequence[ImageScorer]) -> None:
        self.device = device
        self._output, self._scores, self._scorers = job.output, job.scores, scorers
        config = job.output.config
        self._references = None
        if needs(job.scores, "reference"):
            base = job.output.need_manifest().base
            self._references = ReferenceReader(base, config.reference_root, config.max_pixels)
        self._turn = threading.Lock()
        self._under_way: dict[str, Clock] = {}

    @property
    def progress(self) -> dict[str, int]:
        """Count of the progress of each attempt under way, by attempt id. Any thread may read it."""
        return {attempt_id: clock.progress for attempt_id, clock in [*self._under_way.items()]}

    @property
    def samples_done(self) -> dict[str, int]:
        """Number of rows that each attempt under way has scored, by attempt id. Any thread may read it."""
        return {attempt_id: clock.samples_done for attempt_id, clock in [*self._under_way.items()]}

    def run(self, task: ShardTask, attempt_id: str) -> tuple[Receipt, list[ScoredShard]] | None:
        """Score a shard by the scores that it lacks. Rows with a verdict get none, and the receipt says why.

        Args:
            task: the task. A trial scores its selected rows and discards what it has found.
            attempt_id: a name that no other task under way has.

        Returns:
            A receipt for the driver's counts, and the new scores. None for a trial.

        Raises:
            UsageError: the manifest is needed and cannot be read, or a function of the user's fails.
            StorageError: storage or network failed, or the shard is damaged.
        """
        started, clock = datetime.now(UTC), Clock()
        self.device.use_threads()
        self._under_way[attempt_id] = clock
        try:
            receipt = _receipt(self._output, task.shard)
            store = ScoreStore(self._output.url)
            own = receipt.shard, receipt.parquet_hash
            there = [isinstance(store.found(each.definition, *own), ScoreReceipt) for each in self._scores]
            chosen = [number for number, found in enumerate(there) if not found]
            found = self._score(task, chosen, clock)
            if task.is_trial:
                return None
            timings = clock.seconds | {
                "started": started.isoformat(timespec="seconds"),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "total": round(clock.elapsed(), 3),
                "worker": f"{socket.gethostname()}:{os.getpid()}",
            }
            scored = [self._finished(number, receipt, found, timings) for number in chosen]
            return self._told(task, scored, timings, len(found.errors)), scored
        finally:
            del self._under_way[attempt_id]

    def _told(
        self, task: ShardTask, scored: Sequence[ScoredShard], timings: Mapping[str, Any], without: int
    ) -> Receipt:
        """What the driver counts of a shard: its rows, and the means of its new scores. It is never published."""
        return Receipt(
            shard=task.shard,
            fingerprint="",
            attempt=task.attempt,
            counts={"success": len(task.shard) - without, "rejected": 0, "failed": without},
            files={},
            device=self.device.description,
            timings=timings,
            means={name: mean for each in scored for name, mean in each.receipt.means.items()},
            sampled=len(task.shard) - without,
        )

    def _score(self, task: ShardTask, chosen: Sequence[int], clock: Clock) -> "_Found":
        found = _Found(len(task.shard), [*chosen])
        if not chosen:
            return found
        scorers = [self._scorers[number] for number in chosen]
        scores = [self._scores[number] for number in chosen]
        pictures = ShardPictures(
            self._output,
            task.shard,
            [scorer.prepare for scorer in scorers],
            self._references if needs(scores, "reference") else None,
            needs(scores, "twin") and self._output.config.triplets,
            any(score.kind == "python" for score in scores),
            task.not_generated,
        )
        with pictures as seats:
            first = [*itertools.islice(seats, IMAGES_AT_ONCE)]  # read before it is this shard's turn
            with clock("wait_for_turn"):
                while not self._turn.acquire(timeout=TURN_WAIT_SECONDS):
                    clock.note_progress()  # the shard before this one has the device, and its own heartbeat
            try:
                seen = Seen()
                for batch in _batches(itertools.chain(first, seats), found):
                    shown = [seat.shown for seat in batch if seat.shown]
                    with clock("score"):
                        for place, (number, scorer) in enumerate(zip(chosen, scorers, strict=True)):
                            values = scorer.score(shown, [seat.prepared[place] for seat in batch], seen)
                            found.add(number, batch, values)
                    for _ in batch:
                        clock.note_sample()
            finally:
                self._turn.release()
        return found

    def _finished(self, number: int, receipt: Receipt, found: "_Found", timings: Mapping[str, Any]) -> ScoredShard:
        definition = self._scores[number].definition
        if not definition.columns:
            definition = with_columns(definition, self._scorers[number].parts)
        values = {column_name(definition.name, part): column for part, column in found.values[number].items()}
        if not values:  # no row has an image
            values = {column.name: [None] * len(receipt.shard) for column in definition.columns}
        parquet = parquet_bytes(definition, found.keys, values)
        there = {name: [value for value in column if value is not None] for name, column in values.items()}
        numbers = [column.name for column in definition.columns if column.type == "number"]
        own = ScoreReceipt(
            shard=receipt.shard,
            of=receipt.files["parquet"].sha256,
            fingerprint=definition.fingerprint,
            fields=definition.fields,
            parquet=FileEntry(len(parquet), hashlib.sha256(parquet).hexdigest()),
            counts={name: len(column) for name, column in there.items()},
            means={name: _mean(there[name]) for name in numbers},
            without=len(found.errors),
            reason=next(iter(found.errors), None),
            device=self.device.description,
            timings=timings,
        )
        return ScoredShard(definition, parquet, own)


def _mean(values: Sequence[Any]) -> float | None:
    return math.fsum(values) / len(values) if values else None


class _Found:
    """The values of a shard's rows so far."""

    def __init__(self, rows: int, numbers: Sequence[int]) -> None:
        self._rows = rows
        self.keys: list[str] = []
        self.errors: list[str] = []
        self.values: dict[int, dict[str, list[Value]]] = {number: {} for number in numbers}

    def add(self, number: int, batch: Sequence[Seat], values: Mapping[str, Sequence[Value]]) -> None:
        """Take the values of a batch by the score of a number."""
        for part, own in values.items():
            column = self.values[number].setdefault(part, [None] * self._rows)
            for seat, value in zip(batch, own, strict=True):
                column[seat.place] = value


def _batches(seats: Iterator[Seat], found: _Found) -> Iterator[list[Seat]]:
    """The rows that can be scored, :data:`IMAGES_AT_ONCE` at once: which are together follows from the shard alone."""
    batch: list[Seat] = []
    for seat in seats:
        found.keys.append(seat.key)
        found.errors += [f"{seat.key}: {seat.error}"] if seat.error else []
        batch += [seat] if seat.shown else []
        if len(batch) == IMAGES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _receipt(output: Output, shard: Shard) -> Receipt:
    """The receipt of a shard, whose parquet is the one that it names.

    Raises:
        StorageError: it has none, or another parquet.
    """
    receipt = receipts.read_one(output.url, shard)
    name = shards.file_name(shard, "parquet")
    if receipt is None:
        raise StorageError(f"shard {shard.name} of {output.url} has no receipt any more; rerun the command")
    with storage.refusals_as_storage_errors():
        found = storage.digest(storage.join(output.url, name)).sha256
    if found != receipt.files["parquet"].sha256:
        raise StorageError(f"{name} of {output.url} is not the one of its receipt; see 'vcf-batch verify {output.url}'")
    return receipt
