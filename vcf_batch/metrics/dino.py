"""Cosines of patches by DINOv2 (Oquab et al. 2023, arXiv 2304.07193): of a picture with its reference and its twin."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Model

from vcf_batch import images
from vcf_batch.errors import ModelError
from vcf_batch.metrics.scorer import stacked
from vcf_batch.metrics.shown import DINO_PARTS, Part, Seen, Shown, over_references, owners
from vcf_batch.models.loading import load_errors, refuse_missing_weights
from vcf_batch.models.model_files import lone_variant

_CHUNK = 64
_EPS = 1e-5


class DinoPatches:
    """Scorer by the patch tokens of a DINOv2, behind its last norm.

    ``to_reference`` is the mean, over the patches, of the cosine of the tokens at the same place. For ``to_twin``, each
    channel is first normalised over the patches of its picture: its mean and deviation carry the style (AdaIN, Huang
    and Belongie 2017), and what is left tells where things are.

    Args:
        model: the DINOv2, on its device.
        processor: its preprocessing by ``preprocessor_config.json``, in Pillow.
    """

    parts: Mapping[str, Part] = DINO_PARTS

    def __init__(self, model: Dinov2Model, processor: BitImageProcessorPil) -> None:
        self._model = model.eval().requires_grad_(False)
        self._processor = processor

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu") -> "DinoPatches":
        """Load model and preprocessing.

        Args:
            path: folder of a DINOv2 in transformers' layout, such as ``facebook/dinov2-base`` has it.
            device: device for the model; the model always runs in float32.

        Raises:
            ModelError: a part is missing or does not fit.
            StorageError: the disk failed.
        """
        remedy = ". It must hold a DINOv2 and preprocessor_config.json in transformers' layout"
        with load_errors(f"the DINOv2 {path!r}", remedy):
            model, report = Dinov2Model.from_pretrained(
                path, dtype=torch.float32, variant=lone_variant(path), output_loading_info=True
            )
            processor = BitImageProcessorPil.from_pretrained(path)
        refuse_missing_weights(report, f"the DINOv2 {path!r}", "name a complete DINOv2, such as facebook/dinov2-base")
        if model.config.model_type != "dinov2":
            raise ModelError(f"{path!r} is a {model.config.model_type}; name a DINOv2, such as facebook/dinov2-base")
        if processor.do_resize and processor.size.shortest_edge and not processor.do_center_crop:
            raise ModelError(
                f"the DINOv2 {path!r} resizes without a crop, so its images would differ in size; set do_center_crop "
                "or a fixed height and width in its preprocessor_config.json"
            )
        return cls(model.to(device), processor)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """What the model sees of a picture, ``[3, h, w]``."""
        return self._pixels([Image.fromarray(picture)])[0]

    def score(
        self, shown: Sequence[Shown], prepared: Sequence[Tensor], seen: Seen
    ) -> Mapping[str, Sequence[float | None]]:
        """See :class:`vcf_batch.metrics.shown.ImageScorer`."""
        patches = self._patches(stacked(prepared))
        references = stacked(seen.references(self, shown, self._embed))
        own = owners(shown)
        to_reference = F.cosine_similarity(patches[own], references, dim=-1).mean(dim=1) if own else references
        found: dict[str, Sequence[float | None]] = {"to_reference": over_references(shown, to_reference)}
        twins = {number: each.twin for number, each in enumerate(shown) if each.twin is not None}
        values: dict[int, float] = {}
        if twins:
            other = self._embed([Image.fromarray(twin) for twin in twins.values()])
            alike = F.cosine_similarity(_without_style(patches[[*twins]]), _without_style(other), dim=-1).mean(dim=1)
            values = dict(zip(twins, alike.tolist(), strict=True))
        found["to_twin"] = [values.get(number) for number in range(len(shown))]
        return found

    def _embed(self, pictures: list[Image.Image]) -> Tensor:
        chunks = (pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK))
        return torch.cat([self._patches(self._pixels(chunk)) for chunk in chunks])

    def _pixels(self, pictures: list[Image.Image]) -> Tensor:
        if self._processor.do_center_crop:
            pictures = [*map(images.trimmed, pictures)]
        pixels = self._processor(pictures, return_tensors="pt")["pixel_values"]
        assert isinstance(pixels, Tensor)
        return pixels

    @torch.inference_mode()
    def _patches(self, pixels: Tensor) -> Tensor:
        """Tokens of the patches ``[B, P, D]``, without the class token."""
        tokens = self._model(pixel_values=pixels.to(self._model.device)).last_hidden_state
        assert isinstance(tokens, Tensor)
        return tokens[:, 1:]


def _without_style(patches: Tensor) -> Tensor:
    """Patches ``[B, P, D]``, each channel with mean 0 and deviation 1 over its picture."""
    deviation, mean = torch.std_mean(patches, dim=1, correction=0, keepdim=True)
    return (patches - mean) / (deviation + _EPS)
