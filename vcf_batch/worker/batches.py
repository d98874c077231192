"""The batches of a shard: the rows that are sampled together, and their intermediate results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from vcf_batch import sharding
from vcf_batch.metrics.scorer import Targets
from vcf_batch.records import Objective, Reference, Row, Sample
from vcf_batch.worker.shard_rows import ShardRows


def batch_key(row: Row, used: Mapping[str, Any]) -> tuple[int, int]:
    """Number of PNO updates, and of references among the conditioning tokens: rows share a batch if both are equal.

    Args:
        row: a row of a shard.
        used: its settings.
    """
    pictures = max(len(row.references), int(row.negative_reference is not None))
    return used["pno_steps"], pictures if used["fusion"] == "concat" else 0


def cut(rows: ShardRows, batch_size: int) -> list["Batch"]:
    """Batches of a shard, in the order of their first rows.

    The order keeps few finished samples waiting for earlier ones to be written.

    Args:
        rows: the rows of the shard, padding included.
        batch_size: largest number of rows of a batch.
    """
    keys = [batch_key(row, used) for row, used in zip(rows.rows, rows.settings, strict=True)]
    return [
        Batch(number, positions, [rows.rows[position].images for position in positions])
        for number, positions in enumerate(sorted(sharding.batches(keys, batch_size)))
    ]


@dataclass
class Batch:
    """Rows of a shard that are sampled together. A *place* is a row's place in the batch, from 0."""

    number: int
    """Place among the batches of the shard, from 0."""
    positions: list[int]
    """Places of the rows in the shard, from 0."""
    references: list[tuple[Reference, ...]]
    """The references of each row, its negative one last."""
    pictures: list[list[Image.Image]] = field(default_factory=list)
    """The decoded references of each row, without the negative one."""
    errors: dict[int, str] = field(default_factory=dict)
    """Reasons of the rows that fail, by position."""
    text_tokens: dict[str, Tensor] = field(default_factory=dict)
    """Tokens ``[T, Dt]`` of each prompt and negative prompt."""
    image_tokens: dict[Reference, Tensor] = field(default_factory=dict)
    """Aligned tokens ``[N, Dt]`` of each reference."""
    targets: Targets | None = None
    """Targets that the images are scored against; None before the first draw is scored."""
    draw: int = 0
    """Number of the draw that ``images`` has or gets, from 0."""
    draws: dict[int, list[Sample]] = field(default_factory=dict)
    """Samples of the draws so far, by position, for each row that may get another draw."""
    images: Tensor | None = None
    """The images of the draw, float32 ``[B, 3, H, W]`` in [0, 1]; None before sampling, or if every row failed."""
    twins: Tensor | None = None
    """Images of the prompts alone from the same noise, shaped like ``images``; only in a run with triplets."""
    objectives: Sequence[Objective | None] = ()
    """The course of prompt-noise optimisation of each row, once sampled; None for a row without it."""

    def distinct_references(self) -> list[Reference]:
        """Each reference of the batch once, in the order of the rows."""
        return list(dict.fromkeys(reference for own in self.references for reference in own))
