"""Fusion: how aligned image tokens join the text tokens (docs/method.md, section 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vcf_batch.config import FUSIONS
from vcf_batch.errors import UsageError

DEFAULT_STRENGTHS = {"naive": 0.3, "concat": 1.0, "cross_attention": 0.3}


def default_strength(mode: str) -> float:
    """The strength that the paper uses with a fusion mode.

    Raises:
        UsageError: no such mode.
    """
    if mode not in DEFAULT_STRENGTHS:
        raise UsageError(f"fusion is {mode!r}; it must be one of {', '.join(FUSIONS)}")
    return DEFAULT_STRENGTHS[mode]


def fuse(text_tokens: Tensor, image_tokens: Tensor, mode: str, strength: float | None = None) -> Tensor:
    """Fuse text tokens with the aligned image tokens of the same samples.

    Computed in float32 and sample by sample: nothing is averaged or scaled over the batch.

    Args:
        text_tokens: ``[B, T, Dt]``.
        image_tokens: aligned, ``[B, N, Dt]``; of several references, one after the other.
        mode: ``naive``, ``concat`` or ``cross_attention``.
        strength: the weight ``a`` of the image part, 0 is text only; None is the mode's default. ``concat`` returns
            the same tokens at every strength: its strength is a bias on the image tokens' attention logits, which
            travels beside the tokens.

    Returns:
        ``[B, T, Dt]``, or ``[B, T + N, Dt]`` for ``concat``; in the dtype of ``text_tokens``.

    Raises:
        UsageError: no such mode.
    """
    default = default_strength(mode)
    strength = default if strength is None else strength
    if mode == "concat":
        return torch.cat([text_tokens, image_tokens.to(text_tokens.dtype)], dim=1)
    text, image = text_tokens.float(), image_tokens.float()
    mixed = image.mean(dim=1, keepdim=True) if mode == "naive" else _attend(text, image)
    return torch.lerp(text, mixed.expand_as(text), strength).to(text_tokens.dtype)


def _attend(text: Tensor, image: Tensor) -> Tensor:
    """For each text token, the image tokens weighted by cosine and rescaled to the text's mean norm: ``[B, T, Dt]``."""
    text_norm = text.norm(dim=-1, keepdim=True).mean(dim=1, keepdim=True)
    direction = F.normalize(image, dim=-1)
    cosine = F.normalize(text, dim=-1) @ direction.mT
    weights = (cosine / math.sqrt(text.shape[-1])).softmax(dim=-1)
    return weights @ (direction * text_norm)


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is conditioned on: a batch of samples with references and fusions of their own."""

    tokens: Tensor
    """``[B, S, Dt]``: each sample's fused tokens, padded to the longest with zeros."""
    negative_tokens: Tensor
    """``[B, S, Dt]``: the unconditional side; zeros where ``tokens`` has image tokens, as the authors pad it."""
    bias: Tensor | None
    """float32 ``[B, 1, S]``, added to the attention logits of both sides: 0 on text tokens, log(strength) on the image
    tokens of ``concat``, ``-inf`` on padding. None if that is 0 throughout, so that attention takes its fastest path.
    """


def condition(
    text_tokens: Tensor,
    image_tokens: Sequence[Tensor | None],
    negative_tokens: Tensor,
    modes: Sequence[str],
    strengths: Sequence[float],
) -> Conditioning:
    """Fuse each sample in its own way and put them into one batch.

    A sample's tokens do not depend on its neighbours: unequal token counts are padded, and the padding is hidden by
    the bias. A sample with ``concat`` at strength 0 has no image tokens at all, so it is exactly text only.

    Args:
        text_tokens: ``[B, T, Dt]``.
        image_tokens: of each sample the aligned tokens of all its references, ``[N, Dt]``; None is text only.
        negative_tokens: ``[B, T, Dt]``, of the negative prompts.
        modes: a fusion mode for each sample.
        strengths: for each sample, 0 or more.

    Raises:
        UsageError: no such mode, or a strength below 0.
    """
    fused, biases = [], []
    for text, image, mode, strength in zip(text_tokens, image_tokens, modes, strengths, strict=True):
        if not 0 <= strength < math.inf:
            raise UsageError(f"strength is {strength}; it must be a number of 0 or more")
        default_strength(mode)  # an unknown mode is an error for a text-only sample too
        if image is not None and strength > 0:
            tokens = fuse(text[None], image[None].to(text.device), mode, strength)[0]
        else:
            tokens = text
        appended = len(tokens) - len(text)
        fused.append(tokens)
        biases.append([0.0] * len(text) + [math.log(strength)] * appended if appended else [0.0] * len(text))
    longest = max(len(tokens) for tokens in fused)
    bias = torch.tensor([row + [-math.inf] * (longest - len(row)) for row in biases])
    return Conditioning(
        tokens=torch.stack([F.pad(tokens, (0, 0, 0, longest - len(tokens))) for tokens in fused]),
        negative_tokens=F.pad(negative_tokens, (0, 0, 0, longest - negative_tokens.shape[1])),
        bias=bias[:, None].to(text_tokens.device) if bias.any() else None,
    )
