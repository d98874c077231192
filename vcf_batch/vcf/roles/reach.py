"""Reach: how much each reference of a sample weighs, by layer, step and place in the picture (docs/method.md, 8)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vcf_batch import images
from vcf_batch.vcf.roles.role import Layers, Role


@dataclass(frozen=True)
class Reach:
    """The references of one sample that have roles or masks.

    Weights count among the references of one role: a reference takes nothing from one with another role. Where masks
    of one role overlap, the references share the place by weight times mask; together they weigh as much there as the
    largest of their masks says.
    """

    roles: Sequence[Role]
    weights: Sequence[float]
    """Weight of each reference, above 0."""
    masks: Sequence[Image.Image | None]
    """Where each reference may act in the picture: a grey image of any size, white for yes; None for everywhere."""
    lengths: Sequence[int]
    """Number of tokens of each reference."""

    def acting(self, time: float) -> tuple[int, ...]:
        """Numbers of the references that act at ``time`` (t / 999)."""
        return tuple(number for number, role in enumerate(self.roles) if role.acts_at(time))

    def in_layers(self, layers: Layers, acting: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weights in the layers of one resolution, in a step in which the references ``acting`` act.

        Returns:
            float32 ``[Q, N]``, the weight of each token, and ``[Q, 1]``, that of all references together. Q is the
            number of queries, or 1 without masks.
        """
        masks = [torch.ones(1) if mask is None else on_grid(mask, layers) for mask in self.masks]
        length = max(map(len, masks))
        own = []
        for number, (role, mask) in enumerate(zip(self.roles, masks, strict=True)):
            own.append(mask.expand(length) * (role.weight(layers) if number in acting else 0.0))
        weights, totals = list[Tensor](), dict[str, Tensor]()
        for role, weight, act in zip(self.roles, self.weights, own, strict=True):
            beside = [number for number, each in enumerate(self.roles) if each.name == role.name]
            total = torch.stack([own[number] for number in beside]).amax(0)
            parts = torch.stack([own[number] * self.weights[number] for number in beside]).sum(0)
            weights.append((total * act * weight / parts).where(parts > 0, 0.0))
            totals[role.name] = total
        tokens = [weight[:, None].expand(-1, count) for weight, count in zip(weights, self.lengths, strict=True)]
        return torch.cat(tokens, dim=1), torch.stack([*totals.values()]).sum(0)[:, None]


def on_grid(mask: Image.Image, layers: Layers) -> Tensor:
    """A mask at the queries of layers of one resolution: float32 ``[Q]`` in [0, 1].

    The mask is squashed to the grid of the queries. Each query gets the mean brightness of the pixels behind it.
    """
    cells = np.asarray(mask.resize((layers.width, layers.height), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(cells / 255).flatten()


def mask_of(image: Image.Image) -> Image.Image:
    """A mask from an image of any size: its brightness (ITU-R 601). What is transparent is white.

    Raises:
        RowError: the image has 32-bit pixels, whose range is unknown.
    """
    return images.to_rgb(image).convert("L")


def logarithm(weights: Tensor) -> Tensor:
    """The bias of attention logits that weighs tokens; ``-inf`` for 0."""
    return weights.log().where(weights > 0, -math.inf)
