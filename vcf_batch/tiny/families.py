"""The families that can be trained: the embedded one, and two that show what its training does for references.

Both are made to be measured (``benchmarks/evaluation.py``) and are not shipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vcf_batch.tiny.world import COLORS, PATTERNS, STYLES, Scenes, sample_scenes

STAGE_ORDER = ("probe", "vae", "decoder", "clip", "vision", "judge", "aligner", "unet", "pack")
"""The stages of a whole training, in their order."""

SPARE = 3
"""Scenes that are drawn for each one that is needed, where not all can be used."""


@dataclass(frozen=True)
class Concepts:
    """Some of the world's values: a style, a pattern, and pairs of colours that a background has side by side."""

    style: str
    pattern: str
    pairs: tuple[tuple[str, str], ...]

    def shown(self, scenes: Scenes) -> Mapping[str, Tensor]:
        """Which scenes show the ``style``, the ``pattern``, and one of the pairs as ``background``: bool ``[B]`` each.

        A plain background shows one colour, and so no pair.
        """
        a, names = scenes.attributes, list(COLORS)
        pairs = torch.zeros(len(scenes), dtype=torch.bool)
        for pair in self.pairs:
            one, other = (names.index(color) for color in pair)
            for first, second in ((one, other), (other, one)):
                pairs |= (a["background"] == first) & (a["background2"] == second)
        return {
            "style": a["style"] == STYLES.index(self.style),
            "pattern": a["pattern"] == PATTERNS.index(self.pattern),
            "background": pairs & (a["pattern"] != PATTERNS.index("plain")),
        }

    def scenes_of(self, name: str, count: int, seed: int) -> Scenes:
        """Draw scenes that show one of the concepts, ``style``, ``pattern`` or ``background``, and no other."""
        values = dict(sample_scenes(count * SPARE + 64, seed).attributes)
        if name == "background":
            colors = torch.tensor([[list(COLORS).index(color) for color in pair] for pair in self.pairs])
            turns = torch.arange(len(values[name])) % len(colors)
            values["background"], values["background2"] = colors[turns].unbind(1)
        else:
            own = STYLES.index(self.style) if name == "style" else PATTERNS.index(self.pattern)
            values[name] = torch.full_like(values[name], own)
        scenes = Scenes(values, seed)
        shown = self.shown(scenes)
        others = torch.stack([seen for kind, seen in shown.items() if kind != name]).any(dim=0)
        visible = (values["color"] != values["background"]) & (values["color"] != values["background2"])
        return scenes.part((shown[name] & ~others & visible).nonzero().flatten()[:count], seed)


@dataclass(frozen=True)
class Family:
    """What sets the training of a family apart from that of the embedded one."""

    name: str
    stages: tuple[str, ...] = STAGE_ORDER
    """The stages of its own. All other parts are those of the embedded family."""
    joined_captions: bool = True
    """Whether its UNet is trained on one to three captions, joined as ``concat`` joins tokens, and on the zeros of the
    unconditional side. Without it, it is trained as Stable Diffusion is: one caption, or the empty one."""
    unseen: Concepts | None = None
    """Concepts that no scene shows in any stage."""

    def scenes(self, count: int, seed: int) -> Scenes:
        """Draw ``count`` scenes to train on."""
        if self.unseen is None:
            return sample_scenes(count, seed)
        drawn = sample_scenes(count * SPARE, seed)
        unseen = torch.stack([*self.unseen.shown(drawn).values()]).any(dim=0)
        return drawn.part((~unseen).nonzero().flatten()[:count], seed)


EMBEDDED_FAMILY = Family("embedded")
PLAIN_FAMILY = Family("plain", stages=("unet", "pack"), joined_captions=False)
HELD_OUT_FAMILY = Family(
    "held-out",
    stages=tuple(stage for stage in STAGE_ORDER if stage != "judge"),
    unseen=Concepts("mosaic", "wavy", (("purple", "yellow"), ("green", "pink"))),
)
FAMILIES = {family.name: family for family in (EMBEDDED_FAMILY, PLAIN_FAMILY, HELD_OUT_FAMILY)}
