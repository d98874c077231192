"""Scores added to an output on a Ray cluster, by the same loop as a run."""

import dataclasses
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vcf_batch.driver.commit_queue import COMMITS_AT_ONCE, CommitQueue
from vcf_batch.driver.ledger import Ledger
from vcf_batch.driver.loop import Loop
from vcf_batch.driver.progress import Progress, bar_stream
from vcf_batch.errors import UsageError
from vcf_batch.output.lease import Lease
from vcf_batch.output.receipts import Receipt
from vcf_batch.pool import nodes
from vcf_batch.pool.connection import cluster
from vcf_batch.pool.ray_cluster import RayCluster
from vcf_batch.pool.scoring_actor import ScoringActor
from vcf_batch.pool.signals import Signals
from vcf_batch.records import Shard
from vcf_batch.worker.scoring.job import ScoredShard, ScoreJob

Commit = Callable[[Sequence[ScoredShard]], object]
"""Function that puts the scores of a shard into their place. Threads call it side by side."""


def score(job: ScoreJob, shards: Sequence[Shard], held: Lease, commit: Commit, signals: Signals) -> None:
    """Score shards of an output.

    Args:
        job: the output and its scores.
        shards: the shards, one or more.
        held: the lease on the output, confirmed before each commit.
        commit: commits what was scored.
        signals: the handler of signals of this process.

    Raises:
        UsageError: a function of the user's fails, or the nodes do not share the output.
        RefusedError: another driver took over.
        StorageError, VcfBatchError: some shards, or the start of workers, failed again and again.
    """

    def put(output_url: str, receipt: Receipt, scored: Any, stays: Container[str]) -> Receipt:
        commit(scored)
        return receipt

    with cluster(job.config.address):
        signals.install()  # again, because ray.init takes SIGTERM for itself
        job = dataclasses.replace(job, config=nodes.with_gpus(job.config))
        ledger = Ledger.of(shards)
        bar = bar_stream(job.config.log_format, job.config.verbosity)
        on_ray = RayCluster(job, signals.check, ScoringActor)
        threads = ThreadPoolExecutor(COMMITS_AT_ONCE, "commits")
        with Progress(sum(map(len, shards)), 0, bar) as progress:
            queue = CommitQueue(job.output.url, held, ledger, progress.note, on_ray.now, threads, put=put)
            try:
                Loop(job, on_ray, ledger, queue, progress, _Silent()).run()
            except UsageError:
                # Nodes do not see the lease of a driver that has lost it either, which is no wrong use.
                held.confirm()
                raise


class _Silent:
    """Exporter of nothing: the metrics of a run count what is generated."""

    def committed(self, receipt: Receipt) -> None:
        """Nothing."""

    def now(self, rows_done: int, workers: int) -> None:
        """Nothing."""
