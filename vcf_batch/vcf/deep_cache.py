"""Reuse of the UNet's deep features over several steps: DeepCache (Ma et al. 2023, arXiv 2312.00858).

The output of a UNet's deep blocks changes little from one denoising step to the next. A step that reuses takes this
output from an earlier step. Only the first block down and the last block up, with the skip connections between them,
compute from the step's own latents. The cache replaces the calls of the blocks, so it works for any UNet of such
blocks.
"""

from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from torch import nn


class DeepCache:
    """Replacement for the deep blocks of a UNet inside a ``with`` block. Leaving the block restores the UNet.

    While gradients are enabled, every step computes all blocks, because kept features belong to another step's graph.

    Args:
        unet: the UNet of a single sampling, which calls it one step after the other.
        interval: every ``interval``-th step computes all blocks; the steps between reuse.
    """

    def __init__(self, unet: UNet2DConditionModel, interval: int) -> None:
        self._interval = interval
        self._reuses = False
        self._blocks: list[nn.Module] = []
        if interval > 1 and not torch.is_grad_enabled():
            middle = [] if unet.mid_block is None else [unet.mid_block]
            self._blocks = [*unet.down_blocks[1:], *middle, *unet.up_blocks[:-1]]

    def begin_step(self, number: int, is_new_batch: bool) -> None:
        """Decide whether the next call of the UNet computes or reuses the deep blocks.

        Args:
            number: number of the step, from 0.
            is_new_batch: whether the kept features have another batch size than this step.
        """
        self._reuses = number % self._interval > 0 and not is_new_batch

    def __enter__(self) -> Self:
        self._own = [vars(block).get("forward") for block in self._blocks]
        for block in self._blocks:
            block.forward = self._replacement(block)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for block, own in zip(self._blocks, self._own, strict=True):
            del block.forward
            if own is not None:
                block.forward = own

    def _replacement(self, block: nn.Module) -> Any:
        compute, given = block.forward, None

        def forward(*args: Any, **settings: Any) -> Any:
            nonlocal given
            if not self._reuses:
                given = compute(*args, **settings)
            return given

        return forward
