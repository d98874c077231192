"""Pairs of prompt and reference for which the attributes of a correct picture are known."""

import random
from collections.abc import Iterator
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


DIFFERING = 880_000_000
"""Seed of the scenes that :func:`differing` changes."""

ATTRIBUTES = ("palette", "style", "position", "size", "pattern", "shape", "color")
"""What the pairs of :func:`differing` differ in. The palette is both background colours."""


def differing(count: int) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    """Yield ``count`` pairs of pictures for each of :data:`ATTRIBUTES`, which differ in that attribute alone."""
    scenes = world.sample_scenes(count, DIFFERING)
    generator = torch.Generator().manual_seed(DIFFERING + 1)
    first = _pictures(scenes)
    for attribute in ATTRIBUTES:
        values = dict(scenes.attributes)
        if attribute == "palette":
            chances = torch.rand(count, len(world.COLORS), generator=generator)
            for name in ("color", "background", "background2"):
                chances.scatter_(1, values[name][:, None], -1.0)
            values["background"], values["background2"] = chances.argsort(dim=1, descending=True)[:, :2].unbind(1)
        else:
            number = len(world.VALUES[attribute])
            values[attribute] = (values[attribute] + torch.randint(1, number, (count,), generator=generator)) % number
        for one, other in zip(first, _pictures(world.Scenes(values, scenes.seed)), strict=True):
            yield attribute, one, other


def _pictures(scenes: world.Scenes) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in from_unit(world.render(scenes).permute(0, 2, 3, 1).numpy())]
