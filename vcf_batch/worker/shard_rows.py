"""The rows of a shard in a worker, with padding in the place of rows that are not generated."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vcf_batch import images
from vcf_batch.config.row_settings import loras_of, settings_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.records import Lora, Reference, Row, Sample


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard, in order, with settings and known samples. A *position* is a row's place here, from 0."""

    rows: Sequence[Row]
    """Rows in order. Padding is without its content, see :func:`neutral`."""
    settings: Sequence[Mapping[str, Any]]
    """The settings of each row, see :func:`vcf_batch.config.row_settings.settings_of`."""
    known: Mapping[int, Sample]
    """Samples that exist already, by the number of their row."""
    padding: frozenset[int]
    """Positions of the rows with a known sample: they are not generated, and keep their slot in their batch."""
    windows: Sequence[int]
    """Number of windows that the texts of each row are encoded in; that of padding is its content's."""
    loras: Sequence[tuple[Lora, ...]]
    """The LoRAs of each row, see :func:`vcf_batch.config.row_settings.loras_of`."""

    @classmethod
    def of(
        cls, rows: Sequence[Row], known: Mapping[int, Sample], config: RunConfig, windows: Sequence[int]
    ) -> "ShardRows":
        """Make padding of the rows that have a sample, and look up the settings of all rows.

        Args:
            rows: the rows of the shard, in the order of the manifest.
            known: samples by the number of their row, in any order; see :attr:`known`.
            config: the run, with every default settled.
            windows: see :attr:`windows`.
        """
        padding = frozenset(position for position, row in enumerate(rows) if row.number in known)
        kept = neutral(rows, padding, config.negative_prompt)
        settings, loras = [settings_of(row, config) for row in kept], [loras_of(row, config) for row in kept]
        return cls(kept, settings, known, padding, windows, loras)

    def texts(self, position: int) -> tuple[str, ...]:
        """The texts that a row needs: prompt, negative prompt, and the empty one that fills the shorter of both up."""
        both = self.rows[position].prompt, self.settings[position]["negative_prompt"]
        return both if self.windows[position] == 1 else (*both, "")

    def known_sample(self, position: int) -> Sample:
        """The sample of a row that is padding. Ask for each once, in order: some are read only then.

        Raises:
            StorageError: a kept sample cannot be read.
        """
        return self.known[self.rows[position].number]


def neutral(rows: Sequence[Row], padding: Container[int], run_text: str) -> list[Row]:
    """The rows of a shard, with padding stripped of its content.

    A text or a reference that only padding has is replaced: each distinct text by a blank, each distinct reference by a
    small plain picture, no two alike. Settings stay.

    Args:
        rows: the rows of the shard.
        padding: positions in ``rows`` of those that are not generated.
        run_text: the negative prompt of the run, which rows without one of their own use.
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
            masks=tuple(mask and reference_of[mask] for mask in row.masks),
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
