"""Measure the cost and the benefit of prompt-noise optimisation.

``python benchmarks/pno.py cost``: operations of an optimisation step relative to those of an image.

``python benchmarks/pno.py memory``: peak memory of a gradient through 5, 20 and 50 denoising steps. The project
computes activations a second time in the backward pass; the alternative keeps them.

``python benchmarks/pno.py quality``: scores of the guide, the judge and the perceptual distance for two runs over the
demo manifest, without and with optimisation.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from measure import peak_memory
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vcf_batch import images, pool
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.sampling import Sampling
from vcf_batch.models import resolution
from vcf_batch.models.cache import fetch
from vcf_batch.output import shards
from vcf_batch.vcf import pno, sampling
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline

DEMO = Path(__file__).parent.parent / "manifests" / "demo.parquet"
STEPS = (5, 20, 50)
BETTER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "guide": lambda change: change > 0,
    "clip_reference": lambda change: change > 0,
    "lpips": lambda change: change < 0,
    "clip_score": lambda change: change > 0,
}
"""Scores, and for each whether a change is an improvement."""


def load(model: str) -> tuple[VCFPipeline, Guide]:
    """The model and its own guide, frozen, on the GPU if there is one."""
    pipeline = VCFPipeline.from_pretrained(fetch(resolution.resolve(model)), dtype=torch.float32)
    pipeline.set_up("cuda" if torch.cuda.is_available() else "cpu")
    statistics = pipeline.feature_extractor
    return pipeline, Guide(pipeline.image_encoder, statistics.image_mean, statistics.image_std)


def prepared(model: str, batch_size: int) -> Callable[[int], tuple[Callable[[], Any], Callable[..., Any]]]:
    """A function from number of denoising steps to two functions: one samples a batch, the other optimises it."""
    pipeline, guide = load(model)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    fusions = [Fusion([tokens]) for tokens in pipeline.encode_references([picture] * batch_size)]
    text, negative = (pipeline.encode_prompts([prompt] * batch_size) for prompt in ("a red star", ""))
    targets = guide.targets([[picture]] * batch_size, [None] * batch_size)
    seeds = range(batch_size)

    def both(steps: int) -> tuple[Callable[[], Any], Callable[..., Any]]:
        inputs = pipeline.prepare(text, negative, fusions, seeds=seeds, sampling=Sampling(steps=steps))
        optimize = functools.partial(
            pno.optimize, *inputs, guide, targets, seeds=seeds, lr_conditioning=1e-2, lr_noise=1e-2, gamma=0.1
        )
        return functools.partial(inputs[0], *inputs[1:]), optimize

    return both


def operations(function: Callable[[], Any]) -> int:
    """Number of floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@click.group()
def main() -> None:
    """Measure prompt-noise optimisation."""


@main.command()
@click.option("--model", default="tiny", show_default=True)
@click.option("--batch-size", default=8, show_default=True)
def memory(model: str, batch_size: int) -> None:
    """Print the peak memory of sampling and of one optimisation step in MiB, by number of denoising steps."""
    sampling_of = prepared(model, batch_size)
    click.echo("| denoising steps | sampling | activations computed again | activations kept |\n|---|---|---|---|")
    for steps in STEPS:
        sample, optimize = sampling_of(steps)
        with torch.no_grad():
            alone = peak_memory(sample)
        recomputed = peak_memory(functools.partial(optimize, steps=1))
        with mock.patch.object(sampling, "checkpoint", lambda function, *inputs, **_: function(*inputs)):
            kept = peak_memory(functools.partial(optimize, steps=1))
        click.echo(f"| {steps} | {alone:.1f} | {recomputed:.1f} | {kept:.1f} |")


@main.command()
@click.option("--model", default="tiny", show_default=True)
def cost(model: str) -> None:
    """Print the operations of one optimisation step in units of an image's, for 5, 20 and 50 denoising steps."""
    sampling_of = prepared(model, 1)
    for steps in STEPS:
        sample, optimize = sampling_of(steps)
        with torch.no_grad():
            alone = operations(sample)
        one, two = (operations(functools.partial(optimize, steps=number)) for number in (1, 2))
        click.echo(f"{steps} denoising steps: a step of optimisation is {(two - one) / alone:.2f} images")


@main.command()
@click.option("--manifest", type=click.Path(path_type=Path, exists=True), default=DEMO, help="[default: the demo's]")
@click.option("--model", default="tiny", show_default=True)
@click.option("--pno-steps", default=10, show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=NUMBER", help="Another setting of the run. Repeatable.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to keep both runs in.")
def quality(manifest: Path, model: str, pno_steps: int, settings: tuple[str, ...], out: Path | None) -> None:
    """Print the scores of guide, judge and perceptual distance, without and with optimisation."""
    numbers: dict[str, Any] = {"address": "local"}
    numbers |= {name: float(value) for name, _, value in (each.partition("=") for each in settings)}
    with tempfile.TemporaryDirectory(prefix="vcf-batch-pno-") as temporary:
        folder, found = out or Path(temporary), []
        for name, steps in (("without", 0), ("with", pno_steps)):
            output = str(folder / name)
            config = RunConfig(manifest=str(manifest), output=output, model=model, pno_steps=steps, **numbers)
            click.echo(pool.run(config), err=True)
            found.append(scores(folder / name, manifest.parent, model))
    click.echo(f"| mean of {len(found[0])} rows | without | with | rows that get better |\n|---|---|---|---|")
    for score, better in BETTER.items():
        before, after = (np.array([row[score] for row in rows]) for rows in found)
        share = better(after - before).mean()
        click.echo(f"| {score} | {before.mean():.4f} | {after.mean():.4f} | {share:.1%} |")


def scores(output: Path, base: Path, model: str) -> list[dict[str, Any]]:
    """Rows of a run's parquets that have a reference. Each gets the guide's cosine in ``guide``."""
    _, guide = load(model)
    rows = []
    for parquet in sorted(output.glob("*.parquet")):
        files = {sample["__key__"]: sample["png"] for sample in shards.read_samples(str(parquet.with_suffix(".tar")))}
        for row in pq.read_table(parquet).to_pylist():
            if row["reference"] is None:
                continue
            pixels = torch.from_numpy(images.to_unit(images.decode(files[row["key"]], MAX_PIXELS)))
            reference = images.decode((base / row["reference"]).read_bytes(), MAX_PIXELS)
            target = guide.targets([[reference]], [None])
            rows.append(row | {"guide": (guide.embed(pixels.permute(2, 0, 1)[None]) * target).sum().item()})
    return rows


if __name__ == "__main__":
    main()
