"""A worker's whole job against bare sampling, with scores, pictures like photographs and two shards that overlap."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import full_size
import numpy as np
import torch
from gpu_bench import Bench
from gpu_record import Figure
from image_formats import rough
from measure import between, marked_sampling
from PIL import Image
from torch import Tensor

from vcf_batch.metrics.lpips import LPIPS, Backbone
from vcf_batch.metrics.scorer import Scorer

CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
"""Channels of the feature maps that LPIPS compares."""
SHARD_SECONDS = 600
"""A shard's usual time, of which the time between two shards is a share."""


def job(
    bench: Bench, name: str, scheduler: str, steps: int | None, image_format: str, network: str, batches: int
) -> Iterator[Figure]:
    """Measure two shards of a worker, from the first sampling to the last, and to the last file.

    Random weights make pictures of one colour, or none. So the sampled images are replaced, on their device, by
    pictures with the spectrum of photographs, which take as long to encode as photographs do.

    Args:
        bench: the models.
        name: name of the measurement.
        scheduler, steps: the way of sampling; None is the usual number of steps.
        image_format: format of the images.
        network: backbone of LPIPS.
        batches: number of batches of a shard.
    """
    # Only these measurements need pyarrow, so that the others can do without it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    from vcf_batch import sharding
    from vcf_batch.manifest.manifest import Manifest
    from vcf_batch.manifest.references import ReferenceReader
    from vcf_batch.setup.shard_task import ShardTask
    from vcf_batch.worker.components import Components
    from vcf_batch.worker.worker import Worker

    batch, steps = bench.batch, min(steps or bench.shapes.steps, bench.shapes.steps)
    bare = bench.per_image.get("eager/rule")
    if bare is None or (scheduler, steps) != ("ddim", bench.shapes.steps):
        kept = f"bare {scheduler} {steps}"
        bare = bench.per_image.get(kept) or bench.time(kept, batch, steps=steps, scheduler=scheduler)
    scorer = bench.built(f"scorer {network}", lambda: _scorer(bench, network))
    pictures, count = _pictures(bench), 2 * batches * batch
    with tempfile.TemporaryDirectory(prefix="vcf-batch-gpu-") as scratch:
        folder = Path(scratch)
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{number}.jpg", quality=95)
        columns = {
            "prompt": [f"a picture of the {row}th thing" for row in range(count)],
            "reference": [f"{row % len(pictures)}.jpg" for row in range(count)],
        }
        pq.write_table(pa.table(columns), folder / "manifest.parquet")
        manifest = Manifest.open(str(folder / "manifest.parquet"))
        config = bench.config.replace(
            manifest=manifest.url,
            output=str(folder / "out"),
            shard_size=batches * batch,
            scheduler=scheduler,
            steps=steps,
            image_format=image_format,
        )
        reader = ReferenceReader(manifest.base, (), config.max_pixels)
        components = Components(config, bench.pipeline, scorer, reader, "random weights", bench.device)
        worker = Worker(components, manifest, "0" * 64)
        shards = sharding.ShardPlan(count, batches * batch)
        bench.synchronize()
        begin = time.perf_counter()
        with (
            marked_sampling(bench.pipeline, _tensor(pictures, bench.kind)) as moments,
            ThreadPoolExecutor(2) as threads,
        ):
            receipts = [
                done[0] for done in threads.map(lambda shard: worker.run(ShardTask(shard), shard.name), shards) if done
            ]
        to_end = time.perf_counter() - begin
    written = sum(receipt.counts["success"] for receipt in receipts)
    whole = between(moments[0][0], moments[-1][1]) / count
    gaps = [between(end, begin) for (_, end), (begin, _) in itertools.pairwise(moments)]
    values = {
        "value": bare / whole,
        "bare": bare,
        "whole": whole,
        "to_the_last_file": to_end / count,
        "idle_between_batches": sum(gaps) / len(gaps),
        "written": written,
        "rows": count,
        "timings": [dict(receipt.timings) for receipt in receipts],
        "scores": dict(receipts[0].means),
    }
    what = f"{name}: whole job against bare sampling"
    yield Figure(what, f"{bare / whole:.3f}", ">= 0.97", bare / whole >= 0.97, values=values)
    yield Figure(f"{name}: rows written", f"{written} of {count}", "all", written == count, required=True)
    idle = gaps[batches - 1]
    what = f"{name}: idle between two shards, of one of ten minutes"
    share = idle / SHARD_SECONDS
    yield Figure(what, f"{share:.2%} ({idle:.2f} s)", "< 1%", share < 0.01, values={"value": share, "seconds": idle})


def _scorer(bench: Bench, network: str) -> Scorer:
    """Judge and LPIPS with random weights."""
    with torch.device(bench.kind):
        backbone = Backbone(network).eval().requires_grad_(False)
        weights = [torch.rand(channels) / channels for channels in CHANNELS[network]]
    perceptual = LPIPS(backbone.to(bench.kind), weights, bench.kind)
    return Scorer(bench.built("judge", lambda: full_size.judge(bench.shapes, bench.kind)), perceptual)


def _pictures(bench: Bench) -> list[Image.Image]:
    """Pictures with the spectrum of photographs, of the models' size."""

    def build() -> list[Image.Image]:
        edge = bench.shapes.pixels
        return [Image.fromarray(np.ascontiguousarray(rough(number)[:edge, :edge])) for number in range(bench.batch)]

    pictures: list[Image.Image] = bench.built("pictures", build)
    return pictures


def _tensor(pictures: list[Image.Image], kind: str) -> Tensor:
    """Pictures as float32 ``[N, 3, H, W]`` in [0, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).contiguous().to(kind)
