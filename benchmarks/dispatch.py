"""Measure the driver's work per shard: ``python benchmarks/dispatch.py``.

The driver's own loop runs on a real Ray cluster with fake workers. Two processes play thousands of workers; for a shard
they sleep, stage two tiny files and return a receipt.

``cost``: the driver's milliseconds per shard, with shards that do not sleep.

``keep-busy``: the share of workers at work, with the largest number of workers for one driver and shards of ten minutes
that end at different times. The measurement starts after all workers have begun.
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import click
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from plan import CONTENT, peak_memory, receipt_of

from vcf_batch import pool, storage
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.cluster import Heartbeat, Loaded
from vcf_batch.driver.ledger import Ledger
from vcf_batch.driver.loop import Loop
from vcf_batch.driver.progress import Progress
from vcf_batch.errors import RefusedError
from vcf_batch.output import commits, lease, receipts
from vcf_batch.output.receipts import Receipt
from vcf_batch.pool import launch
from vcf_batch.pool.ray_cluster import RayCluster
from vcf_batch.setup import claim, defaults, manifest_check, run_models
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask

PROCESSES = 2
SHARD_SECONDS = 600.0


class Player:
    """A process that plays many workers.

    Args:
        output: folder of the run's output.
        seconds: duration of a shard.
        seed: seed of the random durations of the first shards.
    """

    def __init__(self, output: str, seconds: float, seed: int) -> None:
        self._output, self._seconds, self._random = output, seconds, random.Random(seed)
        self._turns: dict[int, asyncio.Lock] = {}
        """A lock for each worker that has had a shard. It makes the worker take one shard at a time."""
        self._running = 0
        self._since, self._worked = time.monotonic(), 0.0

    async def heartbeat(self, worker: int) -> Heartbeat:
        return Heartbeat(ray.get_runtime_context().get_node_id(), {}, {})

    async def load(self, worker: int, job: Job) -> Loaded:
        return Loaded({})

    async def run(self, worker: int, task: ShardTask, attempt_id: str, redo: None) -> tuple[Receipt, dict[str, str]]:
        # Each worker's first shard has a random shorter duration, as if the benchmark began in the middle of a run.
        share = 1.0 if worker in self._turns else self._random.random()
        async with self._turns.setdefault(worker, asyncio.Lock()):
            self._count(+1)
            await asyncio.sleep(self._seconds * share)
            self._count(-1)
        staged = {
            kind: f"{commits.STAGING}/{attempt_id}/{task.shard.name}{end}"
            for kind, end in receipts.FILE_SUFFIXES.items()
        }
        for path in staged.values():
            storage.publish_bytes(storage.join(self._output, path), CONTENT)
        return receipt_of(task.shard), staged

    async def work(self) -> tuple[int, float]:
        """Number of workers that have a shard now, and seconds of work of all workers so far."""
        self._count(0)
        return self._running, self._worked

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self._worked += self._running * (now - self._since)
        self._running, self._since = self._running + change, now


class Part:
    """Replacement for the handle of an actor: one worker that a player plays."""

    def __init__(self, player: Any, worker: int) -> None:
        self._player, self._worker = player, worker

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._player, name)
        return SimpleNamespace(remote=functools.partial(method.remote, self._worker))


class Players:
    """Replacement for the pool's actor class. The processes take turns to play the new workers."""

    def __init__(self, output: str, seconds: float) -> None:
        remote: Any = ray.remote  # as in pool/ray_cluster.py
        actor = remote(num_cpus=0, max_concurrency=1_000_000)(Player)
        self.processes = [actor.remote(output, seconds, seed) for seed in range(PROCESSES)]
        self._workers = itertools.count()

    def options(self, **_: Any) -> "Players":
        return self

    def remote(self, *_: Any) -> Part:
        worker = next(self._workers)
        return Part(self.processes[worker % PROCESSES], worker)

    def work(self) -> tuple[int, float]:
        """Sums of :meth:`Player.work` over all processes."""
        running, worked = zip(*ray.get([process.work.remote() for process in self.processes]), strict=True)
        return sum(running), sum(worked)


@contextlib.contextmanager
def dispatch(num_shards: int, workers: int, seconds: float) -> Iterator[tuple[Loop, Players, lease.Lease]]:
    """A loop over a manifest with one row per shard, its players, and the lease of its output."""
    with tempfile.TemporaryDirectory(prefix="vcf-batch-dispatch-") as folder:
        manifest, output = Path(folder) / "manifest.parquet", str(Path(folder) / "out")
        pq.write_table(pa.table({"prompt": ["a shard"] * num_shards}), manifest)
        config = RunConfig(
            manifest=str(manifest), output=output, model="tiny", shard_size=1, num_workers=workers, gpus_per_worker=0
        )
        job = defaults.settle(config, manifest_check.open_checked(config, None), run_models.resolve(config))
        with pool.cluster("local"), lease.hold(output) as held, Progress(num_shards, 0) as progress:
            claim.claim(job)
            job = dataclasses.replace(job, token=held.token)
            cluster, players = RayCluster(job), Players(output, seconds)
            cluster.actor_class = players
            loop = launch.loop_on(cluster, job, held, Ledger(job), progress)
            with mock.patch.object(ray, "kill"):  # A player must live on when one of its workers is killed.
                yield loop, players, held


def cost_of_a_shard(num_shards: int, workers: int) -> tuple[float, float]:
    """The driver's seconds of processor time and of wall clock per shard."""
    with dispatch(num_shards, workers, 0.0) as (loop, _, _):
        begin = time.process_time(), time.perf_counter()
        loop.run()
        return (time.process_time() - begin[0]) / num_shards, (time.perf_counter() - begin[1]) / num_shards


def share_at_work(workers: int, seconds: float) -> tuple[float, float]:
    """Share of the workers at work, and the driver's share of a processor, measured for ``seconds``."""
    found: list[tuple[float, float]] = []
    with dispatch(4 * workers, workers, SHARD_SECONDS) as (loop, players, held):

        def watch() -> None:
            while players.work()[0] < workers:
                time.sleep(1)
            _, worked = players.work()
            begin = time.process_time(), time.perf_counter()
            time.sleep(seconds)
            used, passed = time.process_time() - begin[0], time.perf_counter() - begin[1]
            found.append(((players.work()[1] - worked) / (workers * passed), used / passed))
            held.lost = RefusedError("enough was seen")

        watcher = threading.Thread(target=watch)
        watcher.start()
        with contextlib.suppress(RefusedError):
            loop.run()
        watcher.join()
    return found[0]


@click.group()
def main() -> None:
    """Measure the driver."""


@main.command()
@click.option("--shards", "num_shards", default=3000, show_default=True)
@click.option("--workers", default=100, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def cost(num_shards: int, workers: int, rounds: int) -> None:
    """Print the median milliseconds per shard, and the number of workers that this is enough for."""
    found = [cost_of_a_shard(num_shards, workers) for _ in range(rounds)]
    processor, wall = map(statistics.median, zip(*found, strict=True))
    click.echo("| shards | workers | processor, ms a shard | wall clock, ms a shard | workers at 10-minute shards |")
    click.echo("|---|---|---|---|---|")
    click.echo(
        f"| {num_shards:,} | {workers:,} | {1000 * processor:.2f} | {1000 * wall:.2f} | {SHARD_SECONDS / wall:,.0f} |"
    )


@main.command()
@click.option("--workers", default=10_000, show_default=True)
@click.option("--seconds", default=120.0, show_default=True)
def keep_busy(workers: int, seconds: float) -> None:
    """Print the share of the workers that are at work."""
    share, processor = share_at_work(workers, seconds)
    click.echo("| workers | at work | driver's use of a processor | driver's peak memory, MiB |\n|---|---|---|---|")
    click.echo(f"| {workers:,} | {share:.2%} | {processor:.0%} | {peak_memory() / 2**20:,.0f} |")


if __name__ == "__main__":
    main()
