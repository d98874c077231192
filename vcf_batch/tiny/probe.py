"""The probe: a small convolutional classifier of the world's attributes.

It recognises the attributes in generated pictures (for benchmarks and the model card). Its feature maps are the network
of the perceptual distance ``tiny-perceptual``.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vcf_batch.tiny.world import VALUES, Scenes

HEADS: Mapping[str, int] = {
    name: len(values) for name, values in VALUES.items() if name not in ("background2", "direction")
}
"""Number of values of each attribute that is read. ``background`` stands for both background colours together."""


class Probe(ModelMixin, ConfigMixin):
    """A classifier of the attributes of 64x64 pictures.

    Args:
        width: number of channels after the first block; the next two blocks double it.
    """

    @register_to_config
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width, 4 * width)
        self.blocks = nn.ModuleList(_block(*pair, stride=2) for pair in pairwise(channels))
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(channels[-1] * 16, 128), nn.SiLU(), nn.Linear(128, size))
                for name, size in HEADS.items()
            }
        )

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps after each block: 4 tensors ``[B, C, H/2^k, W/2^k]``.

        Args:
            pictures: ``[B, 3, H, W]`` in [-1, 1].
        """
        maps = []
        for block in self.blocks:
            pictures = block(pictures)
            maps.append(pictures)
        return maps

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits ``[B, number of values]`` by attribute.

        Args:
            pictures: ``[B, 3, 64, 64]`` in [-1, 1].
        """
        flat = self.features(pictures)[-1].flatten(1)
        return {name: head(flat) for name, head in self.heads.items()}


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def attribute_losses(logits: Mapping[str, Tensor], attributes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Training losses of an attribute classifier: attribute to loss ``[B]``, each of the order of 1."""
    losses = {}
    for name, values in logits.items():
        if name == "background":
            target = background_target(attributes).to(values.device)
            losses[name] = 4 * functional.binary_cross_entropy_with_logits(
                values.float(), target, reduction="none"
            ).mean(1)
        else:
            target = attributes[name].to(values.device)
            losses[name] = functional.cross_entropy(values.float(), target, reduction="none")
    return losses


def correct(logits: Mapping[str, Tensor], attributes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whether each picture shows the wanted attributes: attribute to bool ``[B]``.

    ``background`` is right if the most likely colours are exactly the scene's: one colour if the pattern is plain, else
    two in any order.
    """
    right = {name: values.argmax(1) == attributes[name] for name, values in logits.items() if name != "background"}
    wanted = background_target(attributes)
    ranked = logits["background"].argsort(dim=1, descending=True)
    best = torch.zeros_like(wanted).scatter_(1, ranked[:, :2], 1.0)
    single = wanted.sum(1) == 1
    best[single] = torch.zeros_like(wanted[single]).scatter_(1, ranked[single, :1], 1.0)
    return right | {"background": (best == wanted).all(1)}


@torch.no_grad()
def agreement(probe: Probe, pictures: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """Whether the probe sees the scenes' values in each picture: attribute to bool ``[B]``.

    Args:
        pictures: ``[B, 3, 64, 64]`` in [0, 1].
    """
    slices = [slice(start, start + 256) for start in range(0, len(pictures), 256)]
    parts = [correct(probe(pictures[part] * 2 - 1), scenes.part(part).attributes) for part in slices]
    return {name: torch.cat([part[name] for part in parts]) for name in HEADS}


def background_target(attributes: Mapping[str, Tensor]) -> Tensor:
    """Float ``[B, 12]``: 1 at the colours that the background shows."""
    target = torch.zeros(len(attributes["background"]), HEADS["background"])
    target.scatter_(1, attributes["background"][:, None], 1.0)
    patterned = attributes["pattern"] != VALUES["pattern"].index("plain")
    target[patterned] = target[patterned].scatter(1, attributes["background2"][patterned, None], 1.0)
    return target
