"""Deep features of the UNet, used for several steps: DeepCache (Ma et al. 2023, arXiv 2312.00858).

From one denoising step to the next the deep blocks of a UNet change little of what they give. In steps that reuse,
they give the same again; only the first block down and the last one up, with the skip connections between them, see the
step's own latents. This works on the calls of the blocks, so that it holds for any UNet made of such blocks.
"""

from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from torch import nn


class DeepCache:
    """Stands in for the deep blocks of a UNet; use it with ``with``, which leaves the UNet as it was.

    Where gradients flow, every step computes all blocks: what is kept would be of another step's graph.

    Args:
        unet: of one sampling, one step after the other.
        interval: one step in so many computes all blocks.
    """

    def __init__(self, unet: UNet2DConditionModel, interval: int) -> None:
        self._interval = interval
        self._reuses = False
        self._blocks: list[nn.Module] = []
        if interval > 1 and not torch.is_grad_enabled():
            middle = [] if unet.mid_block is None else [unet.mid_block]
            self._blocks = [*unet.down_blocks[1:], *middle, *unet.up_blocks[:-1]]

    def begin_step(self, number: int, is_new_batch: bool) -> None:
        """Decide what the next call of the UNet computes.

        Args:
            number: of the step, from 0.
            is_new_batch: what is kept has another batch size than the step.
        """
        self._reuses = number % self._interval > 0 and not is_new_batch

    def __enter__(self) -> Self:
        self._own = [vars(block).get("forward") for block in self._blocks]
        for block in self._blocks:
            block.forward = self._standing_in_for(block)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for block, own in zip(self._blocks, self._own, strict=True):
            del block.forward
            if own is not None:
                block.forward = own

    def _standing_in_for(self, block: nn.Module) -> Any:
        compute, given = block.forward, None

        def forward(*args: Any, **settings: Any) -> Any:
            nonlocal given
            if not self._reuses:
                given = compute(*args, **settings)
            return given

        return forward
