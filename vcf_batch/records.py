"""The vocabulary every signature uses: Row, Lora, Shard, Scores, Sample."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vcf_batch.errors import UsageError, redact_name

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

    ``data``, when present, is the image itself and the URI is not opened.
    """

    uri: str | None = None
    data: bytes | None = None
    sha256: str | None = None
    """Hex SHA-256 that the image's bytes must have; None if they may be any."""

    @property
    def name(self) -> str:
        """What the output records: the URI, or ``sha256:`` and the hash of embedded bytes that have none."""
        if self.uri is not None:
            return self.uri
        assert self.data is not None
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


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


LORA_SUFFIX = ".safetensors"
MAX_LORA_SCALE = 10.0
"""Largest scale of a LoRA. The smallest is its negative."""
MAX_LORAS = 8
"""Largest number of LoRAs of a row."""
MAX_LORA_BYTES = 2 << 30
"""Largest file of a LoRA. Published ones of rank 128 for Stable Diffusion XL have about 900 MB."""

_LORA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+").fullmatch
_SHOWN = 200


class Lora(NamedTuple):
    """A LoRA (Hu et al. 2021, arXiv 2106.09685) and the scale that its weights are added with."""

    source: str
    """Name of one of the run's LoRAs, or the path or URL of a file."""
    scale: float | None
    """None where none is given: that of the run's LoRA, or 1."""

    @property
    def is_file(self) -> bool:
        """Whether the source is a file, rather than the name of one of the run's LoRAs."""
        return _is_lora_file(self.source)

    def shown(self) -> str:
        """Source and scale as outputs show them, without secrets."""
        return f"{redact_name(self.source)}:{1.0 if self.scale is None else self.scale:.12g}"


def parse_lora(text: str) -> Lora:
    """Take ``SOURCE[:SCALE]`` apart.

    Raises:
        UsageError: the source is neither a safetensors file nor a name, or the scale is no number or out of its limits.
    """
    source, scale = text, None
    head, _, tail = text.rpartition(":")
    # A colon in the query of an address may be its own.
    if (
        not text.endswith(LORA_SUFFIX)
        and (_is_lora_file(head) or _LORA_NAME.fullmatch(head))
        and ("?" not in head or _NUMBER(tail))
    ):
        source, scale = head, _lora_scale(text, tail)
    if not _is_lora_file(source) and not _LORA_NAME.fullmatch(source):
        shown = repr(redact_name(source)[:_SHOWN])
        raise UsageError(
            f"lora is {shown}, which is no {LORA_SUFFIX} file: name a file of that kind, and convert a pickle (.pt, "
            ".bin, .ckpt), which may run code, where you trust it"
        )
    return Lora(source, scale)


def _parse_named(text: str) -> tuple[str, Lora]:
    """Take ``NAME=URL[:SCALE]`` apart, as ``--lora`` has it.

    Raises:
        UsageError: there is no such name, or see :func:`parse_lora`.
    """
    name, equals, rest = text.partition("=")
    if not equals or not _LORA_NAME.fullmatch(name):
        raise UsageError(
            f"lora is {redact_name(text)[:_SHOWN]!r}; it must be NAME=URL[:SCALE], such as ink=ink.safetensors:0.8, "
            "with a name of 1 to 64 of the characters A-Z a-z 0-9 _ -"
        )
    lora = parse_lora(rest)
    if not lora.is_file:
        raise UsageError(f"lora {name} is {lora.source!r}, which is no {LORA_SUFFIX} file: name the file after {name}=")
    return name, Lora(lora.source, 1.0 if lora.scale is None else lora.scale)


def named_loras(texts: tuple[str, ...]) -> dict[str, Lora]:
    """The LoRAs of a run by their names, in the order of these.

    Raises:
        UsageError: a name occurs twice, or see :func:`parse_lora`.
    """
    named: dict[str, Lora] = {}
    for name, lora in map(_parse_named, texts):
        if name in named:
            raise UsageError(f"lora {name} is named twice; give each LoRA a name of its own")
        named[name] = lora
    if len(named) > MAX_LORAS:
        raise UsageError(f"lora has {len(named)} values; the limit is {MAX_LORAS}")
    return dict(sorted(named.items()))


def settled_loras(own: tuple[Lora, ...] | None, run: Mapping[str, Lora]) -> tuple[Lora, ...]:
    """The LoRAs that a row is generated with, in an order that does not depend on the row's.

    Args:
        own: the row's own; None for all of the run's, and empty for none.
        run: the run's LoRAs by name.
    """
    if own is None:
        return tuple(Lora(name, lora.scale) for name, lora in sorted(run.items()))
    default = {name: lora.scale for name, lora in run.items()}
    scaled = (lora._replace(scale=default.get(lora.source, 1.0)) if lora.scale is None else lora for lora in own)
    return tuple(sorted(scaled))


def _is_lora_file(text: str) -> bool:
    return text.partition("?")[0].endswith(LORA_SUFFIX) and text.partition("?")[0] != LORA_SUFFIX


def _lora_scale(text: str, number: str) -> float:
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= MAX_LORA_SCALE:
        raise UsageError(
            f"the scale of lora {redact_name(text)[:_SHOWN]!r} is {number[:_SHOWN]!r}; it must be a number between "
            f"{-MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g}"
        )
    return scale + 0.0  # -0.0 and 0.0 are one scale
