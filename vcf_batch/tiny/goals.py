"""Measure the tiny family against its goals: ``python -m vcf_batch.tiny.goals --second-probe build/probe.safetensors``.

Everything is read by the second probe. The world's own pictures, and what the autoencoder restores of them, come first.
Four rows of generated pictures follow: text only by captions that name all; the same of stripes and gradients, with
their direction; text only by prompts that name shape and colour; and these with a reference, which differs in
everything, fused by ``concat`` at its default strength. Several folders of weights stand side by side, on the same
prompts and noise.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vcf_batch.images import from_unit
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny import pairs, world
from vcf_batch.tiny.fitting import chunks
from vcf_batch.tiny.second_probe import SecondProbe, second_probe, shown
from vcf_batch.vcf.pipeline import VCFPipeline

REAL = "real renders"
RESTORED = "VAE reconstructions"
ALL_NAMED = "text only, all named"
DIRECTION_NAMED = "text only, direction named"
OBJECT_NAMED = "text only, shape and colour named"
BY_CONCAT = "concat at its default"
KEPT_SHARE = "concat keeps of text only"
ROWS = (REAL, RESTORED, ALL_NAMED, DIRECTION_NAMED, OBJECT_NAMED, BY_CONCAT, KEPT_SHARE)
RENDERS = 2048
"""Pictures of the world itself that are read and restored."""

WANTED_SHARES: Mapping[str, Mapping[str, float]] = {
    ALL_NAMED: {"shape": 0.97, "color": 0.97, "style": 0.97, "position": 0.99},
    KEPT_SHARE: {"shape": 0.95, "color": 0.95},
    BY_CONCAT: {"pattern": 0.90, "background": 0.90, "style": 0.92, "position": 0.92, "gradients": 0.85},
}
"""Goals by row and attribute. With ``concat`` shape and colour are the prompt's, and the others the reference's."""

READ_COLUMNS = ("shape", "color", "pattern", "background", "style", "position", "size", "stripes", "gradients")
WITH_DIRECTION = ("striped", "gradient")
SHEET_PICTURES = 64
"""Pictures of a contact sheet."""


def draw(
    pipeline: VCFPipeline, prompts: Sequence[str], references: Sequence[Image.Image] | None, what: str, autocast: bool
) -> Tensor:
    """Pictures ``[B, 3, 64, 64]`` in [0, 1]. Seeds count from 0, and all settings are the model's default."""

    def batches() -> Iterator[Tensor]:
        for part in tqdm(list(chunks(len(prompts), 32)), desc=what, mininterval=10):
            chosen = references[part] if references else None
            seeds = range(part.start, part.start + len(prompts[part]))
            yield pipeline.generate(prompts[part], chosen, seeds=seeds).float()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return torch.cat(list(batches()))


@torch.no_grad()
def restore(pipeline: VCFPipeline, pictures: Tensor) -> Tensor:
    """Pictures ``[B, 3, 64, 64]`` in [0, 1] after a round trip through the latents."""
    factor = pipeline.vae.config.scaling_factor
    parts = (pipeline.vae.encode(pictures[part] * 2 - 1).latent_dist.mean for part in chunks(len(pictures), 64))
    return torch.cat([pipeline.decode(latents * factor) for latents in parts])


def shares(probe: SecondProbe, pictures: Tensor, scenes: world.Scenes) -> dict[str, float]:
    """Share of the pictures by attribute, 0 to 1, that show the scenes' value; without those that no scene has."""
    read = shown(probe, pictures, scenes).items()
    return {key: right.float().mean().item() for key, right in read if len(right)}


def measure(
    weights: Path, probe: SecondProbe, count: int, sheets: Path | None, autocast: bool = False, renders: int = RENDERS
) -> dict[str, dict[str, float]]:
    """Shares by row of the table and attribute, from ``count`` prompts; ``sheets`` is where pictures are written."""
    pipeline = VCFPipeline.from_pretrained(weights, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    real = world.sample_scenes(renders, pairs.HELD_OUT + 3)
    pictures = world.render(real)
    rows = {REAL: shares(probe, pictures, real), RESTORED: shares(probe, restore(pipeline, pictures), real)}
    full = world.sample_scenes(count, pairs.HELD_OUT)
    captions = world.captions(full, random.Random(pairs.HELD_OUT), full=1.0)
    drawn = pairs.draw(count)
    wanted = world.compose([pair.wanted for pair in drawn], seed=0)
    prompts, references = [pair.prompt for pair in drawn], [pair.reference for pair in drawn]
    lines = torch.isin(full.attributes["pattern"], torch.tensor([world.PATTERNS.index(p) for p in WITH_DIRECTION]))
    directed = full.part(lines)
    for name, texts, shown_to, scenes in (
        (ALL_NAMED, captions, None, full),
        (DIRECTION_NAMED, world.captions(directed, random.Random(pairs.HELD_OUT), 1.0, world.TAUGHT), None, directed),
        (OBJECT_NAMED, prompts, None, wanted),
        (BY_CONCAT, prompts, references, wanted),
    ):
        pictures = draw(pipeline, texts, shown_to, name, autocast)
        rows[name] = shares(probe, pictures, scenes)
        if sheets:
            _sheet(pictures[:SHEET_PICTURES], sheets / f"{weights.name} {name}.png")
    for row, told in ((OBJECT_NAMED, pairs.PROMPT), (DIRECTION_NAMED, ("stripes", "gradients"))):
        rows[row] = {key: rows[row][key] for key in told if key in rows[row]}
    rows[ALL_NAMED].pop("stripes", None)  # Its captions do not say the direction.
    rows[KEPT_SHARE] = {key: rows[BY_CONCAT][key] / max(rows[OBJECT_NAMED][key], 1e-9) for key in pairs.PROMPT}
    return rows


def _sheet(pictures: Tensor, file: Path) -> None:
    """Write pictures as rows of eight, enlarged three times."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.cat([pictures, torch.ones(-len(pictures) % 8, *pictures.shape[1:])])  # The last row ends in white.
    rows = [torch.cat(list(whole[part]), dim=2) for part in chunks(len(whole), 8)]
    image = Image.fromarray(from_unit(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()))
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(file)


def table(measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown table of percentages: for each row of the goals, the goal and what each family reaches."""
    lines = ["| % | weights | " + " | ".join(READ_COLUMNS) + " |", "|---|---|" + "---|" * len(READ_COLUMNS)]
    for row in ROWS:
        sources = {
            **({"goal": WANTED_SHARES[row]} if row in WANTED_SHARES else {}),
            **{n: rows[row] for n, rows in measured.items()},
        }
        for source, values in sources.items():
            cells = (f"{100 * values[key]:.1f}" if key in values else "" for key in READ_COLUMNS)
            lines.append(f"| {row} | {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--weights", type=click.Path(path_type=Path, exists=True), multiple=True, default=[tiny_folder()], show_default=True
)
@click.option("--second-probe", "file", type=click.Path(path_type=Path), required=True, help="Trained if absent.")
@click.option("--count", type=click.IntRange(min=8), default=512, show_default=True, help="Prompts of each row.")
@click.option("--sheets", type=click.Path(path_type=Path), help="Folder for pictures of the first 64 of each row.")
@click.option("--autocast/--no-autocast", default=False, help="Sample in bfloat16: half the time on CPUs with AMX.")
def main(weights: tuple[Path, ...], file: Path, count: int, sheets: Path | None, autocast: bool) -> None:
    """Measure families of weights, and print their figures beside the goals."""
    probe = second_probe(file)
    click.echo(table({str(folder): measure(folder, probe, count, sheets, autocast) for folder in map(Path, weights)}))


if __name__ == "__main__":
    main()
