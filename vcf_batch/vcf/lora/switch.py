"""The switch of a model from one set of LoRAs to another: merged weights in the place of the base's, and back.

The base's own weights are kept, and every merge starts from them, in float32. So weights depend on the LoRAs alone and
not on those before, and without a LoRA they are the base's bit for bit. The forward pass is that of the base: it takes
no longer, and compiled networks and recorded calls stay valid, because weights change in their place.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vcf_batch.vcf.lora.weights import LoraWeights, Update

Scaled = tuple[LoraWeights, float]
"""A LoRA and the scale that its updates are multiplied by."""


class LoraSwitch:
    """Switch between the LoRAs of one model.

    Args:
        layers: the model's layers, see :func:`vcf_batch.vcf.lora.weights.layers_of`.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._base: dict[str, Tensor] = {}
        """A copy of the base's weight of each layer that a LoRA has updated so far, on the layer's device."""
        self._merged: set[str] = set()
        """Layers whose weights may differ from the base's."""
        self._used: tuple[tuple[str, float], ...] | None = ()
        """Hash and scale of each LoRA that the model has now; None while it is switched."""

    @torch.no_grad()
    def use(self, loras: Sequence[Scaled]) -> bool:
        """Give the model exactly these LoRAs, merged in this order. None gives it the base's weights.

        Returns:
            Whether anything had to be done.
        """
        wanted = tuple((lora.sha256, scale) for lora, scale in loras if scale)
        if wanted == self._used:
            return False
        self._used = None
        updates: dict[str, list[tuple[Update, float]]] = {}
        for lora, scale in loras:
            for update in lora.updates if scale else ():
                updates.setdefault(update.layer, []).append((update, scale))
        for name in self._merged - updates.keys():
            self._weight(name).copy_(self._base[name])
        for name, own in updates.items():
            self._merged.add(name)
            weight = self._weight(name)
            if name not in self._base:
                self._base[name] = weight.clone()
            weight.copy_(_merged(self._base[name], own))
        self._merged = {*updates}
        self._used = wanted
        return True

    def _weight(self, name: str) -> Tensor:
        weight = self._layers[name].weight
        assert isinstance(weight, Tensor)
        return weight


def _merged(base: Tensor, updates: Sequence[tuple[Update, float]]) -> Tensor:
    """A weight with the updates of LoRAs, float32."""
    merged = base.float()
    for update, scale in updates:
        up, down = (each.to(base.device, torch.float32) for each in (update.up, update.down))
        merged = torch.add(merged, (up @ down).view(base.shape), alpha=scale)
    return merged
