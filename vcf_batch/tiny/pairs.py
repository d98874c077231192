"""Pairs of prompt and reference for which the attributes of a correct picture are known."""

import random
from dataclasses import dataclass

import torch
from PIL import Image

from vcf_batch.images import from_unit
from vcf_batch.models.embedded import SHAPES
from vcf_batch.tiny import world

HELD_OUT = 990_000_000
"""First of the seeds whose scenes no stage is trained on."""

PROMPT = ("shape", "color")
"""Attributes that prompts name. All other attributes come from the reference."""


@dataclass(frozen=True)
class PromptAndReference:
    """A prompt that names :data:`PROMPT` only, and a reference that differs in both."""

    prompt: str
    reference: Image.Image
    wanted: dict[str, str]
    """Attributes of a correct picture: the prompt's shape and colour, and the reference's other attributes."""


def draw(count: int, seed: int = HELD_OUT + 1) -> list[PromptAndReference]:
    """Draw ``count`` held-out pairs. Other seeds give other pairs."""
    return with_prompts(world.sample_scenes(count, seed))


def wanted(shown: world.Scenes) -> world.Scenes:
    """Scenes that correct pictures show: another shape, a colour that does not occur, and else what references show."""
    count = len(shown)
    generator = torch.Generator().manual_seed(shown.seed + 1)
    other = torch.randint(1, len(SHAPES), (count,), generator=generator)
    chances = torch.rand(count, len(world.COLORS), generator=generator)
    for name in ("color", "background", "background2"):
        chances.scatter_(1, shown.attributes[name][:, None], -1.0)
    named = {"shape": (shown.attributes["shape"] + other) % len(SHAPES), "color": chances.argmax(dim=1)}
    return world.Scenes({**shown.attributes, **named}, shown.seed)


def with_prompts(shown: world.Scenes) -> list[PromptAndReference]:
    """Pairs whose references show these scenes.

    The prompt's shape is not the reference's, and its colour does not occur in it.
    """
    scenes, rng = wanted(shown), random.Random(shown.seed)
    pixels = from_unit(world.render(shown).permute(0, 2, 3, 1).numpy())
    return [
        PromptAndReference(
            world.caption(scenes.named(number), PROMPT, rng), Image.fromarray(picture), scenes.named(number)
        )
        for number, picture in enumerate(pixels)
    ]
