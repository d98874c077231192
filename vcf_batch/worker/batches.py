"""The batches of a shard: the rows that are sampled together, and their intermediate results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vcf_batch import sharding
from vcf_batch.config.limits import IP_ADAPTER
from vcf_batch.metrics.scorer import Targets
from vcf_batch.records import Lora, Objective, Reference, Row, Sample
from vcf_batch.vcf.base.family import EncodedText
from vcf_batch.vcf.lora.switch import Scaled
from vcf_batch.worker.shard_rows import ShardRows

Sight = tuple[bool, Reference]
"""A reference as an encoder sees it: the IP-Adapter's (True), or the aligner's."""


def batch_key(
    row: Row, used: Mapping[str, Any], windows: int, loras: tuple[Lora, ...] = ()
) -> tuple[int, int, int, int, int, tuple[Lora, ...]]:
    """Number of PNO updates, and of references whose tokens lengthen the conditioning, or have attention of their own;
    how these are limited: not at all (0), by roles (1), or by masks (2), which need a bias for each query; the number
    of windows that the texts are encoded in; and the LoRAs, which belong to all of a batch.

    Rows share a batch if all six are equal.

    Args:
        row: a row of a shard.
        used: its settings.
        windows, loras: see :class:`vcf_batch.worker.shard_rows.ShardRows`.
    """
    pictures = max(len(row.references), int(row.negative_reference is not None))
    lengthens, apart = (pictures if used["fusion"] == fusion else 0 for fusion in ("concat", IP_ADAPTER))
    limits = 2 if any(row.masks) else 1 if used["reference_roles"] else 0
    return used["pno_steps"], lengthens, apart, limits, windows, loras


def cut(rows: ShardRows, batch_size: int) -> list["Batch"]:
    """Batches of a shard, in the order of their first rows.

    The order keeps few finished samples waiting for earlier ones to be written.

    Args:
        rows: the rows of the shard, padding included.
        batch_size: largest number of rows of a batch.
    """
    keys = [batch_key(*each) for each in zip(rows.rows, rows.settings, rows.windows, rows.loras, strict=True)]
    return [
        Batch(
            number,
            positions,
            [rows.rows[position].images for position in positions],
            [rows.rows[position].encoded for position in positions],
        )
        for number, positions in enumerate(sorted(sharding.batches(keys, batch_size)))
    ]


class Pictures:
    """Sampled images as 8-bit pixels, on their way to the CPU. Sampling does not wait for their arrival.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1], NaN where a value is not finite.
    """

    def __init__(self, images: Tensor) -> None:
        finite = images.isfinite().flatten(1).all(1)
        # As images.from_unit does it; where the images are, because a quarter of the bytes is then copied.
        pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        self._finite, self._pixels = (tensor.to("cpu", non_blocking=True) for tensor in (finite, pixels))
        self._arrived = torch.cuda.Event() if images.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def wait(self) -> None:
        """Wait until the images are sampled and have arrived."""
        if self._arrived:
            self._arrived.synchronize()

    def arrived(self) -> tuple[list[bool], list[NDArray[np.uint8]]]:
        """Whether all values of each image are finite, and the images, uint8 ``[H, W, 3]`` each. Waits for them."""
        self.wait()
        return self._finite.tolist(), [*self._pixels.numpy()]


@dataclass
class Batch:
    """Rows of a shard that are sampled together. A *place* is a row's place in the batch, from 0."""

    number: int
    """Place among the batches of the shard, from 0."""
    positions: list[int]
    """Places of the rows in the shard, from 0."""
    references: list[tuple[Reference, ...]]
    """The images that each row names, see :attr:`vcf_batch.records.Row.images`."""
    encoded: list[tuple[Reference, ...]]
    """Those of them that an encoder sees."""
    pictures: list[list[Image.Image]] = field(default_factory=list)
    """The decoded references of each row, without the negative one."""
    masks: dict[int, list[Image.Image | None]] = field(default_factory=dict)
    """The decoded masks of each row that has some, by position."""
    errors: dict[int, str] = field(default_factory=dict)
    """Reasons of the rows that fail, by position."""
    loras: list[Scaled] = field(default_factory=list)
    """The LoRAs of all its rows."""
    texts: dict[str, EncodedText] = field(default_factory=dict)
    """Each prompt and negative prompt, encoded."""
    image_tokens: dict[Sight, Tensor] = field(default_factory=dict)
    """Tokens ``[N, Dt]`` of each reference, as the fusions of its rows take it."""
    targets: Targets | None = None
    """Targets that the images are scored against; None before the first draw is scored."""
    draw: int = 0
    """Number of the draw that ``images`` has or gets, from 0."""
    draws: dict[int, list[Sample]] = field(default_factory=dict)
    """Samples of the draws so far, by position, for each row that may get another draw."""
    images: Pictures | None = None
    """The images of the draw; None before sampling, or if every row failed."""
    twins: Pictures | None = None
    """Images of the prompts alone from the same noise; only in a run with triplets."""
    objectives: Sequence[Objective | None] = ()
    """The course of prompt-noise optimisation of each row, once sampled; None for a row without it."""

    def distinct_references(self) -> list[Reference]:
        """Each reference of the batch once, in the order of the rows."""
        return list(dict.fromkeys(reference for own in self.references for reference in own))

    def sights(self, settings: Sequence[Mapping[str, Any]]) -> list[Sight]:
        """Each reference of the batch once for each encoder that its rows need, in the order of the rows.

        Args:
            settings: the settings of all rows of the shard.
        """
        adapted = [settings[position]["fusion"] == IP_ADAPTER for position in self.positions]
        pairs = zip(adapted, self.encoded, strict=True)
        return list(dict.fromkeys((own, reference) for own, references in pairs for reference in references))
