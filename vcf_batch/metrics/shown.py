"""What a score of an output sees: pictures beside what they are compared with; the form that scorers have; and what
those of each kind give. No torch here: the driver of ``score`` knows all of it, and loads no scorer."""

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vcf_batch.models.forward_pass import Input, Output

if TYPE_CHECKING:
    from torch import Tensor

REFERENCES_KEPT = 256
"""Most distinct references with kept embedding and pixels: 450 MB at 768 x 768."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture to score, and what it is compared with."""

    picture: NDArray[np.uint8]
    """``[H, W, 3]``."""
    prompt: str
    references: Sequence[Image.Image] = ()
    """RGB images; empty for text only, or if nobody asks for them."""
    shares: Sequence[float] = ()
    """Share of each reference in a score; they sum to 1."""
    twin: NDArray[np.uint8] | None = None
    """Image of the prompt alone from the same noise, of the same size; None without triplets."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Row of the output, by column."""


Value = float | bytes | None
"""What a scorer gives for a picture; None where it does not apply."""


class Part(NamedTuple):
    """What a scorer gives for each picture: a number, or a vector."""

    meaning: str
    """One sentence for people."""
    higher_is_better: bool | None = None
    """None where nobody knows."""
    against: str | None = None
    """What the picture is compared with: ``prompt``, ``reference``, ``twin``; None for the picture alone."""
    is_vector: bool = False
    """Whether it is half-precision numbers, little-endian, as bytes."""


CLIP_PARTS: Mapping[str, Part] = {
    "to_prompt": Part("How well the image fits the prompt, by a CLIP, -1 to 1.", True, "prompt"),
    "to_reference": Part("How much the image resembles the reference, by a CLIP, -1 to 1.", True, "reference"),
}
EMBEDDING_PARTS: Mapping[str, Part] = {
    "image": Part("Embedding of the image by a CLIP, length 1, in half precision.", is_vector=True),
    "reference": Part(
        "Embedding of the reference by a CLIP, length 1, in half precision.", against="reference", is_vector=True
    ),
}
DINO_PARTS: Mapping[str, Part] = {
    "to_reference": Part("How alike image and reference are patch by patch, by a DINOv2, -1 to 1.", True, "reference"),
    "to_twin": Part(
        "How alike image and text-only twin are patch by patch, without their style, by a DINOv2, -1 to 1.",
        True,
        "twin",
    ),
}
AESTHETIC_PARTS: Mapping[str, Part] = {
    "": Part("How much people like such images, by a head on a CLIP, about 1 to 10.", True)
}
LPIPS_PARTS: Mapping[str, Part] = {
    "": Part("The perceptual distance of image and reference, LPIPS.", False, "reference")
}
TEXTURE_PARTS: Mapping[str, Part] = {
    "": Part("How alike image and reference are drawn, whatever their colours.", True, "reference")
}


class Seen:
    """Memory of what encoders made of the inputs of one shard, so that they see each distinct input once.

    It holds the last :data:`REFERENCES_KEPT` inputs of each encoder. It is not kept for the
    next shard, because inputs of one forward pass change each other's last bits.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, dict[Hashable, Any]] = {}

    def __call__(
        self,
        encoder: Hashable,
        keys: Sequence[Hashable],
        inputs: Sequence[Input],
        encode: "Callable[[list[Input]], Sequence[Output] | Tensor]",
    ) -> list[Any]:
        """The output for each input; those of new inputs are made in one call.

        Args:
            encoder: name of the encoder.
            keys: the same key for the same input.
            inputs: one input for each key.
            encode: takes a list of inputs to one output each.
        """
        made = self._made.setdefault(encoder, {})
        new = {key: each for key, each in zip(keys, inputs, strict=True) if key not in made}
        if new:
            made.update(zip(new, encode([*new.values()]), strict=True))
        found = [made[key] for key in keys]
        for key in dict.fromkeys(keys):
            made[key] = made.pop(key)  # keeps the order of last use
        for key in [*made][: max(0, len(made) - REFERENCES_KEPT)]:
            del made[key]
        return found

    def references(
        self, encoder: Hashable, shown: Sequence[Shown], encode: "Callable[[list[Image.Image]], Sequence[Any] | Tensor]"
    ) -> list[Any]:
        """The output for each reference of all pictures, picture by picture."""
        pictures = [image for each in shown for image in each.references]
        digests = {number: digest(image) for number, image in {id(image): image for image in pictures}.items()}
        return self(encoder, [digests[id(image)] for image in pictures], pictures, encode)


class ImageScorer(Protocol):
    """Scorer of pictures. It has no state, so that a value depends on the shard alone."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """What it gives, by name; the empty name is that of the score itself. Empty before the first call if the scorer
        learns it then."""

    def prepare(self, picture: NDArray[np.uint8]) -> Any:
        """What it needs of a picture ``[H, W, 3]`` besides the picture; threads call this ahead of :meth:`score`."""

    def score(self, shown: Sequence[Shown], prepared: Sequence[Any], seen: Seen) -> Mapping[str, Sequence[Value]]:
        """Score pictures.

        Args:
            shown: the pictures of a batch, 1 or more.
            prepared: what :meth:`prepare` gave for each of them.
            seen: the memory of their shard.

        Returns:
            A value for each picture, by part; None where a score does not apply to a picture.
        """


def owners(shown: Sequence[Shown]) -> list[int]:
    """Number of the picture of each reference, picture by picture."""
    return [number for number, each in enumerate(shown) for _ in each.references]


def over_references(shown: Sequence[Shown], values: "Tensor") -> list[float | None]:
    """Weighted mean of the values of each picture's references; None for a picture without one.

    Args:
        values: a value for each reference of all pictures, ``[R]``.
    """
    return means(values.tolist(), [each.shares for each in shown])


def digest(image: Image.Image) -> bytes:
    """The name of a picture by its pixels, for one process."""
    return hashlib.blake2b(repr((image.mode, image.size)).encode() + image.tobytes(), digest_size=16).digest()


def means(values: Sequence[float], shares: Sequence[Sequence[float]]) -> list[float | None]:
    """Weighted mean of each output's values; None for an output without values.

    Args:
        values: values of all outputs, output by output.
        shares: for each output, the weights of its values; they sum to 1.
    """
    following = iter(values)
    return [math.fsum(share * next(following) for share in own) if own else None for own in shares]
