"""Measure a worker's whole job against bare sampling: ``python benchmarks/job.py``.

Both use the demo manifest and the embedded model in this process. The whole job is one shard as a worker does it: read
manifest and references, sample, score, encode, write, stage. Bare sampling only samples the same batches. The rounds
alternate.

Then two shards run one after the other, and overlapping. The time without sampling between them is measured, as a share
of a shard's time.
"""

import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import click
from measure import alternate, between, marked_sampling
from PIL import Image

from vcf_batch import sharding
from vcf_batch.config.run_config import RunConfig
from vcf_batch.records import Shard
from vcf_batch.setup import absolute_paths, defaults, manifest_check, run_models
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker import worker
from vcf_batch.worker.worker import Worker


def idle_between(loaded: Worker, shards: Sequence[Shard], at_once: int) -> float:
    """Time without sampling between two shards, divided by the time in which the second shard is sampled."""
    with marked_sampling(loaded.components.pipeline) as sampled, ThreadPoolExecutor(at_once) as threads:
        for future in [threads.submit(loaded.run, ShardTask(shard), f"benchmark-{shard.name}") for shard in shards]:
            future.result()
    batches = len(sampled) // 2
    (_, first_ends), (second_begins, _), (_, second_ends) = sampled[batches - 1], sampled[batches], sampled[-1]
    return between(first_ends, second_begins) / between(second_begins, second_ends)


@click.command()
@click.option("--manifest", default="manifests/demo.parquet", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True, help="As a worker's --cpus-per-worker.")
def main(manifest: str, rounds: int, threads: int) -> None:
    """Print the ratio of the two, from the medians of the rounds."""
    with tempfile.TemporaryDirectory(prefix="vcf-batch-job-") as output:
        config = absolute_paths.absolute(
            RunConfig(manifest=manifest, output=output, gpus_per_worker=0, cpus_per_worker=threads)
        )
        job = defaults.settle(config, manifest_check.open_checked(config, None), run_models.resolve(config))
        loaded = worker.load(job)
        components, size = loaded.components, cast(int, job.config.batch_size)
        shard = sharding.ShardPlan(job.manifest.num_rows, job.manifest.num_rows)[0]
        rows = job.manifest.rows(shard.start, shard.stop, job.config.seed)
        pictures: list[list[Image.Image]] = [[components.references.read(r) for r in row.references] for row in rows]

        def whole_job() -> None:
            loaded.run(ShardTask(shard), "benchmark")

        def bare_sampling() -> None:
            components.device.use_threads()
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                components.pipeline.generate(
                    [row.prompt for row in part],
                    pictures[start : start + size],
                    seeds=[row.seed for row in part],
                    steps=job.config.steps,
                    guidance_scale=job.config.guidance_scale,
                    height=job.config.height,
                    width=job.config.width,
                )

        medians = alternate({"bare sampling": bare_sampling, "whole job": whole_job}, rounds)
        halves = [*sharding.ShardPlan(len(rows), len(rows) // 2)]
        idle = {
            name: statistics.median(idle_between(loaded, halves, at_once) for _ in range(rounds))
            for name, at_once in (("one after the other", 1), ("overlapping", 2))
        }
    print(f"{len(rows)} rows in batches of {size}, {threads} threads, {rounds} rounds\n\n| work | speed |\n|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {medians['bare sampling'] / seconds:.3f} |")
    print("\n| two shards of half the rows | nothing is sampled between them, share of a shard |\n|---|---|")
    for name, share in idle.items():
        print(f"| {name} | {share:.2%} |")


if __name__ == "__main__":
    main()
