"""Measure what the approximate modes save and what they cost in quality: ``python benchmarks/approximate.py``.

A worker in this process samples and scores the demo's rows on the embedded model: first in the exact mode (50 steps of
DDIM, all of them guided), then in each approximate mode. Noise, prompts and references are the same, so the modes are
compared row by row.

At the end, the operations of a denoising step with reused deep blocks are counted at the full shapes of Stable
Diffusion 2.1.
"""

import dataclasses
import tempfile
from typing import Any

import click
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from full_size import FULL
from torch.utils.flop_counter import FlopCounterMode

from vcf_batch import images, sharding, storage
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.config.run_config import RunConfig
from vcf_batch.output import commits, shards
from vcf_batch.setup import absolute_paths, defaults, manifest_check, run_models
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.vcf.deep_cache import DeepCache
from vcf_batch.worker import worker
from vcf_batch.worker.worker import Worker

SCORES = ("clip_score", "clip_reference", "lpips")
EXACT: dict[str, Any] = {"steps": 50, "scheduler": "ddim"}
MODES: dict[str, dict[str, Any]] = {
    "exact: 50 steps of ddim": EXACT,
    "guided in 0.2 to 1": EXACT | {"guidance_lo": 0.2},
    "guided in 0 to 0.8": EXACT | {"guidance_hi": 0.8},
    "guided in 0.2 to 0.8": EXACT | {"guidance_lo": 0.2, "guidance_hi": 0.8},
    "guided in 0.5 to 1": EXACT | {"guidance_lo": 0.5},
    "deep blocks in every 2nd step": EXACT | {"deep_cache": 2},
    "deep blocks in every 3rd step": EXACT | {"deep_cache": 3},
    "deep blocks in every 5th step": EXACT | {"deep_cache": 5},
    "20 steps of ddim": {"steps": 20, "scheduler": "ddim"},
    "20 steps of dpm++": {"steps": 20, "scheduler": "dpm++"},
    "20 steps of dpm++, guided in 0.2 to 1": {"steps": 20, "scheduler": "dpm++", "guidance_lo": 0.2},
    "20 steps of dpm++, deep blocks in every 2nd step": {"steps": 20, "scheduler": "dpm++", "deep_cache": 2},
    "10 steps of dpm++": {"steps": 10, "scheduler": "dpm++"},
}


def share_of_a_step_that_reuses() -> float:
    """Operations of a UNet call that reuses deep blocks, divided by those of a call that computes them.

    They are counted on the meta device, without computing values.
    """
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(**FULL.unet, use_linear_projection=True)
        inputs = (torch.empty(2, 4, FULL.pixels // 8, FULL.pixels // 8), torch.tensor(500), torch.empty(2, 334, 1024))
        counts = []
        with DeepCache(unet, interval=2) as cache:
            for number in range(2):
                cache.begin_step(number, is_new_batch=False)
                with FlopCounterMode(display=False) as counter:
                    unet(*inputs)
                counts.append(counter.get_total_flops())
    return counts[1] / counts[0]


def operations(subject: Worker) -> int:
    """Number of multiplications and additions for one image."""
    config, pipeline = subject.components.config, subject.components.pipeline
    with FlopCounterMode(display=False) as counter:
        pipeline.generate(["a red star"], seeds=[0], guidance_scale=config.guidance_scale, **vars(config.sampling))
    return counter.get_total_flops()


def drawn(subject: Worker) -> list[dict[str, Any]]:
    """Generate the whole manifest: its rows with their scores, and with their pixels in ``pixels``."""
    shard = sharding.ShardPlan(subject.manifest.num_rows, subject.manifest.num_rows)[0]
    made = subject.run(ShardTask(shard), "benchmark")
    assert made  # it is no trial
    _, staged = made
    output = subject.components.config.output
    samples = list(shards.read_samples(storage.join(output, staged["tar"])))
    commits.discard(output, staged)
    return [sample["json"] | {"pixels": np.asarray(images.decode(sample["png"], MAX_PIXELS))} for sample in samples]


@click.command()
@click.option("--manifest", default="manifests/demo.parquet", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--limit", type=int, help="Only the first rows.")
@click.option(
    "--mode",
    "chosen",
    multiple=True,
    type=click.Choice([*MODES]),
    help="Modes beside the exact one; else all",
)
def main(manifest: str, threads: int, limit: int | None, chosen: tuple[str, ...]) -> None:
    """Print one line for each mode."""
    with tempfile.TemporaryDirectory(prefix="vcf-batch-approximate-") as output:
        config = absolute_paths.absolute(
            RunConfig(manifest=manifest, output=output, gpus_per_worker=0, cpus_per_worker=threads, limit=limit)
        )
        job = defaults.settle(config, manifest_check.open_checked(config, None), run_models.resolve(config))
        loaded = worker.load(job)
        whole = 0
        exact: list[dict[str, Any]] = []
        head = "operations | CLIP score | CLIP to reference | LPIPS to reference | mean difference of 255"
        click.echo(f"{job.manifest.num_rows} rows\n\n| mode | {head} |\n|---|{'---|' * 5}")
        for name, mode in MODES.items():
            if chosen and mode is not EXACT and name not in chosen:
                continue
            components = dataclasses.replace(loaded.components, config=job.config.replace(**mode))
            subject = Worker(components, job.manifest, job.fingerprint)
            count, rows = operations(subject), drawn(subject)
            whole, exact = whole or count, exact or rows
            cells = [f"{count / whole:.0%}", *(_change(score, rows, exact) for score in SCORES)]
            difference = np.mean(
                [np.abs(a["pixels"] - b["pixels"].astype(float)) for a, b in zip(rows, exact, strict=True)]
            )
            click.echo(f"| {name} | {' | '.join(cells)} | {difference:.1f} |")
    share = share_of_a_step_that_reuses()
    click.echo(
        f"\nA step that reuses deep blocks takes {share:.1%} of the operations of one that computes them (SD 2.1)."
    )


def _change(score: str, rows: list[dict[str, Any]], exact: list[dict[str, Any]]) -> str:
    """Mean of a score, and in brackets its mean change from the exact mode with the standard error."""
    pairs = [(row[score], base[score]) for row, base in zip(rows, exact, strict=True) if base[score] is not None]
    now, before = np.array(pairs).T
    if rows is exact:
        return f"{now.mean():.4f}"
    change = now - before
    return f"{now.mean():.4f} ({change.mean():+.4f} ± {change.std(ddof=1) / np.sqrt(len(change)):.4f})"


if __name__ == "__main__":
    main()
