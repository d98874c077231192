"""How duplicates are searched, as the command line asks for it and as the definition of the score records it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from vcf_batch.commands.score.duplicates import near_hashes
from vcf_batch.errors import UsageError, redact
from vcf_batch.manifest.carried import is_string
from vcf_batch.output.scores.definition import ScoreColumn, ScoreDefinition

By = Literal["phash", "clip"]
BYS: tuple[By, ...] = get_args(By)

DISTANCE = 4
"""Bits that near-duplicates may differ in, unless another number is asked for."""

COSINE = 0.95
"""Least cosine of near-duplicates by a CLIP, unless another one is asked for."""

REFERENCE_PHASH = "reference_phash"
"""Column with the perceptual hash of a row's reference, which a manifest may carry."""

_DUPLICATE_OF = "Key of the first row that stays and whose image this one is a near-duplicate of; null if it stays."
_REFERENCE_DUPLICATE_OF = (
    "Key of the first row with the same reference; null for the first one, and without a reference."
)
_NEAR_REFERENCE_OF = (
    "Key of the first row that stays and whose reference this one's is a near-duplicate of; null if it stays, and "
    "without a reference."
)


def options_of(score: ScoreDefinition) -> str:
    """The options of ``vcf-batch score`` by which an output got a search."""
    by = score.fields["by"]
    name = "" if score.name == "duplicates" else f":{score.name}"
    clip = f"={score.models['model']}" if by == "clip" else ""
    limit = score.fields["cosine" if by == "clip" else "distance"]
    return f"--with duplicates{name}{clip} --by {by} --threshold {limit:g}"


@dataclass(frozen=True)
class Search:
    """How duplicates are searched.

    Args:
        name: name of the score.
        by: ``phash``, the column of that name, or ``clip``, embeddings by a CLIP.
        threshold: by ``phash`` the largest number of bits in which duplicates differ, 0 to
            :data:`vcf_batch.commands.score.duplicates.near_hashes.MAX_DISTANCE`; by ``clip`` their least cosine, above
            0 and at most 1. None is :data:`DISTANCE` or :data:`COSINE`.
        clip: the CLIP; empty by ``phash``, and for the default one.

    Raises:
        UsageError: there is no such way, the threshold is out of range, or a CLIP is given for hashes.
    """

    name: str
    by: str = "phash"
    threshold: float | None = None
    clip: str = ""

    def __post_init__(self) -> None:
        if self.by not in BYS:
            raise UsageError(f"--by {self.by} is none of {', '.join(BYS)}")
        if self.clip and self.by != "clip":
            raise UsageError(
                f"--with duplicates={redact(self.clip)} takes no model by hashes: leave it out, or add --by clip"
            )
        limit = self.limit
        if self.by == "clip" and not 0 < limit <= 1:
            raise UsageError(f"--threshold {limit:g} is no cosine of near-duplicates: give one above 0, at most 1")
        if self.by == "phash" and (limit != int(limit) or not 0 <= limit <= near_hashes.MAX_DISTANCE):
            raise UsageError(
                f"--threshold {limit:g} is no number of bits: give 0 to {near_hashes.MAX_DISTANCE} of the "
                f"{near_hashes.BITS} bits of a hash"
            )

    @property
    def limit(self) -> float:
        """The threshold, settled."""
        if self.threshold is not None:
            return self.threshold
        return COSINE if self.by == "clip" else DISTANCE

    def definition(
        self, columns: Mapping[str, pa.DataType], embedding: ScoreDefinition | None = None
    ) -> ScoreDefinition:
        """The definition of the score in an output.

        Args:
            columns: the columns of the output's parquets.
            embedding: the score with the embeddings that are compared; None by ``phash``.
        """
        fields: dict[str, Any] = {"kind": "duplicates", "by": self.by}
        if embedding:
            fields |= {"cosine": float(self.limit), "references": "clip", "models": embedding.fields["models"]}
            fields |= {"images_at_once": embedding.fields["images_at_once"]}
        else:
            by_phash = is_string(columns.get(REFERENCE_PHASH, pa.null()))
            fields |= {"distance": int(self.limit), "references": "phash" if by_phash else "sha256"}
        prefix = "" if self.name == "duplicates" else f"{self.name}_"
        of_references = _NEAR_REFERENCE_OF if embedding else _REFERENCE_DUPLICATE_OF
        own = (
            ScoreColumn(f"{prefix}duplicate_of", _DUPLICATE_OF, type="key"),
            ScoreColumn(f"{prefix}reference_duplicate_of", of_references, type="key"),
        )
        return ScoreDefinition(self.name, fields, embedding.models if embedding else {}, own)
