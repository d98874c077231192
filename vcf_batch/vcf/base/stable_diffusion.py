"""Stable Diffusion 1 and 2: one text encoder, and nothing besides its tokens."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import UsageError
from vcf_batch.vcf.acceleration import upload
from vcf_batch.vcf.aligner import ENCODE_BATCH
from vcf_batch.vcf.base.family import AddedInputs, EncodedText, windows_of

if TYPE_CHECKING:
    from vcf_batch.vcf.pipeline import VCFPipeline

_log = logging.getLogger(__name__)


class StableDiffusion:
    """The family of Stable Diffusion 1 and 2, as a :class:`vcf_batch.vcf.base.family.BaseFamily`."""

    def __init__(self, pipeline: "VCFPipeline") -> None:
        self.pipeline = pipeline

    @property
    def width(self) -> int:
        return int(self.pipeline.text_encoder.config.hidden_size)

    @property
    def encoders(self) -> Sequence[Any]:
        return [self.pipeline.text_encoder]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], chunked: bool = False, clip_skip: int | None = None) -> list[EncodedText]:
        if not chunked:
            warn_of_cuts(self.pipeline, texts)
        ids, masks, counts = windows_of(self.pipeline, self.pipeline.tokenizer, texts, chunked)
        batches = zip(ids.split(ENCODE_BATCH), masks.split(ENCODE_BATCH), strict=True)
        encoded = torch.cat([self._encode(*batch, clip_skip) for batch in batches]).split(counts)
        return [EncodedText(own.flatten(0, 1), is_empty=not text) for own, text in zip(encoded, texts, strict=True)]

    def _encode(self, ids: Tensor, masks: Tensor, clip_skip: int | None) -> Tensor:
        """Text tokens ``[B, T, Dt]`` of token ids and their masks, ``[B, T]``."""
        encoder, device = self.pipeline.text_encoder, self.pipeline._execution_device
        require_layers(clip_skip, encoder.config.num_hidden_layers)
        mask = upload(masks, device) if getattr(encoder.config, "use_attention_mask", False) else None
        ids = upload(ids, device)
        if clip_skip is None:
            return encoder(ids, attention_mask=mask)[0]
        layers = encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        # transformers 5 has the tower itself where earlier versions had a model around it.
        tower: Any = getattr(encoder, "text_model", encoder)
        return tower.final_layer_norm(layers[-1 - clip_skip])

    def negative(self, text: EncodedText) -> EncodedText:
        return text

    def added_inputs(
        self,
        positive: Sequence[EncodedText],
        negative: Sequence[EncodedText],
        size: tuple[int, int],
        sampling: Sampling,
    ) -> AddedInputs:
        if sampling.told_sizes:
            raise UsageError(
                f"{min(sampling.told_sizes)} is given, and this model is not told sizes: leave it out, or use a Stable "
                "Diffusion XL"
            )
        if any(text.pooled is not None for text in (*positive, *negative)):
            raise UsageError(
                "there are pooled_prompt_embeds, and this model takes the tokens of a text alone: leave them out, or "
                "use a Stable Diffusion XL"
            )
        return {}


def warn_of_cuts(pipeline: "VCFPipeline", texts: Sequence[str]) -> None:
    """Warn if texts have more tokens than the text encoder takes."""
    converted = pipeline.maybe_convert_prompt(list(texts), pipeline.tokenizer)
    lengths = map(len, pipeline.tokenizer(converted, verbose=False).input_ids)
    if too_long := sum(length > pipeline.max_tokens for length in lengths):
        _log.warning("%d prompts have more than %d tokens, and the rest is cut off", too_long, pipeline.max_tokens)


def require_layers(clip_skip: int | None, most: int) -> None:
    """Refuse to leave out more layers than there are.

    Raises:
        UsageError: with value and limit.
    """
    if clip_skip is not None and not 0 <= clip_skip <= most:
        raise UsageError(f"clip_skip is {clip_skip}; it must be between 0 and {most}, the text encoder's layers")
