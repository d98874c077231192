"""Rows that are not generated keep their place in their batch, as padding without content of their own.

What a sample is computed together with shows in its last bits. So padding brings along exactly as many texts and
references as the rows it stands for, and every other row of the shard gets the same bytes, whoever is left out.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Container, Sequence

import numpy as np

from vcf_batch import images
from vcf_batch.records import Reference, Row


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
