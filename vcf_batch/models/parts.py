"""The choice of a Stable Diffusion and of its aligner's image encoder. Nothing is loaded, so torch is not needed."""

from dataclasses import dataclass

from vcf_batch import storage
from vcf_batch.errors import ModelError
from vcf_batch.models import resolution
from vcf_batch.models.names import PRESETS
from vcf_batch.models.resolution import ResolvedModel

MODEL_INDEX = "model_index.json"
REFERENCE_PARTS = ("aligner", "image_encoder", "feature_extractor")
"""Parts that a model needs for references, besides Stable Diffusion's own parts."""


@dataclass(frozen=True)
class Parts:
    """A Stable Diffusion and the image encoder of its aligner, each in exactly one version. Picklable."""

    base: ResolvedModel
    image_encoder: ResolvedModel | None
    """The image encoder; None is the base's own."""

    @classmethod
    def resolve(
        cls,
        base: str,
        revision: str | None = None,
        image_encoder: str | None = None,
        image_encoder_revision: str | None = None,
    ) -> "Parts":
        """Find the exact version of each model.

        Args:
            base: a name of :data:`vcf_batch.models.names.PRESETS`, or any name that
                :func:`vcf_batch.models.resolution.resolve` takes.
            revision: branch, tag or commit of a base on the Hub.
            image_encoder: a CLIP, or its vision tower alone. None is the image encoder of the preset, or without a
                preset the base's own.
            image_encoder_revision: branch, tag or commit of an image encoder on the Hub.

        Raises:
            ModelError: a model cannot be found, or there is no image encoder.
            StorageError: the storage failed.
        """
        name = base
        if base in PRESETS and not storage.exists(storage.absolute(base)):
            image_encoder = image_encoder or PRESETS[base].image_encoder
            base = PRESETS[base].base
        found = resolution.resolve(base, revision)
        index = resolution.read_config(found, MODEL_INDEX)
        if index is None:
            raise ModelError(f"{base} is not a Stable Diffusion model in diffusers layout: it has no {MODEL_INDEX}")
        if image_encoder is not None:
            return cls(found, resolution.resolve(image_encoder, image_encoder_revision))
        if image_encoder_revision is not None:
            raise ModelError(
                f"the image encoder's revision is {image_encoder_revision!r}, but no image encoder is named; "
                "name it with --image-encoder"
            )
        # model_index.json gives the library and the class of each part, or two nulls.
        if not any(index.get("image_encoder") or ()):
            raise ModelError(
                f"{name} has no image encoder of its own: name the CLIP whose vision tower the aligner "
                f"reads with --image-encoder, such as {PRESETS['sd21'].image_encoder} for Stable Diffusion 2 or "
                f"{PRESETS['sd15'].image_encoder} for 1.x"
            )
        return cls(found, None)
