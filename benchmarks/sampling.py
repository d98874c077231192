"""Measure sampling against stock diffusers: ``python benchmarks/sampling.py``.

Both sample the same prompts on the embedded model, text only, with the same steps and guidance. Diffusers' own
``StableDiffusionPipeline`` takes one prompt per call, as in a loop over prompts, and the batches that ``VCFPipeline``
takes. The rounds alternate, so that a busy machine slows all equally.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from measure import alternate

from vcf_batch.models.resolution import tiny_folder
from vcf_batch.vcf.base.pipeline_xl import VCFXLPipeline
from vcf_batch.vcf.pipeline import VCFPipeline

COLORS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "star", "ring", "cross")


def stock_pipeline(pipeline: VCFPipeline) -> Any:
    """diffusers' own pipeline over the same components, of the family of the model.

    That of Stable Diffusion XL samples and decodes in one precision. So it gets a copy of the VAE in the UNet's.
    """
    if isinstance(pipeline, VCFXLPipeline):
        parts = {name: each for name, each in pipeline.components.items() if name != "aligner"}
        vae = copy.deepcopy(pipeline.vae).to(pipeline.unet.dtype, memory_format=torch.contiguous_format)
        stock: Any = StableDiffusionXLPipeline(**parts | {"vae": vae}, add_watermarker=False)
    else:
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        stock = StableDiffusionPipeline(**{name: pipeline.components[name] for name in names}, **none)
    stock.set_progress_bar_config(disable=True)
    return stock


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Measure compiled networks too, which takes a minute.")
def main(rounds: int, batch_size: int, threads: int, compiled: bool) -> None:
    """Print the ratios to stock diffusers, from the medians of the rounds."""
    torch.set_num_threads(threads)
    pipeline = VCFPipeline.from_pretrained(tiny_folder(), dtype=torch.float32)
    stock = stock_pipeline(pipeline)
    steps, scale = pipeline.config.default_steps, pipeline.config.default_guidance_scale
    prompts = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]

    def batches(size: int) -> Iterator[list[str]]:
        return (prompts[start : start + size] for start in range(0, len(prompts), size))

    def theirs(size: int) -> None:
        for part in batches(size):
            stock(part, num_inference_steps=steps, guidance_scale=scale, output_type="np")

    def in_batches(pipeline: VCFPipeline) -> None:
        for part in batches(batch_size):
            pipeline.generate(part, seeds=range(len(part)))

    ours = f"vcf-batch, batches of {batch_size}"
    works: dict[str, Callable[[], None]] = {
        "stock diffusers, row by row": functools.partial(theirs, 1),
        f"stock diffusers, batches of {batch_size}": functools.partial(theirs, batch_size),
        ours: functools.partial(in_batches, pipeline),
    }
    if compiled:
        other = VCFPipeline.from_pretrained(tiny_folder(), dtype=torch.float32).set_up("cpu", compiled=True)
        works[f"{ours}, compiled"] = functools.partial(in_batches, other)
    medians = alternate(works, rounds)
    slowest = medians["stock diffusers, row by row"]
    print(
        f"{len(prompts)} prompts, {steps} steps, {threads} threads, {rounds} rounds\n\n| sampling | speed |\n|---|---|"
    )
    for name, seconds in medians.items():
        print(f"| {name} | {slowest / seconds:.2f} |")


if __name__ == "__main__":
    main()
