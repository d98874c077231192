"""Regenerate samples of an output on this machine from their recorded settings, and compare them with its images.

A sample is regenerated in its own batch and place, with padding for the other rows of its shard. If type of device and
versions are those in the receipt's ``device``, its bytes are the same. Other devices round sums differently;
:data:`TOLERANCE` limits the difference of the pixels that is accepted from them.
"""

import dataclasses
import itertools
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vcf_batch import images, storage
from vcf_batch.commands.verify import Finding
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.driver.device_types import differences
from vcf_batch.output import commits, receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import Shard
from vcf_batch.setup import claim, defaults, run_models
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.storage import scratch
from vcf_batch.worker import in_process
from vcf_batch.worker.worker import Worker

TOLERANCE = 5.0
"""Largest accepted mean absolute difference of an image's pixels (0 to 255) on another type of device. On the demo
manifest another instruction set makes at most 0.0004 in float32 and 0.9 in bfloat16."""


def regenerate(output: Output, count: int, seed: int) -> Iterator[Finding]:
    """Regenerate some samples. Yield a finding for each image that differs, and at the end a summary.

    Args:
        output: an output without damage.
        count: largest number of samples to regenerate.
        seed: seed of their random choice.

    Raises:
        UsageError: the manifest or a model cannot be used.
        RefusedError: manifest or model have changed since the run.
        VcfBatchError: storage, network or the machine failed.
    """
    compared = same = 0
    largest, differing = 0.0, ""
    with scratch.temporary("shards to compare") as folder:
        worker = _load(output, folder)
        device = worker.components.device.description
        for receipt, places in _chosen(output, count, seed):
            shard = receipt.shard
            exact = receipt.sampled_at_once is None and receipt.device == device
            differing = differing or differences(receipt.device, device)
            for key, there, here in _pairs(output, worker, folder, shard, places, exact):
                if isinstance(here, str):
                    yield Finding(shard.name, f"{key} cannot be drawn again: {here}", kind="note")
                    continue
                compared += 1
                same += there == here
                largest = max(largest, difference := _difference(there, here))
                if (exact and there != here) or difference > TOLERANCE:
                    cause = f"{key} drawn again differs by {difference:.3g} of 255 on the mean"
                    where = "the type of device that made it" if exact else "another type of device"
                    yield Finding(shard.name, f"{cause}, on {where}; the image or a reference was changed", shard)
    told = f"{compared} drawn again, {same} with the same bytes; the largest mean difference is {largest:.3g} of 255"
    if differing:
        told += f"; some were made on another type of device ({differing} here)"
    yield Finding("samples", told, kind="note")


def _load(output: Output, folder: str) -> Worker:
    """A worker with the settings of the output's run. It writes into ``folder``."""
    config = output.config
    models = run_models.resolve(config, claim.commits_of(config, output.record))
    job = defaults.settle(config, output.need_manifest(), models)
    claim.claim(job, publish=False)  # Refuses an output of another run.
    gpus = config.gpus_per_worker if in_process.has_gpu() else 0.0
    return in_process.load(dataclasses.replace(job, config=job.config.replace(gpus_per_worker=gpus)), folder)


def _chosen(output: Output, count: int, seed: int) -> Iterator[tuple[Receipt, list[int]]]:
    """Choose samples with equal probability: each receipt with places, from 0, among the shard's successful samples."""
    counts = {receipt.shard.index: receipt.counts["success"] for receipt in receipts.read(output.url)}
    # Shards without a readable receipt are missing here, so a shard's place among the others is not its index.
    indices, stops = [*counts], [0, *itertools.accumulate(counts.values())]
    places: dict[int, list[int]] = defaultdict(list)
    for number in sorted(random.Random(seed).sample(range(stops[-1]), min(count, stops[-1]))):
        position = bisect_right(stops, number) - 1
        places[indices[position]].append(number - stops[position])
    for receipt in receipts.read(output.url):
        if receipt.shard.index in places:
            yield receipt, places[receipt.shard.index]


def _pairs(
    output: Output, worker: Worker, folder: str, shard: Shard, places: list[int], exact: bool
) -> Iterator[tuple[str, bytes, bytes | str]]:
    """Key of each chosen sample, its committed image, and the regenerated image or the reason why there is none."""
    committed = shards.file_url(output.url, shard, "parquet")
    status = _column(committed, "status")
    rows = np.flatnonzero(pc.equal(status, "success").to_numpy())[places] + shard.start
    others = dict.fromkeys(set(range(shard.start, shard.stop)).difference(rows.tolist()), "not drawn")
    made = worker.run(ShardTask(shard, last_attempt=True, verdicts=others), shard.name)
    assert made  # it is no trial
    _, staged = made
    parquet, image = storage.join(folder, staged["parquet"]), output.config.image_format
    samples = shards.read_samples(storage.join(folder, staged["tar"])) if "tar" in staged else ()
    redrawn: dict[str, bytes | str] = {sample["__key__"]: sample[image] for sample in samples}
    errors = _by_key(parquet, "error_message")
    seeds_there, seeds_here = (_by_key(file, "seed") for file in (committed, parquet))
    if not exact:
        # Rounding may move a score over a gate's limit, so that another draw passes here.
        other = "another of its draws passes the gates here"
        redrawn |= {key: other for key in redrawn if seeds_there[key] != seeds_here[key]}
    commits.discard(folder, staged)
    for place, sample in enumerate(shards.read_samples(shards.file_url(output.url, shard, "tar"))):
        if place in places:
            key = sample["__key__"]
            yield key, sample[image], redrawn.get(key) or errors[key]


def _column(parquet: str, name: str) -> pa.ChunkedArray:
    with shards.open_parquet(parquet) as file:
        return file.read([name])[name]


def _by_key(parquet: str, name: str) -> dict[str, Any]:
    return dict(zip(_column(parquet, "key").to_pylist(), _column(parquet, name).to_pylist(), strict=True))


def _difference(first: bytes, second: bytes) -> float:
    """Mean absolute difference of two images' pixels, 0 to 255."""
    pixels = [np.asarray(images.decode(data, MAX_PIXELS), np.float32) for data in (first, second)]
    return float(np.abs(pixels[0] - pixels[1]).mean())
