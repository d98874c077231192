"""A score that is asked for, with its models in exactly one version, and its scorer on this node."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from vcf_batch.metrics.aesthetic import AestheticHead
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.metrics.clip_scorers import ClipCosines, ClipEmbeddings
from vcf_batch.metrics.dino import DinoPatches
from vcf_batch.metrics.lpips import LPIPS
from vcf_batch.metrics.own_function import OwnFunction
from vcf_batch.metrics.pixelwise import Pixelwise
from vcf_batch.metrics.shown import ImageScorer, Part
from vcf_batch.models.cache import fetch
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output.scores.definition import Against, ScoreColumn, ScoreDefinition

ScoreKind = Literal["clip", "dino", "lpips-alex", "lpips-vgg", "aesthetic", "texture", "python", "embedding"]

IMAGES_AT_ONCE = 32
"""Images of one forward pass. It is part of a score's settings, as it changes the last bits of a value."""


@dataclass(frozen=True)
class ResolvedScore:
    """A score that is asked for. Picklable, so that every node can load its scorer."""

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

    def load(self, device: str) -> ImageScorer:
        """Fetch the models and load the scorer.

        Args:
            device: ``cuda`` or ``cpu``.

        Raises:
            ModelError: a model is not there, unsafe, incomplete, or of another kind.
            UsageError: the function cannot be imported.
            StorageError: storage or network failed.
        """
        if self.kind == "texture":
            return Pixelwise.texture(device)
        if self.kind == "python":
            return OwnFunction.load(self.place, self.folder)
        if self.kind in ("lpips-alex", "lpips-vgg"):
            return Pixelwise.lpips(LPIPS.from_pretrained(self.kind.removeprefix("lpips-"), self.place, device))
        if self.kind == "dino":
            return DinoPatches.from_pretrained(fetch(self.models["model"]), device)
        if self.kind == "aesthetic":
            clip = ClipJudge.from_pretrained(fetch(self.models["clip"]), device, "--aesthetic-clip")
            return AestheticHead.from_file(fetch(self.models["head"]), clip)
        if self.kind == "embedding":
            return ClipEmbeddings(ClipJudge.from_pretrained(fetch(self.models["model"]), device, "--with duplicates="))
        return ClipCosines(ClipJudge.from_pretrained(fetch(self.models["model"]), device, "--with clip="))


PARTS: Mapping[ScoreKind, Mapping[str, Part]] = {
    "clip": ClipCosines.parts,
    "dino": DinoPatches.parts,
    "lpips-alex": Pixelwise.LPIPS_PARTS,
    "lpips-vgg": Pixelwise.LPIPS_PARTS,
    "aesthetic": AestheticHead.parts,
    "texture": Pixelwise.TEXTURE_PARTS,
    "embedding": ClipEmbeddings.parts,
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
