"""Transfer: what the pictures keep of the prompt and take from the reference, while an aligner is trained.

Losses and retrieval compare tokens with tokens, and say nothing of pictures. Here a few pairs of prompt and reference
are generated, always from the same noise, and the judge compares the pictures with both.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from vcf_batch import images
from vcf_batch.errors import StorageError
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.models.cache import fetch
from vcf_batch.report.contact_sheet import Cell, grid
from vcf_batch.setup.run_models import OWN_JUDGE
from vcf_batch.training.alignment import world_size
from vcf_batch.training.features import MAX_TRAINING_PIXELS
from vcf_batch.training.tar_samples import CaptionedImage
from vcf_batch.training.training_job import TrainingJob
from vcf_batch.vcf.attention import TokenBiasAttention, accept_token_bias
from vcf_batch.vcf.pipeline import VCFPipeline

TRANSFER_STEPS = 10
"""Denoising steps of each picture."""
AT_ONCE = 4
"""Pictures of one forward pass."""
SHOWN = 8
"""Most pairs in the picture grid."""


@dataclass(frozen=True)
class TransferPair:
    """A prompt, a reference of another picture, and the seed of the noise."""

    prompt: str
    reference: Image.Image
    seed: int


@dataclass(frozen=True)
class Measured:
    """What the pictures at one strength show."""

    strength: float
    prompt_kept: float
    """Cosine of picture and prompt, relative to that of the same pictures without references: 1 is all of it. What some
    pictures lose is not made up for by others, which gain."""
    reference_followed: float
    """How much more a picture is like its own reference than like those of the other pairs, compared with the same
    picture without references: 0 is chance, and 1 is as much as the reference itself."""
    attention: dict[str, float]
    """Share of the attention (0 to 1) that the image tokens get, by layer of the UNet."""

    @property
    def transfer(self) -> float:
        """Both in one number, their product: 0 if the prompt is lost or the references have no effect of their own."""
        return max(self.prompt_kept, 0.0) * max(self.reference_followed, 0.0)

    @property
    def row(self) -> dict[str, float]:
        """The columns of ``log.csv``."""
        return {
            "strength": self.strength,
            "transfer": self.transfer,
            "prompt_kept": self.prompt_kept,
            "reference_followed": self.reference_followed,
            "image_attention": sum(self.attention.values()) / len(self.attention),
        }

    @property
    def layers(self) -> dict[str, float]:
        """Further columns of ``transfer.csv``: the attention to image tokens in each layer."""
        return {f"attention {layer}": share for layer, share in self.attention.items()}


@dataclass(frozen=True)
class _Pictures:
    """The pictures of all pairs at one strength."""

    embeddings: Tensor
    """The judge's, ``[P, D]``, normalised."""
    shown: list[Image.Image]
    """The first :data:`SHOWN` pictures."""
    attention: dict[str, float]


class Transfer:
    """The measurement, with what stays the same in all validations: the pairs and the pictures without references.

    Each worker generates its share of the pictures, and all of them get the same result.

    Args:
        pipeline: the whole pipeline on its device, with the aligner that is trained.
        judge: the CLIP that compares.
        pairs: the pairs of all workers, at least two.
        rank: number of this worker.
    """

    def __init__(self, pipeline: VCFPipeline, judge: ClipJudge, pairs: Sequence[TransferPair], rank: int = 0) -> None:
        self.pipeline, self.judge, self.pairs, self.rank = pipeline, judge, pairs, rank
        pipeline.set_progress_bar_config(disable=True)
        for network in (pipeline.unet, pipeline.vae):
            network.requires_grad_(False).eval()
        accept_token_bias(pipeline.unet)
        self.prompts = judge.embed_texts([pair.prompt for pair in pairs]).cpu()
        self.references = judge.embed_images([pair.reference for pair in pairs]).cpu()
        self.text_only = self._generate(0.0)

    @classmethod
    def load(
        cls, job: TrainingJob, pipeline: VCFPipeline, held_out: Iterator[CaptionedImage], rank: int
    ) -> "Transfer | None":
        """Load the judge, and pair prompts with the first usable images of the validation.

        Args:
            job: the training.
            pipeline: see :class:`Transfer`.
            held_out: the pairs of the validation.
            rank: number of this worker.

        Returns:
            The measurement; None if there are fewer than two usable images.

        Raises:
            ModelError: the judge cannot be loaded.
            StorageError: the storage failed.
        """
        shown: list[tuple[Image.Image, str]] = []
        for pair in held_out:
            try:
                shown.append((images.decode(pair.read(), MAX_TRAINING_PIXELS), pair.captions[0]))
            except (StorageError, MemoryError):
                raise
            except Exception:  # An odd content makes a library raise nearly any exception; the feed has told of it.
                continue
            if len(shown) == job.transfer_pairs:
                break
        if len(shown) < 2:
            return None
        # Each image gets the caption of the one before it, which is another picture's.
        prompts = job.prompts or [shown[number - 1][1] for number in range(len(shown))]
        pairs = [
            TransferPair(prompts[number % len(prompts)], image, job.config.seed + number)
            for number, (image, _) in enumerate(shown)
        ]
        folder = os.path.join(fetch(job.parts.base), OWN_JUDGE) if job.judge is None else fetch(job.judge)
        return cls(pipeline, ClipJudge.from_pretrained(folder, pipeline.device), pairs, rank)

    def measure(self, strengths: Sequence[float]) -> tuple[list[Measured], Image.Image]:
        """Generate the pairs at each strength, by ``concat``.

        Returns:
            What each strength gives, and a picture of it: references, pictures without them, and with them at each
            strength.
        """
        made = [self._generate(strength) for strength in strengths]
        found = [self._compare(strength, pictures) for strength, pictures in zip(strengths, made, strict=True)]
        heads = [["reference", ""], ["text only", ""]]
        heads += [
            [f"strength {each.strength:g}", f"kept {each.prompt_kept:.0%}, foll. {each.reference_followed:.0%}"]
            for each in found
        ]
        columns = [[pair.reference for pair in self.pairs], self.text_only.shown, *(each.shown for each in made)]
        rows = [
            (pair.prompt, [Cell(column[number], "") for column in columns])
            for number, pair in enumerate(self.pairs[:SHOWN])
        ]
        return found, grid(heads, rows)

    def _compare(self, strength: float, pictures: _Pictures) -> Measured:
        without, made = self.text_only.embeddings, pictures.embeddings
        likeness = (without * self.prompts).sum(dim=1)
        lost = (likeness - (made * self.prompts).sum(dim=1)).clamp(min=0)
        kept = 1 - lost.mean() / likeness.abs().mean().clamp(min=1e-6)
        # What a reference is like is told from what it shares with all references.
        like = self.references @ self.references.T
        unchanged = without @ self.references.T
        followed = _margin(made @ self.references.T - unchanged) / _margin(like - unchanged).clamp(min=1e-6)
        return Measured(strength, kept.item(), followed.item(), pictures.attention)

    def _generate(self, strength: float) -> _Pictures:
        own = list(range(self.rank, len(self.pairs), world_size()))
        parts: list[tuple[int, Tensor, Image.Image, dict[str, float]]] = []
        for start in range(0, len(own), AT_ONCE):
            numbers = own[start : start + AT_ONCE]
            some = [self.pairs[number] for number in numbers]
            with _noted_attention(self.pipeline, len(some)) as noted:
                pixels = self.pipeline.generate(
                    [pair.prompt for pair in some],
                    [pair.reference for pair in some],
                    seeds=[pair.seed for pair in some],
                    strength=strength,
                    steps=TRANSFER_STEPS,
                )
            arrays = images.from_unit(pixels.nan_to_num().permute(0, 2, 3, 1).numpy())
            pictures = [Image.fromarray(each) for each in arrays]
            embeddings = self.judge.embed_images(pictures).cpu()
            for place, number in enumerate(numbers):
                shares = {layer: torch.stack(each)[:, place].mean().item() for layer, each in noted.items()}
                parts.append((number, embeddings[place], pictures[place], shares))
        if world_size() > 1:
            gathered: list[Any] = [None] * world_size()
            dist.all_gather_object(gathered, parts)
            parts = [part for each in gathered for part in each]
        parts.sort(key=lambda part: part[0])
        attention = {layer: sum(part[3][layer] for part in parts) / len(parts) for layer in parts[0][3]}
        return _Pictures(torch.stack([part[1] for part in parts]), [part[2] for part in parts[:SHOWN]], attention)


def _margin(likeness: Tensor) -> Tensor:
    """By how much the diagonal of ``[P, P]`` exceeds the other columns, on average."""
    count = len(likeness)
    own = likeness.diagonal().sum() / count
    return own - (likeness.sum() - likeness.diagonal().sum()) / (count * (count - 1))


@contextlib.contextmanager
def _noted_attention(pipeline: VCFPipeline, count: int) -> Iterator[dict[str, list[Tensor]]]:
    """A block in which the UNet's cross-attention notes the share of the image tokens.

    Args:
        pipeline: the pipeline.
        count: number of samples of each call.

    Yields:
        The shares, ``[count]`` for each step, by layer.
    """
    before = dict(pipeline.unet.attn_processors)
    noting, shares = dict(before), dict[str, list[Tensor]]()
    for name in before:
        if name.endswith(".attn2.processor"):
            layer = name.removesuffix(".attn2.processor").replace(".transformer_blocks", "")
            noting[name] = _NotingAttention(pipeline.max_tokens, count, shares.setdefault(layer, []).append)
    pipeline.unet.set_attn_processor(noting)
    try:
        yield shares
    finally:
        pipeline.unet.set_attn_processor(before)


class _NotingAttention(TokenBiasAttention):
    """Cross-attention that notes which share of it the image tokens get: the mean over heads and queries.

    Args:
        text_tokens: number of text tokens, which come first.
        count: number of samples; where there is guidance, they are the second half of a batch.
        note: takes the shares, ``[count]`` on the CPU.
    """

    def __init__(self, text_tokens: int, count: int, note: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.text_tokens, self.count, self.note = text_tokens, count, note

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        shares = []
        for sample in range(len(query) - self.count, len(query)):
            logits = query[sample].float() @ key[sample].float().mT / query.shape[-1] ** 0.5
            if bias is not None:
                logits = logits + bias[sample].float()
            shares.append(logits.softmax(dim=-1)[..., self.text_tokens :].sum(dim=-1).mean())
        self.note(torch.stack(shares).cpu())
        return super()._attend(query, key, value, bias)
