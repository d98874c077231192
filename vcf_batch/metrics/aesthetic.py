"""Aesthetic score by a linear head on the embedding of a CLIP, such as LAION's predictors on ViT-L/14."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from vcf_batch import storage
from vcf_batch.errors import ModelError
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.metrics.scorer import stacked
from vcf_batch.metrics.shown import AESTHETIC_PARTS, Part, Seen, Shown
from vcf_batch.models.loading import load_errors

LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
"""The layers of ``sac+logos+ava1-l14-linearMSE.pth``. No activation stands between them, so they are one affine map."""


class AestheticHead:
    """Scorer by a linear head on the L2-normalised embedding of the picture.

    Args:
        clip: the CLIP that the head was trained on.
        weight: ``[D]``, float64.
        bias: a number.
    """

    parts: Mapping[str, Part] = AESTHETIC_PARTS

    def __init__(self, clip: ClipJudge, weight: Tensor, bias: float) -> None:
        self._clip, self._weight, self._bias = clip, weight.double().cpu(), bias

    @classmethod
    def from_file(cls, path: str, clip: ClipJudge) -> "AestheticHead":
        """Load a head.

        Args:
            path: a local ``.safetensors``, or a ``.pth`` or ``.bin`` of tensors: the layers :data:`LAYERS`, or one
                linear layer ``weight`` and ``bias``.
            clip: the CLIP that it was trained on.

        Raises:
            ModelError: it is of another layout, would run code, or does not fit the CLIP.
            StorageError: the disk failed.
        """
        what = f"the aesthetic head {path!r}"
        with load_errors(what):
            data = storage.read_bytes(path)
            if path.endswith(".safetensors"):
                tensors = safetensors.torch.load(data)
            else:
                tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            weight, bias = _affine(tensors)
        width = clip.model.config.projection_dim
        if weight.shape != (width,):
            raise ModelError(
                f"{what} takes {weight.shape[0]} numbers, and the embedding of its CLIP has {width}: name the CLIP "
                "that it was trained on with --aesthetic-clip"
            )
        return cls(clip, weight, bias)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """What the CLIP sees of a picture, ``[3, h, w]``."""
        return self._clip.pixels([picture])[0]

    def score(
        self, shown: Sequence[Shown], prepared: Sequence[Tensor], seen: Seen
    ) -> Mapping[str, Sequence[float | None]]:
        """See :class:`vcf_batch.metrics.shown.ImageScorer`."""
        embeddings = self._clip.embed_pixels(stacked(prepared)).double().cpu()
        return {"": (embeddings @ self._weight + self._bias).tolist()}


def _affine(tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """The layers of a head as one map, in float64: weight ``[D]`` and bias.

    Raises:
        ValueError: the layers are others.
    """
    layers = [""] if {*tensors} == {"weight", "bias"} else [f"{layer}." for layer in LAYERS]
    wanted = {f"{layer}{name}" for layer in layers for name in ("weight", "bias")}
    if {*tensors} != wanted:
        raise ValueError(
            f"it has {', '.join(sorted(tensors)[:4])}, ...; a linear head has weight and bias, or the layers "
            f"{', '.join(LAYERS)} without activations between them"
        )
    weight, bias = None, torch.zeros(1, dtype=torch.float64)
    for layer in layers:
        own, shift = tensors[f"{layer}weight"].double(), tensors[f"{layer}bias"].double()
        weight, bias = (own, shift) if weight is None else (own @ weight, own @ bias + shift)
    assert weight is not None
    if weight.ndim != 2 or weight.shape[0] != 1 or bias.shape != (1,):
        raise ValueError(f"its layers end in {[*weight.shape]}; a head ends in one number")
    return weight[0], float(bias)
