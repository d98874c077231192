"""RunConfig: the settings of one run, validated once, and the fingerprint that names its content."""

import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml

from vcf_batch.errors import ModelError, UsageError, redact, redact_name
from vcf_batch.records import Lora, named_loras

ALIGNED_FUSIONS = ("naive", "concat", "cross_attention")
"""Fusions of the tokens that an aligner gives: the paper's."""
IP_ADAPTER = "ip_adapter"
"""The fusion by the published weights of an IP-Adapter, which needs no aligner."""
FUSIONS = (*ALIGNED_FUSIONS, IP_ADAPTER)
ROLES = ("all", "style", "palette", "layout")
"""What a reference may decide on: :mod:`vcf_batch.vcf.roles.role`. ``all`` is no limit."""
ROLED_FUSIONS = ("concat", IP_ADAPTER)
"""Fusions that keep the tokens of references apart, so that roles and masks can limit them."""
ADAPTED_ROLES = ("all", "style", "layout")
"""Roles of the fusion ``ip_adapter``. Its tokens have no projections, and without one nothing tells ``palette`` from
``style``."""
UNCONDITIONALS = ("zeros", "blank", "negative")
IMAGE_TOKENS = ("all", "patches", "cls")
SCHEDULERS = ("ddim", "dpm++", "euler")
LONG_PROMPTS = ("truncate", "refuse", "chunk")
MAX_WINDOWS = 16
"""Largest number of windows of a prompt that is encoded in windows (``long_prompts="chunk"``)."""
IMAGE_FORMATS = ("png", "webp", "jpg")
LOG_FORMATS = ("text", "json")
VERBOSITIES = ("quiet", "normal", "verbose")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PAIRINGS = ("cross", "random", "balanced")
LPIPS_NETWORKS = ("auto", "alex", "vgg", "none")

GATES: Mapping[str, str] = {
    "min_clip_score": "clip_score",
    "min_clip_reference": "clip_reference",
    "max_lpips": "lpips",
    "min_content_alignment": "content_alignment",
    "min_style_similarity": "style_similarity",
}
"""Settings that limit the scores of samples, each with its score."""

FALSE_ACCEPTS = (0.01, 0.05, 0.1)
"""Shares of false accepts that a calibration has thresholds for, and that a gate may name."""

DEFAULT_STEPS = 50
DEFAULT_GUIDANCE_SCALE = 9.0
DEFAULT_STRENGTHS: Mapping[str, float] = {"naive": 0.3, "concat": 1.0, "cross_attention": 0.3, "ip_adapter": 1.0}
"""Defaults for a model that recommends nothing (``default_...`` in its model_index.json). Strengths are the paper's;
that of ``ip_adapter`` is diffusers'."""

REFERENCE_PARTS = ("aligner", "image_encoder", "feature_extractor")
"""Parts that a model needs for references, besides Stable Diffusion's own parts."""

DIFFUSERS_NAMES: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "ip_adapter_scale": "strength",
    "sampler": "scheduler",
    "generator": "seed",
    "torch_dtype": "dtype",
    "variant": "dtype",
    "pretrained_model_name_or_path": "model",
    "image_size": "height",
    "resolution": "height",
    "original_size": "original_height",
    "target_size": "target_height",
    "crops_coords_top_left": "crop_top",
    "output_type": "image_format",
    "num_images_per_prompt": "attempts",
}
"""Settings of diffusers and of programs like it, each with the setting of a run that is closest to it."""

MAX_BATCH_SIZE = 4096
MAX_STEPS = 1000
MAX_PNO_STEPS = 1000
MAX_ATTEMPTS = 100
MAX_SEED = 2**63 - 1
MAX_DEEP_CACHE = 1000
MAX_GUIDANCE_SCALE = 1000.0
MAX_STRENGTH = 1000.0
MAX_WEIGHT = 1000.0
"""Largest weight of a reference."""
MAX_PIXELS = 178_000_000
"""Largest number of pixels of a reference. Pillow itself opens nothing larger."""
MAX_EDGE = 8192
"""Longest edge of an output image, in pixels."""
MIN_EDGE = 32
"""Shortest edge of an output image, in pixels. The perceptual networks cannot take less."""


TOLD_SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
"""Sizes in pixels that a Stable Diffusion XL is told, in the order of its time ids."""
MAX_TOLD_SIZE = 16384


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The way from noise to an image, as all samples of a batch take it.

    Raises:
        UsageError: a value is outside its limits.
    """

    guidance_lo: float = 0.0
    """Start of the guided part of the schedule, as a fraction t / 999; 1 is pure noise. The part ends at
    ``guidance_hi``, both included. In other steps the unconditional side is not computed, which halves their
    operations."""
    guidance_hi: float = 1.0
    deep_cache: int = 1
    """Number N of steps that share one output of the UNet's deep blocks: they are computed only in every Nth step. 1
    computes them in every step."""
    steps: int | None = None
    """Number of denoising steps. None is the model's recommendation."""
    scheduler: str | None = None
    """One of :data:`SCHEDULERS`. None is the pipeline's own scheduler, which no run uses."""
    eta: float = 0.0
    """Share of new noise in each step, 0 to 1. Only ``ddim`` takes another value than 0."""
    height: int | None = None
    """Height of an image in pixels. None is the model's native size."""
    width: int | None = None
    original_height: int | None = None
    """Height of the picture before any cropping, as a Stable Diffusion XL is told; small ones make blurred images. None
    is that of the image. Other models are told none of these sizes."""
    original_width: int | None = None
    crop_top: int = 0
    """Number of rows of pixels cut off at the top, as a Stable Diffusion XL is told."""
    crop_left: int = 0
    target_height: int | None = None
    """Height of the picture that is meant, as a Stable Diffusion XL is told. None is that of the image."""
    target_width: int | None = None

    def __post_init__(self) -> None:
        for name in TOLD_SIZES:
            _between(name, getattr(self, name), 0 if name.startswith("crop") else 1, MAX_TOLD_SIZE)
        _between("guidance_lo", self.guidance_lo, 0, 1)
        _between("guidance_hi", self.guidance_hi, self.guidance_lo, 1)
        _between("deep_cache", self.deep_cache, 1, MAX_DEEP_CACHE)
        _between("steps", self.steps, 1, MAX_STEPS)
        if self.scheduler is not None:
            _choice("scheduler", self.scheduler, SCHEDULERS)
        _between("eta", self.eta, 0, 1)
        if self.eta and self.scheduler not in (None, "ddim"):
            raise UsageError(f"eta is {self.eta:g}; the scheduler {self.scheduler!r} takes 0 only: use ddim")

    @property
    def told_sizes(self) -> list[str]:
        """The names of :data:`TOLD_SIZES` that differ from their default."""
        return [name for name in TOLD_SIZES if getattr(self, name) != getattr(Sampling, name)]

    @property
    def added_noises(self) -> int:
        """Number of noises that a sample needs besides its initial one. Its number of steps is given."""
        return (self.steps or 0) if self.eta else 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of ``vcf-batch generate``. Field names are the command's options.

    Raises:
        UsageError: a value is outside its limits.
    """

    manifest: str
    output: str
    model: str | None = None
    """The model that generates: see :func:`vcf_batch.models.resolution.resolve`. None is the embedded ``tiny``, and
    refuses a run with prompts that it cannot draw: :mod:`vcf_batch.setup.default_model`."""
    revision: str | None = None
    fusion: str = "concat"
    strength: float | None = None
    """Weight of the references in rows without a strength of their own; 0 is text only. A given value counts for
    every fusion. None is the default of model and fusion: :func:`default_strengths`."""
    fusion_lo: float = 0.0
    """Start of the part of the schedule that uses references, as a fraction; 1 is pure noise. It ends at
    ``fusion_hi``."""
    fusion_hi: float = 1.0
    role: str = "all"
    """What references decide on, in rows without roles of their own: one of :data:`ROLES`."""
    ip_adapter: str | None = None
    """Weights of an IP-Adapter, for the fusion ``ip_adapter``: :func:`vcf_batch.models.adapters.resolve_adapter`."""
    image_encoder: str | None = None
    """The CLIP vision tower that the IP-Adapter was trained with. None is the folder ``image_encoder`` beside it."""
    lora: tuple[str, ...] = ()
    """LoRAs of the rows that name none of their own, all of them at once: texts ``NAME=URL[:SCALE]``. Rows may name one
    by its name, too: docs/models.md."""
    unconditional: str = "zeros"
    """Image tokens of the unconditional side of the guidance, in rows without a negative reference: ``zeros``, or the
    tokens of a ``blank`` image. ``negative`` is ``zeros``, and requires a manifest with negative references."""
    image_tokens: str | None = None
    """Image tokens that are used: ``all``, ``patches`` or ``cls``. None is the aligner's own choice."""
    steps: int | None = Sampling.steps
    """Number of denoising steps: see :class:`Sampling`, which describes each setting that takes its default from
    there."""
    guidance_scale: float | None = None
    """Scale of the classifier-free guidance. None is the model's recommendation."""
    guidance_lo: float = Sampling.guidance_lo
    guidance_hi: float = Sampling.guidance_hi
    deep_cache: int = Sampling.deep_cache
    """Number of steps that share deep blocks: see :class:`Sampling`. Rows with prompt-noise optimisation have 1."""
    scheduler: str = "ddim"
    eta: float = Sampling.eta
    pno_steps: int = 0
    """Number of updates of conditioning and noise that bring each image closer to its reference. 0 is none."""
    pno_guide: str | None = None
    """The CLIP that prompt-noise optimisation follows, never the judge. None is the model's own image encoder."""
    pno_lr_conditioning: float = 1e-2
    pno_lr_noise: float = 1e-2
    pno_gamma: float = 0.1
    """Weight of the term that keeps the noise normal."""
    height: int | None = Sampling.height
    """Height of an image in pixels, a multiple of 8."""
    width: int | None = Sampling.width
    original_height: int | None = Sampling.original_height
    original_width: int | None = Sampling.original_width
    crop_top: int = Sampling.crop_top
    crop_left: int = Sampling.crop_left
    target_height: int | None = Sampling.target_height
    target_width: int | None = Sampling.target_width
    dtype: str = "auto"
    """Number type of the networks. ``auto`` is bfloat16 where workers have GPUs, else float32. A GPU without bfloat16
    refuses the run."""
    compile: bool = False
    """Compile UNet and VAE decoder for each shape. The rounding changes, and a shape that is not cached takes
    minutes."""
    negative_prompt: str = ""
    batch_size: int | None = 8
    """Number of images sampled at once. None is the size that the run in the output began with, else the fastest size
    that memory holds, measured on the first worker."""
    shard_size: int | None = None
    """Number of rows in a shard. None is about ten minutes of one worker, at most."""
    reference_root: tuple[str, ...] = ()
    """Folders, buckets or web addresses that references may live under, besides the manifest's own folder."""
    max_pixels: int = 64_000_000
    """Largest number of pixels of a reference. A larger one fails its row before it is decoded."""
    max_failed: float = 0.0
    """Largest fraction of failed rows that still exits with 0."""
    judge: str | None = None
    """The CLIP that scores. None is the model's own: the embedded judge for ``tiny``, else CLIP ViT-B/32."""
    lpips: str = "auto"
    lpips_weights: str | None = None
    """Folder or URL with the official backbone and linear-head files, for ``alex`` and ``vgg``."""
    min_clip_score: float | str | None = None
    """Smallest CLIP score of a sample that is not rejected; None is no limit. :data:`GATES` lists every limit. A text
    such as ``far=0.05`` is the limit that a share of :data:`FALSE_ACCEPTS` keeps by mistake, by the ``calibration``;
    the number is settled before the run."""
    min_clip_reference: float | str | None = None
    max_lpips: float | str | None = None
    min_content_alignment: float | str | None = None
    min_style_similarity: float | str | None = None
    calibration: str | None = None
    """File that ``vcf-batch score --calibrate`` has written, for gates that name a share of false accepts."""
    texture: bool = False
    """Measure ``texture_similarity``, in a column of its own."""
    triplets: bool = False
    """Write each sample's text-only twin from the same noise, and its reference, beside it."""
    safety_checker: str | None = None
    """Model that flags images that are not safe for work, to reject them. ``own`` is the one that comes with the
    model."""
    attempts: int = 1
    """Largest number of images that a row gets, each from another seed, until one passes the gates."""
    best_by: str = "clip_score"
    """Score that decides which attempt at a rejected row is recorded."""
    long_prompts: str = "truncate"
    """What becomes of a row whose prompt or negative prompt has more tokens than the text encoder takes: one of
    :data:`LONG_PROMPTS`. ``truncate`` cuts off the rest, ``refuse`` fails the row, and ``chunk`` encodes the text in
    windows (:meth:`vcf_batch.vcf.pipeline.VCFPipeline.encode_windows`)."""
    image_format: str = "png"
    mark: bool = True
    """Mark every image as synthetic, with its settings: :mod:`vcf_batch.output.marking`."""
    seed: int = 0
    limit: int | None = None
    rows: str | None = None
    """Part ``A:B`` of the manifest that is generated: the rows with the numbers A to B - 1. None is all of it. ``0:B``
    becomes ``limit``."""
    prompt_column: str | None = None
    """The manifest's column that is read as ``prompt``; None is the one of that name."""
    reference_column: str | None = None
    id_column: str | None = None
    """The column that is read as ``sample_id``."""
    seed_column: str | None = None
    carry: tuple[str, ...] = ()
    """Columns that are carried through though their names suggest another meaning. They are refused without it, so it
    changes no output."""
    num_workers: int | None = None
    """Number of workers. None is one for each GPU of the cluster, or one for ``cpus_per_worker`` CPUs where it has
    none."""
    gpus_per_worker: float | None = None
    """Number of GPUs of a worker. None is the number that the run in the output began with, else 1 where the cluster
    has a GPU now, else 0."""
    cpus_per_worker: int = 1
    """Number of CPUs reserved for a worker, and of its threads on a machine without GPUs."""
    one_device_type: bool = False
    """Use workers of one device type only: the one with the most rows in the output, else that of the first worker that
    loads. Nodes of other types are left out."""
    allow_smaller_batches: bool = False
    """Sample fewer rows at once where the GPU's memory does not hold a batch. The receipt says so, and such shards are
    outside of the promise of identical bytes."""
    stall_timeout: float | None = None
    """Seconds without a heartbeat (a denoising step, a reference, a sample, a part of a file) after which a worker
    counts as hung and is killed; an hour at least while it loads. None is ten minutes, or the estimated time of twenty
    denoising steps of a batch if that is longer."""
    profile: bool = False
    """Record a trace of one shard's first batches."""
    log_format: str = "text"
    verbosity: str = "normal"
    """What the log has: warnings and errors (``quiet``), progress too, or each finished shard as well (``verbose``)."""
    address: str | None = None
    """Address of the Ray cluster. None is the one of this process or of this machine, else a new local one."""
    default_strengths: dict[str, float] | None = None
    """Strength of rows without one of their own, by their fusion; ``strength`` is then that of ``fusion``. It is no
    option: :func:`vcf_batch.setup.defaults.settle` fills it in where ``strength`` was left open."""

    def __post_init__(self) -> None:
        for name in LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        # One spelling of what is read anyway.
        for name, column in COLUMN_SETTINGS.items():
            if getattr(self, column) == name:
                object.__setattr__(self, column, None)
        # One spelling of a number, as 5 and 5.0 would be two fingerprints.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (float, float | None, float | str | None) and isinstance(value, int | float):
                object.__setattr__(self, field.name, float(value))
        if self.rows is not None:
            part = part_of(self.rows)
            if self.limit is not None:
                raise UsageError(
                    f"rows is {self.rows}, and limit is {self.limit}, which is another part of the manifest: leave one "
                    "of them out"
                )
            object.__setattr__(self, "rows", f"{part.start}:{part.stop}" if part.start else None)
            object.__setattr__(self, "limit", None if part.start else part.stop)
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                # A shell variable that is not set gives an empty text, which as a place would be the working directory.
                if isinstance(text, str) and ("\0" in text or (not text and name != "negative_prompt")):
                    raise UsageError(f"{name} is {text!r}; give a value without NUL characters, or leave it out")
        _choice("fusion", self.fusion, FUSIONS)
        if self.fusion == IP_ADAPTER and self.ip_adapter is None:
            raise UsageError(
                "fusion is ip_adapter, but no IP-Adapter is named: name its weights with --ip-adapter, such as "
                "ip-adapter-sd15 ('vcf-batch model list' has all names)"
            )
        if self.image_encoder is not None and self.ip_adapter is None:
            raise UsageError(
                f"image_encoder is {_SHORT.repr(self.image_encoder)}, which is for an IP-Adapter: name its weights "
                "with --ip-adapter, or leave it out"
            )
        named_loras(self.lora)
        _choice("role", self.role, ROLES)
        if self.role != "all" and self.fusion not in ROLED_FUSIONS:
            raise UsageError(
                f"role is {self.role}, and the fusion {self.fusion} cannot limit references: use --fusion "
                f"{' or '.join(ROLED_FUSIONS)}, or leave the role out"
            )
        if self.fusion == IP_ADAPTER and self.role not in ADAPTED_ROLES:
            raise UsageError(f"role is {self.role}; with the fusion ip_adapter it must be {', '.join(ADAPTED_ROLES)}")
        _choice("unconditional", self.unconditional, UNCONDITIONALS)
        if self.image_tokens is not None:
            _choice("image_tokens", self.image_tokens, IMAGE_TOKENS)
        _choice("long_prompts", self.long_prompts, LONG_PROMPTS)
        _choice("image_format", self.image_format, IMAGE_FORMATS)
        _choice("dtype", self.dtype, DTYPES)
        _choice("log_format", self.log_format, LOG_FORMATS)
        _choice("verbosity", self.verbosity, VERBOSITIES)
        _choice("lpips", self.lpips, LPIPS_NETWORKS)
        _choice("scheduler", self.scheduler, SCHEDULERS)
        _between("strength", self.strength, 0, MAX_STRENGTH)
        if self.default_strengths is not None:
            if sorted(self.default_strengths) != sorted(FUSIONS):
                raise UsageError(
                    f"default_strengths has {', '.join(self.default_strengths)}; it must have {', '.join(FUSIONS)}"
                )
            for fusion, strength in self.default_strengths.items():
                _between(f"the default strength of {fusion}", strength, 0, MAX_STRENGTH)
            if self.strength != self.default_strengths[self.fusion]:
                raise UsageError(
                    f"strength is {self.strength}, and default_strengths has {self.default_strengths[self.fusion]} for "
                    f"{self.fusion}; give strength alone, or neither"
                )
        _between("fusion_lo", self.fusion_lo, 0, 1)
        _between("fusion_hi", self.fusion_hi, self.fusion_lo, 1)
        _between("guidance_scale", self.guidance_scale, 0, MAX_GUIDANCE_SCALE)
        # Making a Sampling checks the limits of its settings.
        if self.sampling.deep_cache > 1 and self.compile:
            raise UsageError(
                f"deep_cache is {self.deep_cache}, which cannot be compiled: leave out --compile or --deep-cache"
            )
        _between("pno_steps", self.pno_steps, 0, MAX_PNO_STEPS)
        for name in ("pno_lr_conditioning", "pno_lr_noise", "pno_gamma"):
            _between(name, getattr(self, name), 0, 1)
        for name, score in GATES.items():
            limit = getattr(self, name)
            if isinstance(limit, str):
                self._check_share(name, limit)
            else:
                _between(name, limit, *((0, None) if score == "lpips" else (-1, 1)))
        _choice("best_by", self.best_by, tuple(GATES.values()))
        _between("attempts", self.attempts, 1, MAX_ATTEMPTS)
        if self.best_by != "clip_score" and not self.is_gated:
            raise UsageError(
                f"best_by is {self.best_by}, but nothing is rejected: set one of {', '.join(GATES)} or safety_checker, "
                "or leave best_by out"
            )
        if self.attempts > 1 and not self.is_gated:
            raise UsageError(
                f"attempts is {self.attempts}, but nothing is asked of them: set one of {', '.join(GATES)} or "
                "safety_checker, or leave attempts at 1"
            )
        if self.min_content_alignment is not None and not self.triplets:
            raise UsageError(
                f"min_content_alignment is {self.min_content_alignment}, but only --triplets draw what the content "
                "is compared with: add them, or leave the gate out"
            )
        _between("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        _between("shard_size", self.shard_size, 1, 1_000_000)
        _between("max_pixels", self.max_pixels, 1, MAX_PIXELS)
        _between("max_failed", self.max_failed, 0, 1)
        _between("limit", self.limit, 1, None)
        for column, count in Counter(self.columns.values()).items():
            if count > 1:
                raise UsageError(f"column {column!r} is named for {count} meanings; give each its own column")
        _between("num_workers", self.num_workers, 1, None)
        _between("gpus_per_worker", self.gpus_per_worker, 0, 16)
        _between("cpus_per_worker", self.cpus_per_worker, 1, 1024)
        _between("stall_timeout", self.stall_timeout, 1, None)
        _between("seed", self.seed, 0, MAX_SEED)
        for name in ("height", "width"):
            _between(name, getattr(self, name), MIN_EDGE, MAX_EDGE)
            if (getattr(self, name) or 0) % 8:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be a multiple of 8")
        if self.lpips in ("alex", "vgg") and not self.lpips_weights:
            raise UsageError(
                f"lpips is {self.lpips!r}, which needs the published weights: name their folder with --lpips-weights, "
                "or turn the score off with --lpips none"
            )

    def _check_share(self, name: str, limit: str) -> None:
        """Refuse a gate in words that names no share of false accepts, or that nothing gives a number."""
        if limit not in {f"far={share:g}": share for share in FALSE_ACCEPTS}:
            shares = ", ".join(f"far={share:g}" for share in FALSE_ACCEPTS)
            raise UsageError(f"{name} is {_SHORT.repr(limit)}; it must be a number, or one of {shares}")
        if self.calibration is None:
            raise UsageError(
                f"{name} is {limit}, which a calibration gives its number: name the file that 'vcf-batch score OUTPUT "
                "--calibrate' writes with --calibration, or give a number"
            )

    @property
    def sampling(self) -> Sampling:
        """The settings of :class:`Sampling`."""
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})

    @property
    def columns(self) -> dict[str, str]:
        """The manifest's columns that are read in place of others, by the names of those: ``{"prompt": "caption"}``."""
        return {name: column for name, field in COLUMN_SETTINGS.items() if (column := getattr(self, field)) is not None}

    @property
    def loras(self) -> dict[str, Lora]:
        """The run's LoRAs by their names, each with its scale."""
        return named_loras(self.lora)

    @property
    def part(self) -> range | None:
        """Numbers of the manifest's rows that :attr:`rows` names; None if it names none."""
        return None if self.rows is None else part_of(self.rows)

    @property
    def gates(self) -> dict[str, float]:
        """The gates that are set, by the names of :data:`GATES`. They are numbers once defaults are settled."""
        return {name: limit for name in GATES if (limit := getattr(self, name)) is not None}

    @property
    def is_gated(self) -> bool:
        """Whether samples may be rejected, by a gate or the safety checker."""
        return bool(self.gates) or self.safety_checker is not None

    def strength_of(self, fusion: str) -> float:
        """The strength of rows with this fusion and no strength of their own. Known once defaults are settled."""
        strength = self.strength if self.default_strengths is None else self.default_strengths[fusion]
        assert strength is not None
        return strength

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Build from option names and values, as a YAML file or the command line gives them.

        Raises:
            UsageError: an unknown name, a missing one, or a value outside its limits.
        """
        return cls(**checked_values(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in LISTS}

    def to_record(self) -> dict[str, Any]:
        """The configuration as plain JSON types, and without credentials in URLs."""
        return {name: _redacted(value) for name, value in self.to_dict().items()}

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def checked_values(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of a configuration, a dataclass such as :class:`RunConfig`. Paths become texts.

    Raises:
        UsageError: an unknown name, a missing one, or a value of another type than its field's.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        known = [name for name in fields if name not in SETTLED]
        found = meant(unknown[0], known)
        hint = f"did you mean {' or '.join(found)}?" if found else f"known are: {', '.join(known)}"
        raise UsageError(f"unknown setting {_SHORT.repr(unknown[0])}; {hint}")
    required = (name for name, field in fields.items() if field.default is dataclasses.MISSING)
    missing = [name for name in required if not values.get(name)]
    if missing:
        raise UsageError(f"{missing[0]} is missing: give it on the command line or in the configuration file")
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
    for name, value in given.items():
        expected = fields[name].type
        if not _is_a(value, expected):
            raise UsageError(f"{name} is {_SHORT.repr(value)}; it must be {_in_words(expected)}")
    return given


_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_settings_of(kind: type, left_out: frozenset[str] = frozenset()) -> Callable[[_Function], _Function]:
    """Give a function with ``**settings`` the signature of a configuration, for ``help()`` and editors.

    Args:
        kind: the configuration, a dataclass.
        left_out: fields that the function decides itself.
    """

    def decorate(function: _Function) -> _Function:
        own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
        names = {each.name for each in own} | left_out | SETTLED
        settings = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=field.type,
            )
            for field in dataclasses.fields(kind)
            if field.name not in names
        ]
        signature = inspect.signature(function).replace(parameters=[*own, *settings])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


COLUMN_SETTINGS = {
    "prompt": "prompt_column",
    "reference": "reference_column",
    "sample_id": "id_column",
    "seed": "seed_column",
}
"""Settings that name a column of the manifest, by the column that it is read as."""

_PART = re.compile(r"([0-9]{1,18}):([0-9]{1,18})")
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # aliases can make a few lines of YAML very deep and wide
_SHORT.maxstring = 1000

LISTS = ("reference_root", "carry", "lora")
"""Settings of :class:`RunConfig` that may have several values."""

SETTLED = frozenset({"default_strengths"})
"""Fields of :class:`RunConfig` that are no options: only the settling of defaults fills them in."""

EVALUATED_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Strengths of ``concat``, and of an IP-Adapter, that are evaluated, and tried for an aligner; 1 is the paper's."""

DECIDED_BY_EVALUATION = frozenset(
    {
        *("manifest", "output", *COLUMN_SETTINGS.values(), "carry"),
        *("fusion", "strength", "role", "pno_steps", "seed", "limit", "rows"),
        *("triplets", "safety_checker", "attempts", "best_by", "calibration", *GATES),
    }
)
"""Settings of a run that an evaluation decides: what is compared is not selected."""

NOT_CONTENT = frozenset(
    {
        "output",
        "manifest",
        "model",
        "revision",
        "judge",
        "pno_guide",
        "safety_checker",
        "ip_adapter",
        "image_encoder",
        "lora",
        "lpips_weights",
        "calibration",
        "num_workers",
        "gpus_per_worker",
        "one_device_type",
        "allow_smaller_batches",
        "stall_timeout",
        "profile",
        "address",
        "max_failed",
        "log_format",
        "verbosity",
        "carry",
    }
)
"""Settings that change neither the content of an output nor its layout. Manifest and models count by their
identity, not by their name."""

ADDED_SETTINGS: dict[str, Any] = {
    "texture": False,
    "role": "all",
    "rows": None,
    **{name: 0 if name.startswith("crop") else None for name in TOLD_SIZES},
}
"""Settings added after 0.2.0, each with the value that means the behaviour before it.

A setting stays out of the fingerprint while it has that value, so that a half-done run resumes under the next version.
Fields without the setting are read as if they had that value: :func:`field_of`. A setting is never removed from
this table."""


def fingerprint_fields(
    config: RunConfig,
    *,
    manifest: str,
    model: str,
    judge: str,
    lpips: str,
    pno_guide: str | None,
    safety_checker: str | None,
    ip_adapter: str | None,
    lora: str | None = None,
) -> dict[str, Any]:
    """The settings and identities that change a run's content or layout, as plain JSON types.

    Args:
        config: the run, with every default resolved (no ``auto``, no None where the model decides).
        manifest, model, judge, lpips, pno_guide, safety_checker, ip_adapter: exact identities: hashes or revisions,
            not names. The guide is None where nothing is guided.
        lora: names, identities and scales of the run's LoRAs; None without any, as in every run before there were some.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_CONTENT}
    # The roots decide which rows fail, in any order. The fields are published, so credentials are left out.
    fields["reference_root"] = sorted(map(redact_name, config.reference_root))
    ids = {"manifest": manifest, "model": model, "judge": judge, "lpips": lpips, "pno_guide": pno_guide}
    ids |= {"safety_checker": safety_checker, "ip_adapter": ip_adapter}
    ids |= {} if lora is None else {"lora": lora}
    fields |= {f"{name}_id": identity for name, identity in ids.items()}
    as_before = {name for name, value in ADDED_SETTINGS.items() if fields[name] == value}
    return {name: value for name, value in fields.items() if name not in as_before}


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """Value of one of :func:`fingerprint_fields`; None if neither they nor :data:`ADDED_SETTINGS` have it."""
    return fields.get(name, ADDED_SETTINGS.get(name))


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hex SHA-256 of :func:`fingerprint_fields`: the name of a run's content."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def default_strengths(aligner: Mapping[str, Any] | None, model: Mapping[str, Any]) -> dict[str, float]:
    """The strength of each fusion where none is given.

    The aligner's own ``default_strength`` is that of ``concat``, or else the model's.

    Args:
        aligner: configuration of the model's aligner, ``aligner/config.json``; None without an aligner.
        model: configuration of the model, ``model_index.json``.

    Raises:
        ModelError: the recommendation is no number, or out of its limits.
    """
    recommended = (aligner or {}).get("default_strength")
    if recommended is None and (recommended := model.get("default_strength")) is None:
        return dict(DEFAULT_STRENGTHS)
    if not _is_a(recommended, float) or not 0 <= recommended <= MAX_STRENGTH:
        raise ModelError(f"default_strength is {recommended!r}; it must be between 0 and {MAX_STRENGTH:g}")
    return {**DEFAULT_STRENGTHS, "concat": float(recommended)}


def reference_shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Shares of a sample's references, summing to 1.

    Args:
        weights: one per reference, 0 to :data:`MAX_WEIGHT`, not all 0; only their ratios matter. None is equal ones.
        count: number of references.

    Raises:
        UsageError: the weights break these rules.
    """
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise UsageError(f"reference_weights has {len(weights)} values for {count} references; give one for each")
    for number, weight in enumerate(weights, 1):
        _between(f"number {number} of reference_weights", weight, 0, MAX_WEIGHT)
    total = math.fsum(weights)
    if weights and not total:
        raise UsageError("reference_weights are all 0; give one a weight above 0, or strength 0 for text only")
    return tuple(weight / total for weight in weights)


def part_of(text: str) -> range:
    """Numbers of the rows in a part ``A:B`` of a manifest.

    Raises:
        UsageError: the text is something else, or the part has no row.
    """
    numbers = _PART.fullmatch(text)
    if numbers is None:
        raise UsageError(
            f"rows is {_SHORT.repr(text)}; give the number of the first row, a colon, and the number behind the last "
            "row, such as 1000:2000. The first row of a manifest has the number 0"
        )
    start, stop = map(int, numbers.groups())
    if start >= stop:
        raise UsageError(f"rows is {text}, which has no row; the second number must be larger than the first")
    return range(start, stop)


def load_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse a configuration file: one mapping of setting to value. Tags are refused (safe loader).

    Raises:
        UsageError: not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UsageError(f"{source} is not valid YAML in line {line}: {error.problem}") from error
    # Numbers and dates that Python cannot hold, and endless nesting, get past YAML's own errors.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{source} is not valid YAML: {error}") from error
    return checked_mapping(values, source)


def checked_mapping(values: Any, source: str) -> dict[str, Any]:
    """A mapping of setting to value, whose names may be written like options.

    Raises:
        UsageError: ``values`` is no mapping.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{source} must be a mapping of setting to value, not {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def meant(name: str, known: Iterable[str]) -> list[str]:
    """The settings of ``known`` that a wrong name may stand for, the best first; none if nothing is like it."""
    there = [*known]
    other = DIFFUSERS_NAMES.get(name)
    return [other] if other in there else difflib.get_close_matches(name, there)


def _redacted(value: Any) -> Any:
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) and "://" in value else value


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {_SHORT.repr(value)}; it must be one of {', '.join(allowed)}")


def _between(name: str, value: float | None, low: float, high: float | None) -> None:
    if value is None:
        return
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} is {value}; it must be {limit}")


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether ``value`` fits an annotation of :class:`RunConfig`, such as ``int | None``."""
    if isinstance(annotation, UnionType):
        return any(_is_a(value, kind) for kind in get_args(annotation))
    if get_origin(annotation) is dict:
        return isinstance(value, dict) and all(_is_a(name, str) and _is_a(item, float) for name, item in value.items())
    if get_origin(annotation) is tuple:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def _in_words(annotation: Any) -> str:
    if isinstance(annotation, UnionType):
        return " or ".join(_in_words(kind) for kind in get_args(annotation))
    if get_origin(annotation) is dict:
        return "a mapping of texts to numbers"
    if get_origin(annotation) is tuple:
        return "a list of texts"
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}[
        annotation
    ]
