"""The table of an output's columns. Schema, JSON, settings, dataset card and reference page are made from it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from vcf_batch.records import SCORES, TEXTURE

Origin = Literal["manifest", "setting", "result"]
Extra = Literal["limits", "lora", "texture"]
"""What not every run has: roles or masks that may limit references, LoRAs, and the score of texture."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of every shard's parquet, which is also a key of every ``KEY.json``."""

    name: str
    type: pa.DataType
    origin: Origin
    """What decides the value: the ``manifest`` alone, a ``setting`` of the row, or the ``result`` of generating it."""
    meaning: str
    """One or two sentences for people, in Markdown."""
    extra: Extra | None = None
    """What a run must have, so that its outputs have this column; None for a column of every run."""


_TEXT, _NUMBER, _COUNT = pa.string(), pa.float64(), pa.int32()
_OBJECTIVE = pa.struct({"first": _NUMBER, "best": _NUMBER, "steps": _COUNT, "stopped": pa.bool_()})
_ATTEMPT = pa.struct({"seed": pa.int64(), **dict.fromkeys(SCORES, _NUMBER), "nsfw": pa.bool_()})

_TABLE = (
    Column("key", _TEXT, "manifest", "The name of the sample, the same in every file."),
    Column("status", _TEXT, "result", "`success`, `rejected` or `failed`. Only `success` has an image."),
    Column("error_message", _TEXT, "result", "The reason why there is no image. Null where there is one."),
    Column("prompt", _TEXT, "manifest", "The text that the image was asked to show."),
    Column(
        "reference",
        _TEXT,
        "manifest",
        "The image that the result was to resemble, or a list of such images. Embedded bytes without a path are named "
        "by their hash, as `sha256:...`. Null means text only.",
    ),
    Column(
        "reference_weights",
        pa.list_(_NUMBER),
        "setting",
        "The share of each reference, summing to 1. Null where there are fewer than two references.",
    ),
    Column(
        "reference_roles",
        pa.list_(_TEXT),
        "setting",
        "What each reference decided on: `all`, `style`, `palette` or `layout`. Null where all had `all`. Only outputs "
        "with roles or masks have this column and the next one.",
        extra="limits",
    ),
    Column(
        "reference_masks",
        pa.list_(_TEXT),
        "manifest",
        "The image that says where in the picture each reference could act, or null for everywhere.",
        extra="limits",
    ),
    Column("negative_reference", _TEXT, "manifest", "An image that the result was not to resemble."),
    Column("seed", pa.int64(), "setting", "The seed of the noise that the image was made from."),
    Column(
        "prompt_tokens",
        _COUNT,
        "result",
        "The number of the prompt's tokens, begin and end included. Text encoders of Stable Diffusion take 77.",
    ),
    Column(
        "prompt_truncated",
        pa.bool_(),
        "result",
        "Whether the end of the prompt or of the negative prompt was cut off, because the text encoder takes fewer "
        "tokens. Null where the row failed.",
    ),
    Column("negative_prompt", _TEXT, "setting", "The text that the image was not to show."),
    Column(
        "fusion",
        _TEXT,
        "setting",
        "How references joined the prompt: `concat`, `naive`, `cross_attention` or `ip_adapter`.",
    ),
    Column("strength", _NUMBER, "setting", "The weight of the references. 0 means text only."),
    Column(
        "fusion_lo",
        _NUMBER,
        "setting",
        "The lower end of the part of the schedule that used references. 0 is the finished image.",
    ),
    Column(
        "fusion_hi",
        _NUMBER,
        "setting",
        "The upper end of the part of the schedule that used references. 1 is pure noise.",
    ),
    Column(
        "unconditional",
        _TEXT,
        "setting",
        "What guidance led away from besides the negative prompt: `zeros`, the look of a `blank` image, or the "
        "`negative` reference.",
    ),
    Column("image_tokens", _TEXT, "setting", "The tokens of a reference that were used: `all`, `patches` or `cls`."),
    Column(
        "lora",
        pa.list_(_TEXT),
        "setting",
        "The LoRAs that the image was made with, each a name of the run or a file, with `:` and its scale. Null means "
        "none. Only outputs with LoRAs have this column and the next one.",
        extra="lora",
    ),
    Column(
        "lora_sha256",
        pa.list_(_TEXT),
        "result",
        "The SHA-256 of the file of each LoRA, in hex. Null where the row failed.",
        extra="lora",
    ),
    Column("guidance_scale", _NUMBER, "setting", "The scale of classifier-free guidance. 1 means no guidance."),
    Column(
        "guidance_lo",
        _NUMBER,
        "setting",
        "The lower end of the part of the schedule that was guided. 0 is the finished image.",
    ),
    Column(
        "guidance_hi", _NUMBER, "setting", "The upper end of the part of the schedule that was guided. 1 is pure noise."
    ),
    Column(
        "deep_cache",
        _COUNT,
        "setting",
        "N: the deep blocks of the UNet were computed in every Nth step only. 1 means in every step.",
    ),
    Column("steps", _COUNT, "setting", "The number of denoising steps."),
    Column("scheduler", _TEXT, "setting", "The sampler of the denoising steps: `ddim`, `dpm++` or `euler`."),
    Column("eta", _NUMBER, "setting", "The share of new noise in each step of `ddim`, 0 to 1."),
    Column("pno_steps", _COUNT, "setting", "The number of updates of prompt-noise optimisation. 0 means none."),
    Column(
        "pno_objective",
        _OBJECTIVE,
        "result",
        "The loss before prompt-noise optimisation and of the image that was kept, the updates taken, and whether it "
        "stopped early. Null without it.",
    ),
    Column("width", _COUNT, "result", "The width of the image in pixels."),
    Column("height", _COUNT, "result", "The height of the image in pixels."),
    Column("sha256", _TEXT, "result", "The SHA-256 of the image file, in hex."),
    Column("phash", _TEXT, "result", "A perceptual hash of 64 bits, in hex. Similar images differ in few bits."),
    Column(
        "clip_score", _NUMBER, "result", "How well the image fits the prompt, by the judge, -1 to 1. Higher is better."
    ),
    Column(
        "clip_reference",
        _NUMBER,
        "result",
        "How much the image resembles the reference, by the judge, -1 to 1. The same object counts as much as the same "
        "looks. Higher is better.",
    ),
    Column("lpips", _NUMBER, "result", "The perceptual distance of image and reference. Lower is better."),
    Column(
        "content_alignment",
        _NUMBER,
        "result",
        "How alike the layouts of image and text-only twin are, by the judge, -1 to 1. Higher is better.",
    ),
    Column(
        "style_similarity",
        _NUMBER,
        "result",
        "How alike the channel statistics of image and reference are, 0 to 1: above all their palettes. Higher is "
        "better.",
    ),
    Column(
        TEXTURE,
        _NUMBER,
        "result",
        "How alike image and reference are drawn, whatever their colours: about -1 to 1. Higher is better. Only runs "
        "with `--texture` have this column.",
        extra="texture",
    ),
    Column(
        "nsfw", pa.bool_(), "result", "Whether the safety checker flagged the image. Null without a safety checker."
    ),
    Column(
        "attempts",
        pa.list_(_ATTEMPT),
        "result",
        "Seed and scores of every image that the row got. Null in a run without gates.",
    ),
)

COLUMNS: Mapping[str, Column] = {column.name: column for column in _TABLE}
"""All columns that a shard's parquet may have by name, in order. The manifest's carried columns follow. They may not
reuse these names."""


def columns_of(extras: Collection[Extra | None] = ()) -> dict[str, Column]:
    """The columns that the parquet of a run has, in order.

    Args:
        extras: what the run has that others do not have: :func:`vcf_batch.setup.job.schema_of`.
    """
    return {name: column for name, column in COLUMNS.items() if column.extra is None or column.extra in extras}


SETTINGS = tuple(column.name for column in _TABLE if column.origin == "setting")
"""The names of the columns that say what a row was generated with."""
