"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders, a pooled embedding, and told sizes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import UsageError
from vcf_batch.vcf.acceleration import upload
from vcf_batch.vcf.aligner import ENCODE_BATCH
from vcf_batch.vcf.base.family import AddedInputs, EncodedText, Windows, windows_of
from vcf_batch.vcf.base.stable_diffusion import require_layers, warn_of_cuts

if TYPE_CHECKING:
    from vcf_batch.vcf.pipeline import VCFPipeline


class StableDiffusionXL:
    """The family of Stable Diffusion XL, as a :class:`vcf_batch.vcf.base.family.BaseFamily`.

    A token is the last but one hidden states of both text encoders side by side, without a final norm. The pooled
    embedding is the second encoder's projection, of a text's first window. clip_skip leaves it as it is.
    """

    def __init__(self, pipeline: "VCFPipeline") -> None:
        self.pipeline = pipeline

    @property
    def width(self) -> int:
        return sum(int(encoder.config.hidden_size) for encoder in self.encoders)

    @property
    def encoders(self) -> Sequence[Any]:
        return [self.pipeline.text_encoder, self.pipeline.text_encoder_2]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], chunked: bool = False, clip_skip: int | None = None) -> list[EncodedText]:
        if not chunked:
            warn_of_cuts(self.pipeline, texts)
        windows = [windows_of(self.pipeline, tokenizer, texts, chunked) for tokenizer in self.pipeline.tokenizers]
        counts = [max(own) for own in zip(*(side.counts for side in windows), strict=True)]
        sides, pooled = [], torch.empty(0)
        for encoder, tokenizer, side in zip(self.encoders, self.pipeline.tokenizers, windows, strict=True):
            # Each tokenizer has tokens of its own for some signs, such as "!!".
            ids = side.ids if side.counts == counts else self._filled(side, counts, tokenizer)
            found = [self._encode(encoder, batch, clip_skip) for batch in ids.split(ENCODE_BATCH)]
            sides.append(torch.cat([tokens for tokens, _ in found]))
            pooled = torch.cat([own for _, own in found])
        tokens = torch.cat(sides, dim=-1).split(counts)
        first = [own[0] for own in pooled.split(counts)]
        return [
            EncodedText(own.flatten(0, 1), one, not text) for own, one, text in zip(tokens, first, texts, strict=True)
        ]

    def _filled(self, windows: Windows, counts: Sequence[int], tokenizer: Any) -> Tensor:
        """Token ids of texts whose windows are filled up to ``counts`` with windows of the empty text."""
        empty = windows_of(self.pipeline, tokenizer, [""], False).ids
        own = zip(windows.ids.split(windows.counts), counts, strict=True)
        return torch.cat([torch.cat([ids, empty.repeat(count - len(ids), 1)]) for ids, count in own])

    def _encode(self, encoder: Any, ids: Tensor, clip_skip: int | None) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T, D]`` and the first output ``[B, ...]`` of one text encoder for token ids ``[B, T]``."""
        require_layers(clip_skip, encoder.config.num_hidden_layers - 1)
        output = encoder(upload(ids, self.pipeline._execution_device), output_hidden_states=True)
        return output.hidden_states[-2 - (clip_skip or 0)], output[0]

    def negative(self, text: EncodedText) -> EncodedText:
        """The text itself; zeros for the empty one, where the model's ``force_zeros_for_empty_prompt`` says so."""
        if not text.is_empty or not self.pipeline.config.force_zeros_for_empty_prompt or text.pooled is None:
            return text
        return EncodedText(torch.zeros_like(text.tokens), torch.zeros_like(text.pooled), True)

    def added_inputs(
        self,
        positive: Sequence[EncodedText],
        negative: Sequence[EncodedText],
        size: tuple[int, int],
        sampling: Sampling,
    ) -> AddedInputs:
        pooled = [[text.pooled for text in side if text.pooled is not None] for side in (negative, positive)]
        if any(len(own) < len(positive) for own in pooled):
            raise UsageError(
                "a text has tokens without a pooled embedding, which Stable Diffusion XL needs: give "
                "pooled_prompt_embeds and negative_pooled_prompt_embeds beside prompt_embeds"
            )
        told = [
            *(sampling.original_height or size[0], sampling.original_width or size[1]),
            *(sampling.crop_top, sampling.crop_left),
            *(sampling.target_height or size[0], sampling.target_width or size[1]),
        ]
        # float32 up to the UNet's embedding, because bfloat16 rounds sizes that are no multiples of 8.
        sizes = upload(torch.tensor([told] * len(positive), dtype=torch.float32), pooled[0][0].device)
        return {"text_embeds": (torch.stack(pooled[0]), torch.stack(pooled[1])), "time_ids": (sizes, sizes)}
