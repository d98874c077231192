"""The vocabulary every signature uses: Row, Shard, Scores, Sample."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["success", "rejected", "failed"]

STATUSES: tuple[Status, ...] = ("success", "rejected", "failed")

RowMask = bytes
"""One byte for each row of a shard, in order: 1 for a redo row, 0 for a row whose committed sample is kept."""

OVERRIDES = (
    "negative_prompt",
    "guidance_scale",
    "strength",
    "fusion",
    "fusion_lo",
    "fusion_hi",
    "reference_weights",
    "reference_roles",
    "pno_steps",
    "lora",
)
"""Manifest columns that replace the run's setting for one row."""

TRIPLET = ("content", "style")
"""The other images of a sample in a run with triplets, as ``KEY.content.png`` and ``KEY.style.png``: the text-only twin
from the same noise, and the reference."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference image as the manifest gives it: a URI, embedded bytes, or both.

    ``uri`` is what the output records. ``data``, when present, is the image itself and the URI is not opened.
    """

    uri: str | None = None
    data: bytes | None = None
    sha256: str | None = None
    """Hex SHA-256 that the image's bytes must have; None if they may be any."""


@dataclass(frozen=True, slots=True)
class Row:
    """One manifest row, checked, with its seed and its identity settled."""

    number: int
    """Position in the manifest, from 0."""
    key: str
    """Name of the sample everywhere: ``sample_id``, or the row number zero-padded to 9 digits."""
    prompt: str
    references: tuple[Reference, ...] = ()
    """References of the row; empty means text only."""
    seed: int = 0
    negative_reference: Reference | None = None
    """Reference that the image should not look like."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The row's own values for names in :data:`OVERRIDES`; nulls are left out."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the manifest that the outputs repeat."""
    error: str | None = None
    """Reason why the row cannot be generated, if the manifest alone tells; else None."""
    masks: tuple[Reference | None, ...] = ()
    """Where each reference may act in the picture; empty for no masks."""

    @property
    def encoded(self) -> tuple[Reference, ...]:
        """The images that an encoder sees: the row's references, then its negative one."""
        return self.references if self.negative_reference is None else (*self.references, self.negative_reference)

    @property
    def images(self) -> tuple[Reference, ...]:
        """Every image that the row names: those that an encoder sees, then its masks."""
        return (*self.encoded, *(mask for mask in self.masks if mask is not None))


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Rows ``start`` to ``stop`` (excluded) of the manifest: the unit of work, retry, commit and resume."""

    index: int
    start: int
    stop: int
    name: str
    """``index`` in the run's number of digits, such as ``00012``; the stem of the shard's files."""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Scores:
    """A sample's scores. None where a score does not apply (no reference) or was not asked for."""

    clip_score: float | None = None
    """Cosine of the judge's embeddings of output and prompt, -1 to 1."""
    clip_reference: float | None = None
    """Cosine of the judge's embeddings of output and reference, -1 to 1. The object counts as much as the looks."""
    lpips: float | None = None
    """Perceptual distance of output and reference, 0 or more; lower is closer."""
    content_alignment: float | None = None
    """Similarity of the layouts of output and text-only twin, -1 to 1 (docs/quality.md). None without triplets."""
    style_similarity: float | None = None
    """Similarity of the channel statistics of output and reference, 0 to 1: above all of their palettes, and hardly of
    how they are drawn (docs/quality.md)."""
    texture_similarity: float | None = None
    """Correlation of the textures of output and reference (docs/quality.md). None unless it was asked for."""


TEXTURE = "texture_similarity"
"""The score that only runs which ask for it have."""

SCORES = tuple(field.name for field in dataclasses.fields(Scores) if field.name != TEXTURE)
"""The names of the scores of every run, in the order of their columns."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One image that was drawn for a row in a run with gates, kept or not."""

    seed: int
    """Seed of the noise: the row's own for the first draw, see :func:`vcf_batch.sharding.draw_seed`."""
    scores: Scores
    nsfw: bool | None = None
    """Whether the safety checker flagged the image; None without a checker."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The course of prompt-noise optimisation for one sample. Lower is better."""

    first: float
    """Loss of the image without the optimisation."""
    best: float
    """Loss of the image that was kept."""
    steps: int
    """Number of updates that were made."""
    stopped: bool = False
    """Whether the updates ended early, because a loss was not finite or a gradient exploded."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Outcome of one row: the encoded image and its scores, or the reason why there is none."""

    row: Row
    status: Status
    settings: Mapping[str, Any]
    """Settings that were used: the run's, with the row's overrides applied, and the seed of the noise."""
    image: bytes | None = None
    """The encoded image file; None unless ``status`` is ``success``."""
    width: int | None = None
    height: int | None = None
    scores: Scores = Scores()
    error_message: str | None = None
    pno_objective: Objective | None = None
    """Course of the prompt-noise optimisation; None without it."""
    nsfw: bool | None = None
    """Whether the safety checker flagged the image; None without a checker."""
    attempts: tuple[Draw, ...] = ()
    """Draws of the row, in order, in a run with gates: the column ``attempts``."""
    phash: str | None = None
    """Perceptual hash of the image: see :func:`vcf_batch.images.perceptual_hash`."""
    prompt_tokens: int | None = None
    """Number of the prompt's tokens, begin and end included; None if nobody has counted them."""
    prompt_truncated: bool | None = None
    """Whether the end of the prompt or of the negative prompt was cut off; None if nobody has looked, or the row has
    failed."""
    lora_sha256: tuple[str, ...] | None = None
    """Hex SHA-256 of the file of each LoRA, in the order of the setting ``lora``; None without any, or if the row has
    failed."""
    triplet: Mapping[str, bytes] = field(default_factory=dict)
    """The other images of the sample in the same format, by :data:`TRIPLET`, in a run with triplets."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and hex SHA-256 of one file of a shard."""

    size: int
    sha256: str
