"""The protocol of a base family: texts in; tokens, and what else the UNet gets at each step, out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from vcf_batch.config.sampling import Sampling

if TYPE_CHECKING:
    from vcf_batch.vcf.pipeline import VCFPipeline


class EncodedText(NamedTuple):
    """A prompt or negative prompt, as the text encoders of a family see it."""

    tokens: Tensor
    """``[T, Dt]``, what the UNet's cross-attention reads."""
    pooled: Tensor | None = None
    """``[Dp]``, one embedding for the whole text; None in a family without one."""
    is_empty: bool = False
    """Whether it is the empty text, which a family may stand for in another way as a negative prompt."""

    @classmethod
    def of(cls, text: "Tensor | EncodedText") -> "EncodedText":
        """A text by its tokens alone, or as it is."""
        return text if isinstance(text, EncodedText) else cls(text)


AddedInputs = Mapping[str, tuple[Tensor, Tensor]]
"""What a UNet gets at each step besides latents, timestep and tokens: by the name in ``added_cond_kwargs`` a tensor
``[B, ...]`` for the unconditional side and one for the prompt's."""


class BaseFamily(Protocol):
    """What differs between families of base models. Sampling, fusion and training ask nothing else."""

    @property
    def width(self) -> int:
        """Width ``Dt`` of the tokens that the UNet is conditioned on."""

    @property
    def encoders(self) -> Sequence[Any]:
        """The text encoders, whose tokens stand side by side."""

    def encode(self, texts: Sequence[str], chunked: bool = False, clip_skip: int | None = None) -> list[EncodedText]:
        """Encode texts, each on its own.

        Args:
            texts: one or more.
            chunked: encode a text of any length in windows, whose tokens stand one after the other; otherwise what
                exceeds one window is cut off with a warning.
            clip_skip: number of each text encoder's last layers that are left out, as diffusers counts them; None is
                the family's own choice.

        Raises:
            UsageError: a text encoder has fewer layers.
        """

    def negative(self, text: EncodedText) -> EncodedText:
        """What the unconditional side has for a negative prompt."""

    def added_inputs(
        self,
        positive: Sequence[EncodedText],
        negative: Sequence[EncodedText],
        size: tuple[int, int],
        sampling: Sampling,
    ) -> AddedInputs:
        """What the UNet gets at each step for a batch of B samples.

        Args:
            positive, negative: the texts of each sample.
            size: height and width of the images in pixels.
            sampling: the way from noise to an image, with the sizes that a family may be told.

        Raises:
            UsageError: a text lacks its pooled embedding, or the sampling has a size that the family does not take.
        """


class Windows(NamedTuple):
    """Texts as token ids, in windows with a begin and an end each."""

    ids: Tensor
    """``[W, T]``, the windows of all texts one after the other."""
    masks: Tensor
    """``[W, T]``."""
    counts: list[int]
    """Number of windows of each text."""


def windows_of(pipeline: "VCFPipeline", tokenizer: Any, texts: Sequence[str], chunked: bool) -> Windows:
    """The windows of texts, one each unless ``chunked``; embeddings of diffusers' textual inversion are told apart."""
    converted = pipeline.maybe_convert_prompt(list(texts), tokenizer)
    found = tokenizer(
        converted, padding="max_length", truncation=True, return_overflowing_tokens=chunked, return_tensors="pt"
    )
    counts = found.overflow_to_sample_mapping.bincount().tolist() if chunked else [1] * len(texts)
    return Windows(found.input_ids, found.attention_mask, counts)
