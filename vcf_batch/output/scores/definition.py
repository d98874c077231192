"""``_scores/NAME.json``: what a score is, by which models and settings, and its columns."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vcf_batch.config.fingerprint import fingerprint

SCORES_FOLDER = "_scores"
CALIBRATION_NAME = "calibration.json"
"""Name of the file in :data:`SCORES_FOLDER` with the thresholds that a calibration has found."""

SCORE_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
"""A name of a score: a column of SQL without quotes, and a folder anywhere."""

SCORE_LAYOUT = 1

ColumnType = Literal["number", "key", "vector"]
"""What a column of a score holds: numbers, keys of other rows, or half-precision numbers, little-endian, as bytes."""

Against = Literal["prompt", "reference", "twin"]
"""What a picture is compared with: its prompt, its references, or its text-only twin, the ``content`` of a triplet."""


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """A column of a score."""

    name: str
    """Name in the parquets: that of the score, or that and a part of it."""
    meaning: str
    """One sentence for people."""
    higher_is_better: bool | None = None
    """None where nobody knows."""
    against: Against | None = None
    """What the picture is compared with; None for a score of the picture alone, which has no calibration."""
    type: ColumnType = "number"


@dataclass(frozen=True)
class ScoreDefinition:
    """What a score is. Two definitions with the same :attr:`fingerprint` give the same values on a device type."""

    name: str
    fields: Mapping[str, Any]
    """What decides on the values, as plain JSON types: the kind, the identities of its models, its settings."""
    models: Mapping[str, str]
    """Names of the models, for people, without secrets."""
    columns: Sequence[ScoreColumn] = ()
    """Empty as long as nothing is scored by a function, which names them itself."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of :attr:`fields`."""
        return fingerprint(self.fields)

    @property
    def is_search(self) -> bool:
        """Whether rows are compared with those of all shards. Its values are stale once any shard has changed."""
        return any(column.type == "key" for column in self.columns)

    @property
    def is_embedding(self) -> bool:
        """Whether its values are for searches alone, so that nobody sees them as columns of the output."""
        return any(column.type == "vector" for column in self.columns)

    def to_json(self) -> bytes:
        """The definition as indented UTF-8 JSON."""
        document = {**asdict(self), "fingerprint": self.fingerprint, "layout": SCORE_LAYOUT}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ScoreDefinition":
        """Read back :meth:`to_json`.

        Raises:
            ValueError: the bytes are not a definition, or its fingerprint is not that of its fields.
        """
        try:
            there = json.loads(data)
            said, layout = there.pop("fingerprint"), there.pop("layout")
            there["columns"] = tuple(ScoreColumn(**column) for column in there["columns"])
            found = cls(**there)
            names = [found.name, *(column.name for column in found.columns)]
            if said != found.fingerprint or layout != SCORE_LAYOUT or not all(map(SCORE_NAME.fullmatch, names)):
                raise ValueError(f"its layout is {layout!r}, or its fingerprint is not that of its fields")
            return found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the definition of a score: {error}") from error
