"""A score that is asked for, with its models in exactly one version. No torch, as the driver only hands it on."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from vcf_batch.metrics.shown import (
    AESTHETIC_PARTS,
    CLIP_PARTS,
    DINO_PARTS,
    EMBEDDING_PARTS,
    LPIPS_PARTS,
    TEXTURE_PARTS,
    Part,
)
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output.scores.definition import Against, ScoreColumn, ScoreDefinition

ScoreKind = Literal["clip", "dino", "lpips-alex", "lpips-vgg", "aesthetic", "texture", "python", "embedding"]

IMAGES_AT_ONCE = 32
"""Images of one forward pass. It is part of a score's settings, as it changes the last bits of a value."""


@dataclass(frozen=True)
class ResolvedScore:
    """A score that is asked for. Picklable, so that every node can load its scorer, see
    :func:`vcf_batch.worker.scoring.scorers.load`."""

    definition: ScoreDefinition
    kind: ScoreKind
    models: Mapping[str, ResolvedModel] = field(default_factory=dict)
    """Models by their part in the score: ``model``, or ``head`` and ``clip``."""
    place: str = ""
    """Folder or URL of the weights of ``lpips-...``; ``module:function`` of ``python``."""
    folder: str = ""
    """Folder in which modules of ``python`` are looked for first."""

    @property
    def name(self) -> str:
        return self.definition.name


PARTS: Mapping[ScoreKind, Mapping[str, Part]] = {
    "clip": CLIP_PARTS,
    "dino": DINO_PARTS,
    "lpips-alex": LPIPS_PARTS,
    "lpips-vgg": LPIPS_PARTS,
    "aesthetic": AESTHETIC_PARTS,
    "texture": TEXTURE_PARTS,
    "embedding": EMBEDDING_PARTS,
    "python": {},
}
"""What the scorer of each kind gives; that of ``python`` tells it when it has scored."""


def column_name(score: str, part: str) -> str:
    """The column of a part of a score: a part without a name, or with that of the score, has the score's name."""
    return score if part in ("", score) else f"{score}_{part}"


def with_columns(definition: ScoreDefinition, parts: Mapping[str, Part]) -> ScoreDefinition:
    """The definition with a column for each part."""
    columns = [
        ScoreColumn(
            column_name(definition.name, name),
            part.meaning,
            part.higher_is_better,
            cast(Against | None, part.against),
            "vector" if part.is_vector else "number",
        )
        for name, part in parts.items()
    ]
    return dataclasses.replace(definition, columns=tuple(columns))
