"""The batches of a shard: which rows are sampled together, and all that is known of them on their way."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vcf_batch import images, sharding
from vcf_batch.metrics.scorer import Targets
from vcf_batch.records import Objective, Reference, Row, Sample


def batch_key(row: Row, used: Mapping[str, Any]) -> tuple[int, int]:
    """Rows share a batch that have as many updates of prompt-noise optimisation and equally many conditioning tokens.

    Args:
        row: of a shard.
        used: its settings.
    """
    pictures = max(len(row.references), int(row.negative_reference is not None))
    return used["pno_steps"], pictures if used["fusion"] == "concat" else 0


def cut(rows: Sequence[Row], settings: Sequence[Mapping[str, Any]], batch_size: int) -> list["Batch"]:
    """The batches, in the order of their first rows, so that few finished samples wait for earlier ones to be written.

    Args:
        rows: of the shard.
        settings: of each row.
        batch_size: rows at most.
    """
    keys = [batch_key(row, used) for row, used in zip(rows, settings, strict=True)]
    return [
        Batch(number, positions, [rows[position].images for position in positions])
        for number, positions in enumerate(sorted(sharding.batches(keys, batch_size)))
    ]


@dataclass
class Batch:
    """Rows of a shard that are sampled together."""

    number: int
    positions: list[int]
    """Places of the rows in the shard, from 0."""
    references: list[tuple[Reference, ...]]
    """Of each row, its negative one included."""
    pictures: list[list[Image.Image]] = field(default_factory=list)
    """Of each row: its references, decoded, without the negative one."""
    errors: dict[int, str] = field(default_factory=dict)
    """Position to the reason why that row fails."""
    text_tokens: dict[str, Tensor] = field(default_factory=dict)
    """Of each prompt and negative prompt ``[T, Dt]``."""
    image_tokens: dict[Reference, Tensor] = field(default_factory=dict)
    """Of each reference, aligned, ``[N, Dt]``."""
    targets: Targets | None = None
    """What the images are scored against, once that is known."""
    attempt: int = 0
    """Of the images, counted from 0."""
    tries: dict[int, list[Sample]] = field(default_factory=dict)
    """Position of each row that is not settled, to what the attempts at it gave."""
    images: Tensor | None = None
    """float32 ``[B, 3, H, W]`` in [0, 1], once sampled; None if every row failed before."""
    twins: Tensor | None = None
    """What the prompts alone make of the same noise, likewise, in a run with triplets."""
    objectives: Sequence[Objective | None] = ()
    """Of each row, once sampled; None without prompt-noise optimisation."""

    def distinct_references(self) -> list[Reference]:
        return list(dict.fromkeys(reference for own in self.references for reference in own))


def neutral(rows: Sequence[Row], padding: Container[int], run_text: str) -> list[Row]:
    """The rows of a shard, those that are padding without their content.

    A text or a reference that only padding has is replaced: each distinct text by a blank, each distinct reference by a
    small plain picture, no two alike. Settings stay.

    Args:
        rows: of the shard.
        padding: positions in ``rows`` of those that are not generated.
        run_text: the run's own negative prompt, which no row brings along.
    """
    live = [row for position, row in enumerate(rows) if position not in padding]
    texts = {text: text for text in (run_text, *(text for row in live for text in _texts(row)))}
    blanks = (blank for count in itertools.count(1) if (blank := " " * count) not in texts)
    text_of = defaultdict(blanks.__next__, texts)
    references = {reference: reference for row in live for reference in row.images}
    reference_of = defaultdict(map(_plain_picture, itertools.count()).__next__, references)
    return [
        dataclasses.replace(
            row,
            prompt=text_of[row.prompt],
            references=tuple(reference_of[reference] for reference in row.references),
            negative_reference=row.negative_reference and reference_of[row.negative_reference],
            overrides={
                name: text_of[value] if name == "negative_prompt" else value for name, value in row.overrides.items()
            },
        )
        for row in rows
    ]


def _texts(row: Row) -> list[str]:
    return [row.prompt, *([row.overrides["negative_prompt"]] if "negative_prompt" in row.overrides else [])]


def _plain_picture(number: int) -> Reference:
    colour = (number % 256, number // 256 % 256, 64)
    return Reference(data=images.encode(np.full((64, 64, 3), colour, dtype=np.uint8), "png"))
