"""Measure the roles of the tiny family: ``python benchmarks/roles.py --second-probe build/probe.safetensors``.

Prompts name shape and colour, and references differ in everything. The second probe reads what the pictures have of the
reference by each role; and what they have of three references at once, the style of one, the palette of another and
the layout of a third (docs/roles.md).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vcf_batch.config.limits import ROLES
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny import pairs, world
from vcf_batch.tiny.fitting import chunks
from vcf_batch.tiny.second_probe import SecondProbe, second_probe, shown
from vcf_batch.vcf.pipeline import VCFPipeline

WANTED: Mapping[str, Sequence[str]] = {"style": ("style",), "palette": ("background",), "layout": ("position",)}
"""What a role takes from its reference."""

SHARE, MOST_POINTS, KEPT = 0.70, 0.10, 0.90
"""Goals of a role: smallest share of pictures with what it takes; most points by which what another role takes occurs
more often than with the prompt alone; smallest part of the prompt that is kept. Pattern and size belong to no role."""

WITHOUT, EVERYTHING, TOGETHER = "text only", "all", "three at once"
TRIO = tuple(WANTED)
READ = (*pairs.PROMPT, "style", "background", "position", "pattern", "size")


def drawn_apart(count: int) -> tuple[list[str], list[list[Image.Image]], world.Scenes]:
    """Prompts, three references of each, and what a picture of all should show.

    The references of a prompt are those of three pairs of :func:`vcf_batch.tiny.pairs.draw`: its own gives the style,
    the next one the palette, and the one after that the layout.
    """
    drawn = pairs.draw(count)
    references, wanted = [], []
    for number, pair in enumerate(drawn):
        style, palette, layout = (drawn[(number + step) % count] for step in range(3))
        references.append([style.reference, palette.reference, layout.reference])
        taken = {name: palette.wanted[name] for name in ("background", "background2", "pattern")}
        taken |= {name: layout.wanted[name] for name in ("position", "size")}
        wanted.append({**pair.wanted, **taken})
    return [pair.prompt for pair in drawn], references, world.compose(wanted, seed=0)


def measure(
    pipeline: VCFPipeline, probe: SecondProbe, count: int, autocast: bool = False
) -> dict[str, dict[str, float]]:
    """Shares of pictures that show what prompt and reference say, by role and attribute, from ``count`` prompts."""
    drawn = pairs.draw(count)
    prompts, wanted = [pair.prompt for pair in drawn], world.compose([pair.wanted for pair in drawn], seed=0)
    references = [[pair.reference] for pair in drawn]
    _, trios, of_trios = drawn_apart(count)

    def read(what: str, shown_to: Sequence[list[Image.Image]], roles: Sequence[str], scenes: world.Scenes) -> None:
        parts = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for part in tqdm(list(chunks(count, 32)), desc=what, mininterval=10):
                seeds = range(part.start, part.start + len(prompts[part]))
                own = [list(roles) if images else None for images in shown_to[part]]
                made = pipeline.generate(prompts[part], shown_to[part], seeds=seeds, reference_roles=own)
                parts.append(made.float())
        right: Mapping[str, Tensor] = shown(probe, torch.cat(parts), scenes)
        rows[what] = {name: right[name].float().mean().item() for name in READ}

    rows: dict[str, dict[str, float]] = {}
    read(WITHOUT, [[] for _ in drawn], (), wanted)
    for role in ROLES:
        read(role, references, [role], wanted)
    read(TOGETHER, trios, TRIO, of_trios)
    return rows


def misses(role: str, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The goals that a role misses, in words."""
    found, alone = rows[role], rows[WITHOUT]
    unwanted = [name for other, names in WANTED.items() if other != role for name in names]
    wrong = [f"{name} {found[name]:.0%} < {SHARE:.0%}" for name in WANTED[role] if found[name] < SHARE]
    for name in pairs.PROMPT:
        if found[name] < KEPT * alone[name]:
            wrong.append(f"{name} {found[name]:.0%} < {KEPT * alone[name]:.0%}")
    for name in unwanted:
        if found[name] > alone[name] + MOST_POINTS:
            wrong.append(f"{name} {found[name]:.0%} > {alone[name] + MOST_POINTS:.0%}")
    return wrong


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of percentages, with the goals that each role misses."""
    lines = [f"| role | {' | '.join(READ)} | goals |", "|---|" + "---|" * (len(READ) + 1)]
    for name, values in rows.items():
        verdict = "" if name not in WANTED else ", ".join(misses(name, rows)) or "met"
        cells = (f"**{values[each]:.0%}**" if each in WANTED.get(name, ()) else f"{values[each]:.0%}" for each in READ)
        lines.append(f"| {name} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--weights", type=click.Path(path_type=Path, exists=True), default=tiny_folder(), show_default="the package's"
)
@click.option("--second-probe", "file", type=click.Path(path_type=Path), required=True, help="Trained if absent.")
@click.option("--count", type=click.IntRange(min=3), default=128, show_default=True, help="Prompts of each row.")
@click.option("--autocast/--no-autocast", default=False, help="Sample in bfloat16: half the time on CPUs with AMX.")
def main(weights: Path, file: Path, count: int, autocast: bool) -> None:
    """Print the table of roles, and what each one misses of its goals."""
    pipeline = VCFPipeline.from_pretrained(weights, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    click.echo(table(measure(pipeline, second_probe(file), count, autocast)))


if __name__ == "__main__":
    main()
