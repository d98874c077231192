"""Measure the tiny family: ``python -m vcf_batch.tiny.measure``. This makes a table of the model card.

The probe recognises the attributes that a picture shows. A held-out scene is a scene that no stage was trained on. The
influence of references is measured by ``vcf-batch model evaluate`` instead.
"""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from vcf_batch.images import from_unit
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny import world
from vcf_batch.tiny.fitting import chunks
from vcf_batch.tiny.pairs import HELD_OUT
from vcf_batch.tiny.probe import HEADS, Probe, agreement
from vcf_batch.vcf.pipeline import VCFPipeline

GOALS = {"style": 0.90, "pattern": 0.85, "background": 0.85, "color": 0.85, "shape": 0.75, "position": 0.85}
"""Goal by attribute: share of text-only pictures that show the caption's value."""


def read(probe: Probe, pictures: Tensor, scenes: world.Scenes) -> dict[str, float]:
    """Share of pictures by attribute in which the probe sees the scenes' value; see :func:`probe.agreement`."""
    return {name: right.float().mean().item() for name, right in agreement(probe, pictures, scenes).items()}


def generate(pipeline: VCFPipeline, prompts: list[str], **settings: Any) -> Tensor:
    """Pictures ``[B, 3, 64, 64]`` in [0, 1] for prompts alone, seeds counting from 0."""

    def batches() -> Iterator[Tensor]:
        for part in tqdm(list(chunks(len(prompts), 32)), desc="generate", leave=False):
            yield pipeline.generate(prompts[part], seeds=list(range(len(prompts)))[part], **settings)

    return torch.cat(list(batches()))


@torch.no_grad()
def reconstruct(pipeline: VCFPipeline, pictures: Tensor) -> Tensor:
    """Pictures ``[B, 3, 64, 64]`` in [0, 1] after a round trip through the latents."""
    factor = pipeline.vae.config.scaling_factor
    parts = (pipeline.vae.encode(pictures[part] * 2 - 1).latent_dist.mean for part in chunks(len(pictures), 64))
    return torch.cat([pipeline.decode(latents * factor) for latents in parts])


def zero_shot(judge: ClipJudge, pictures: Tensor, scenes: world.Scenes) -> dict[str, float]:
    """Share of pictures by attribute for which the judge prefers the caption with the right value to all others."""
    embedded = judge.embed_images(list(from_unit(pictures.permute(0, 2, 3, 1).numpy())))
    shares = {}
    for name in HEADS:
        if name == "background":  # two colours at once, which no single value describes
            continue
        captions = [world.caption({**scenes.named(0), name: value}, (name,), None) for value in world.VALUES[name]]
        chosen = (embedded @ judge.embed_texts(captions).T).argmax(1)
        shares[name] = (chosen == scenes.attributes[name]).float().mean().item()
    return shares


def text_only(pipeline: VCFPipeline, probe: Probe, count: int, **settings: Any) -> dict[str, float]:
    """Share of text-only pictures by attribute that show the value in their full held-out caption."""
    scenes = world.sample_scenes(count, HELD_OUT)
    prompts = world.captions(scenes, random.Random(HELD_OUT), full=1.0)
    return read(probe, generate(pipeline, prompts, **settings), scenes)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of percentages, one row a measurement."""
    lines = ["| shown as wanted, % | " + " | ".join(HEADS) + " |", "|---|" + "---|" * len(HEADS)]
    for name, values in rows.items():
        cells = (f"{100 * values[head]:.1f}" if head in values else "" for head in HEADS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--weights", type=click.Path(path_type=Path, exists=True), default=tiny_folder(), show_default=True)
@click.option("--count", default=512, show_default=True, help="Text-only pictures of each measurement.")
def main(weights: Path, count: int) -> None:
    """Measure how well the tiny family draws what captions say."""
    pipeline = VCFPipeline.from_pretrained(weights, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    probe = Probe.from_pretrained(weights / "probe", dtype=torch.float32)
    real = world.sample_scenes(2048, HELD_OUT + 3)
    pictures = world.render(real)
    rows: dict[str, Mapping[str, float]] = {
        "real renders": read(probe, pictures, real),
        "VAE reconstructions": read(probe, reconstruct(pipeline, pictures), real),
        "judge, zero-shot on real renders": zero_shot(
            ClipJudge.from_pretrained(str(weights / "judge")), pictures, real
        ),
        "goal of text only": GOALS,
    }
    for scale in sorted({5.0, pipeline.config.default_guidance_scale}):
        rows[f"text only, full captions, guidance {scale:g}"] = text_only(pipeline, probe, count, guidance_scale=scale)
    click.echo(table(rows))


if __name__ == "__main__":
    main()
