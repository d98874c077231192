"""The figures of a run as Prometheus metrics, through Ray. Names and meaning: docs/monitoring.md."""

import logging
import string
import urllib.parse
from collections.abc import Callable
from typing import Any

from ray.util import metrics

from vcf_batch.errors import redact
from vcf_batch.output.receipts import SCORE_STEP, Receipt, device_type
from vcf_batch.output.sums import NOT_PHASES

_log = logging.getLogger(__name__)

WAITS = ("wait_for_references", "wait_for_scores", "wait_for_turn")
"""Phases in which the sampling of a shard waits for what comes before or after it, or for another shard."""


class PrometheusExporter:
    """Exporter of a run's figures as metrics of Ray.

    No failure of it ends a run: the first one is logged as a warning, and nothing is exported from then on.

    Args:
        output: URL of the run's output, a tag of every metric.
        rows: number of rows of the run.
    """

    def __init__(self, output: str, rows: int) -> None:
        self._failed = False
        self._try(lambda: self._make(output, rows))

    def committed(self, receipt: Receipt) -> None:
        """Take the receipt of a shard that has just been committed."""
        self._try(lambda: self._count(receipt))

    def now(self, rows_done: int, workers: int) -> None:
        """Take the number of rows generated so far, and the number of ready workers."""
        self._try(lambda: self._show(rows_done, workers))

    def _try(self, export: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            export()
        except Exception as error:  # whatever Ray's metrics raise, a run goes on without them
            self._failed = True
            _log.warning("the run exports no metrics any more: %s: %s", type(error).__name__, error)

    def _make(self, output: str, rows: int) -> None:
        def made(kind: Any, name: str, text: str, *tags: str, **how: Any) -> Any:
            metric = kind(f"vcf_batch_{name}", description=text, tag_keys=("output", *tags), **how)
            metric.set_default_tags({"output": ascii_label(redact(output))})
            return metric

        self._samples = made(metrics.Counter, "samples", "Rows of finished shards.", "status")
        self._phases = made(metrics.Counter, "phase_seconds", "Seconds of workers by phase.", "phase")
        self._waits = made(metrics.Counter, "wait_seconds", "Seconds that sampling waited, by what for.", "queue")
        self._worker_seconds = made(metrics.Counter, "worker_seconds", "Seconds of workers.", "device")
        self._busy = made(metrics.Gauge, "device_busy", "Share of its time that the last shard was sampled.", "device")
        bounds = [round(number * SCORE_STEP, 2) for number in range(1, round(1 / SCORE_STEP) + 1)]
        self._scores = made(metrics.Histogram, "score", "Scores of samples.", "score", boundaries=bounds)
        self._done = made(metrics.Gauge, "rows_done", "Rows that are generated, those of unfinished shards too.")
        self._workers = made(metrics.Gauge, "workers", "Workers that are ready.")
        made(metrics.Gauge, "rows", "Rows of the run.").set(rows)

    def _count(self, receipt: Receipt) -> None:
        timings, device = receipt.timings, ascii_label(device_type(receipt.device))
        for status, count in receipt.counts.items():
            if count:
                self._samples.inc(count, {"status": status})
        for phase, seconds in timings.items():
            if phase in NOT_PHASES or not seconds:
                continue
            if phase in WAITS:
                self._waits.inc(seconds, {"queue": phase.removeprefix("wait_for_")})
            else:
                self._phases.inc(seconds, {"phase": phase})
        if receipt.worker_seconds > 0:
            self._worker_seconds.inc(receipt.worker_seconds, {"device": device})
            self._busy.set(timings.get("sample", 0.0) / receipt.worker_seconds, {"device": device})
        for name, counts in receipt.histograms.items():
            for bound, count in counts.items():
                for _ in range(count):
                    self._scores.observe(float(bound) - SCORE_STEP / 2, {"score": name})

    def _show(self, rows_done: int, workers: int) -> None:
        self._done.set(rows_done)
        self._workers.set(workers)


def ascii_label(text: str) -> str:
    """A value for a label of a metric: characters beyond ASCII are percent-encoded, because Ray's labels are ASCII."""
    return urllib.parse.quote(text, safe=string.punctuation + " ", errors="surrogateescape")
