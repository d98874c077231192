"""How duplicates are searched, as the command line asks for it and as the definition of the score records it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import pyarrow as pa
from pyarrow.types import is_string as is_text

from vcf_batch.commands.score.duplicates import near_hashes
from vcf_batch.errors import UsageError
from vcf_batch.output.scores.definition import ScoreColumn, ScoreDefinition

By = Literal["phash"]
BYS: tuple[By, ...] = get_args(By)

DISTANCE = 4
"""Bits that near-duplicates may differ in, unless another number is asked for."""

REFERENCE_PHASH = "reference_phash"
"""Column with the perceptual hash of a row's reference, which a manifest may carry."""

_DUPLICATE_OF = "Key of the first row that stays and whose image this one is a near-duplicate of; null if it stays."
_REFERENCE_DUPLICATE_OF = (
    "Key of the first row with the same reference; null for the first one, and without a reference."
)


@dataclass(frozen=True)
class Search:
    """How duplicates are searched.

    Args:
        name: name of the score.
        by: ``phash``, the column of that name.
        distance: largest number of bits in which duplicates differ, 0 to
            :data:`vcf_batch.commands.score.duplicates.near_hashes.MAX_DISTANCE`.

    Raises:
        UsageError: there is no such way, or the distance is out of range.
    """

    name: str
    by: str = "phash"
    distance: float = DISTANCE

    def __post_init__(self) -> None:
        if self.by not in BYS:
            raise UsageError(f"--by {self.by} is none of {', '.join(BYS)}")
        if self.distance != int(self.distance) or not 0 <= self.distance <= near_hashes.MAX_DISTANCE:
            raise UsageError(
                f"--threshold {self.distance:g} is no number of bits: give 0 to {near_hashes.MAX_DISTANCE} of the "
                f"{near_hashes.BITS} bits of a hash"
            )

    def definition(self, columns: Mapping[str, pa.DataType]) -> ScoreDefinition:
        """The definition of the score in an output with these columns."""
        fields = {
            "kind": "duplicates",
            "by": self.by,
            "distance": int(self.distance),
            "references": "phash" if is_text(columns.get(REFERENCE_PHASH, pa.null())) else "sha256",
        }
        prefix = "" if self.name == "duplicates" else f"{self.name}_"
        own = (
            ScoreColumn(f"{prefix}duplicate_of", _DUPLICATE_OF, type="key"),
            ScoreColumn(f"{prefix}reference_duplicate_of", _REFERENCE_DUPLICATE_OF, type="key"),
        )
        return ScoreDefinition(self.name, fields, {}, own)
