"""The image aligner, its input, and its training losses (docs/method.md, sections 1 to 3)."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil, CLIPVisionModelWithProjection
from transformers.utils import logging

from vcf_batch.config.limits import IMAGE_TOKENS
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models.loading import refuse_missing_weights
from vcf_batch.models.model_files import lone_variant
from vcf_batch.vcf.roles import projections
from vcf_batch.vcf.roles.projections import Projection
from vcf_batch.vcf.roles.role import ROLE_FILE

INFO_NCE_TEMPERATURE = 0.07
INFO_NCE_WEIGHT = 0.2

ENCODE_BATCH = 32
"""Most texts or images of one forward pass of an encoder."""


@dataclass
class AlignerOutput(BaseOutput):
    """What :meth:`ImageAligner.forward` returns with ``return_dict=True``, as models of diffusers do."""

    sample: Tensor
    """Aligned image tokens, ``[B, N, Dt]``."""


class ImageAligner(ModelMixin, ConfigMixin):
    """A network that maps vision-tower tokens to the space of the text tokens, and the only trained part of VCF.

    ``LayerNorm(Dv) -> Linear(Dv, Dt) -> ReLU -> Linear(Dt, Dt)`` on each token (docs/method.md, section 2).
    The aligner also defines how a reference becomes its input, because its weights fit that input only.

    Args:
        vision_dim: width ``Dv`` of the vision tower's hidden states.
        text_dim: width ``Dt`` of the text tokens the UNet is conditioned on.
        tokens: image tokens used in training and in inference: ``all``, ``patches`` (no CLS) or ``cls``.
        double_rescale: apply ``(x + 1) / 2`` to images that are in [0, 1] already, as the authors' inference code
            does. True only for the authors' checkpoints.
        token_norm: L2 norm that every aligned token is scaled to, or that of each of ``token_parts``; None leaves the
            norms as they are.
        token_parts: widths of the parts of a token that have norms of their own, one for each text encoder of the
            base; None is the whole token.
        default_strength: strength of ``concat`` with these tokens where none is given; None leaves it to the model.

    Raises:
        ModelError: ``tokens`` is none of :data:`vcf_batch.config.limits.IMAGE_TOKENS`.
    """

    projections: Mapping[str, Projection] = MappingProxyType({})
    """The projections of its tokens for roles that need one, by role, as ``vcf-batch model fit-roles`` stores them."""

    @register_to_config
    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        tokens: Literal["all", "patches", "cls"] = "all",
        double_rescale: bool = False,
        token_norm: float | Sequence[float] | None = None,
        default_strength: float | None = None,
        token_parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if tokens not in IMAGE_TOKENS:
            raise ModelError(f"the aligner's tokens is {tokens!r}; it must be one of {', '.join(IMAGE_TOKENS)}")
        self.proj = nn.Sequential(
            nn.LayerNorm(vision_dim), nn.Linear(vision_dim, text_dim), nn.ReLU(), nn.Linear(text_dim, text_dim)
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load a saved aligner as other models of diffusers, with its :attr:`projections`.

        Raises:
            ModelError: the file of the projections is damaged.
        """
        aligner: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        aligner.projections = projections.read(folder)
        return aligner

    @functools.wraps(ModelMixin.save_pretrained)  # Pipelines look at its parameters.
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the aligner as other models of diffusers, with its :attr:`projections`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.projections:
            Path(save_directory, ROLE_FILE).write_bytes(projections.to_bytes(self.projections))

    def forward(self, image_tokens: Tensor, return_dict: bool | None = None) -> Tensor | AlignerOutput | tuple[Tensor]:
        """Align image tokens.

        Args:
            image_tokens: ``[B, N, Dv]``, penultimate hidden states after :meth:`select_tokens`.
            return_dict: as in models of diffusers: True returns an :class:`AlignerOutput`, False a tuple of one tensor.
                None returns the tensor itself.

        Returns:
            ``[B, N, Dt]``, in the form that ``return_dict`` asks for.
        """
        aligned = self.proj(image_tokens)
        if self.config.token_norm is not None:
            norms, parts = self.config.token_norm, self.config.token_parts
            pieces = [aligned] if parts is None else aligned.split([*parts], dim=-1)
            each = zip(pieces, [norms] if parts is None else norms, strict=True)
            aligned = torch.cat([F.normalize(piece, dim=-1) * norm for piece, norm in each], dim=-1)
        if return_dict is None:
            return aligned
        return AlignerOutput(sample=aligned) if return_dict else (aligned,)

    def select_tokens(self, hidden_states: Tensor, tokens: str | None = None) -> Tensor:
        """Select image tokens: ``[B, 1 + P, Dv]`` with CLS first becomes ``[B, N, Dv]``.

        Args:
            tokens: ``all``, ``patches`` or ``cls``; None is the choice of this aligner's training.

        Raises:
            UsageError: ``tokens`` is another value.
        """
        tokens = self.config.tokens if tokens is None else tokens
        if tokens not in IMAGE_TOKENS:
            raise UsageError(f"image_tokens is {tokens!r}; it must be one of {', '.join(IMAGE_TOKENS)}")
        kept = {"all": slice(None), "patches": slice(1, None), "cls": slice(1)}
        return hidden_states[:, kept[tokens]]

    def preprocess(
        self, images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """Turn reference images into the vision tower's input.

        The whole image is squashed to a square, never cropped, so that its composition is kept
        (docs/method.md, section 1).

        Args:
            images: any size; converted to RGB.
            size: edge of the vision tower's input in pixels.
            mean, std: three numbers each, for images in [0, 1].

        Returns:
            float32 ``[B, 3, size, size]``, normalised.
        """
        squashed = [squash(image, size) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in squashed])) / 255
        if self.config.double_rescale:
            pixels = (pixels + 1) / 2
        normalised = (pixels - torch.tensor(mean)) / torch.tensor(std)
        return normalised.permute(0, 3, 1, 2).contiguous()

    @classmethod
    def from_authors(cls, path: str | Path) -> "ImageAligner":
        """Load a checkpoint of the authors: a ``state_dict`` with keys ``proj.0.*``, ``proj.1.*`` and ``proj.3.*``.

        The loaded aligner preprocesses as the authors' inference code does: it uses all tokens and rescales twice.

        Raises:
            ModelError: the file is not such a checkpoint, or it holds other things than tensors.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            text_dim, vision_dim = state["proj.1.weight"].shape
            aligner = cls(vision_dim, text_dim, tokens="all", double_rescale=True)
            aligner.load_state_dict(state)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch.load has no common error type for files that it cannot or will not read
            raise ModelError(
                f"{path} is not a checkpoint of the authors' aligner, a state_dict of proj.0.*, proj.1.* and proj.3.* "
                f"({error}); an aligner saved by this project is a folder: load it with ImageAligner.from_pretrained"
            ) from error
        return aligner.eval()


def squash(image: Image.Image, size: int) -> Image.Image:
    """The whole image as an RGB square of ``size`` pixels along each edge. A square of that size keeps its pixels."""
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def info_nce_loss(
    image_tokens: Tensor, text_tokens: Tensor, temperature: float | Tensor = INFO_NCE_TEMPERATURE
) -> Tensor:
    """Symmetric contrastive loss between mean-pooled, L2-normalised image and text tokens (docs/method.md, section 3).

    Args:
        image_tokens: aligned, ``[B, N, Dt]``.
        text_tokens: ``[B, T, Dt]``; row i is the caption of image i.
        temperature: divides the cosines; a tensor may be learned.

    Returns:
        Scalar, 0 or more.
    """
    image = F.normalize(image_tokens.mean(dim=1), dim=-1)
    text = F.normalize(text_tokens.mean(dim=1), dim=-1)
    logits = image @ text.T / temperature
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def reconstruction_loss(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """Mean squared error of the text tokens rebuilt from image tokens (docs/method.md, section 3).

    Scores are ``I X^T / sqrt(Dt)`` with a softmax over the **image** tokens; each text token is rebuilt as the
    weighted sum of image tokens.

    Args:
        image_tokens: aligned, ``[B, N, Dt]``.
        text_tokens: ``[B, T, Dt]``.

    Returns:
        Scalar, 0 or more.
    """
    scores = image_tokens @ text_tokens.mT / math.sqrt(text_tokens.shape[-1])
    rebuilt = scores.softmax(dim=1).mT @ image_tokens
    return F.mse_loss(rebuilt, text_tokens)


def tether_loss(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """Mean squared error of the image tokens rebuilt from text tokens: :func:`reconstruction_loss`, roles exchanged.

    The reconstruction is content if some image tokens serve. The others drift away from the text tokens, and the logits
    of some hide the prompt. The tether holds each of them (docs/method.md, section 8).

    Args:
        image_tokens: aligned, ``[B, N, Dt]``.
        text_tokens: ``[B, T, Dt]``.

    Returns:
        Scalar, 0 or more.
    """
    return reconstruction_loss(text_tokens, image_tokens)


def alignment_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    weight: float = INFO_NCE_WEIGHT,
    temperature: float | Tensor = INFO_NCE_TEMPERATURE,
) -> Tensor:
    """The paper's training loss, ``weight * info_nce_loss + reconstruction_loss`` (docs/method.md, section 3).

    Args:
        image_tokens: aligned, ``[B, N, Dt]``.
        text_tokens: ``[B, T, Dt]``; row i is the caption of image i.
        weight: weight of the contrastive part (lambda).
        temperature: temperature of the contrastive part.

    Returns:
        Scalar, 0 or more.
    """
    contrastive = info_nce_loss(image_tokens, text_tokens, temperature)
    return weight * contrastive + reconstruction_loss(image_tokens, text_tokens)


def load_vision_tower(
    folder: str, dtype: torch.dtype, option: str = "--image-encoder"
) -> CLIPVisionModelWithProjection:
    """Load the vision tower of a CLIP, from a checkpoint with or without the text tower.

    Args:
        folder: local folder in transformers' layout.
        dtype: number type of the weights.
        option: the option that names another, for messages.

    Raises:
        ModelError: the checkpoint lacks weights of the vision tower.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if isinstance(config, CLIPConfig):
        # A checkpoint of both towers stores their common projection width outside the towers' own configurations.
        config, width = config.vision_config, config.projection_dim
        config.projection_dim = width
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Otherwise transformers warns of every weight of the text tower.
    try:
        tower, report = CLIPVisionModelWithProjection.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            variant=lone_variant(folder),
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    remedy = f"name a CLIP, or its vision tower with projection, with {option}"
    refuse_missing_weights(report, f"the vision tower in {folder}", remedy)
    return tower


def load_preprocessing(folder: str, edge: int) -> CLIPImageProcessorPil:
    """Load the preprocessing of a CLIP; CLIP's own where the folder names none, as in ``h94/IP-Adapter``.

    Args:
        folder: local folder in transformers' layout.
        edge: edge of the tower's input in pixels.
    """
    if Path(folder, "preprocessor_config.json").exists():
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=edge)
