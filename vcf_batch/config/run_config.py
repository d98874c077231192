"""RunConfig: the settings of one run, validated once."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vcf_batch.config import limits
from vcf_batch.config.checks import SHORT, check_between, check_choice
from vcf_batch.config.mapping import checked_values
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import UsageError, redact
from vcf_batch.records import Lora, named_loras

COLUMN_SETTINGS = {
    "prompt": "prompt_column",
    "reference": "reference_column",
    "sample_id": "id_column",
    "seed": "seed_column",
}
"""Settings that name a column of the manifest, by the column that it is read as."""

LISTS = ("reference_root", "carry", "lora")
"""Settings of :class:`RunConfig` that may have several values."""

DECIDED_BY_EVALUATION = frozenset(
    {
        *("manifest", "output", *COLUMN_SETTINGS.values(), "carry"),
        *("fusion", "strength", "role", "pno_steps", "seed", "limit", "rows"),
        *("triplets", "safety_checker", "attempts", "best_by", "calibration", *limits.GATES),
    }
)
"""Settings of a run that an evaluation decides: what is compared is not selected."""

_PART = re.compile(r"([0-9]{1,18}):([0-9]{1,18})")


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
    every fusion. None is the default of model and fusion: :func:`vcf_batch.config.strengths.default_strengths`."""
    fusion_lo: float = 0.0
    """Start of the part of the schedule that uses references, as a fraction; 1 is pure noise. It ends at
    ``fusion_hi``."""
    fusion_hi: float = 1.0
    role: str = "all"
    """What references decide on, in rows without roles of their own: one of
    :data:`vcf_batch.config.limits.ROLES`."""
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
    """Smallest CLIP score of a sample that is not rejected; None is no limit. :data:`vcf_batch.config.limits.GATES`
    lists every limit. A text such as ``far=0.05`` is the limit that a share of
    :data:`vcf_batch.config.limits.FALSE_ACCEPTS` keeps by mistake, by the ``calibration``; the number is settled before
    the run."""
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
    :data:`vcf_batch.config.limits.LONG_PROMPTS`. ``truncate`` cuts off the rest, ``refuse`` fails the row, and
    ``chunk`` encodes the text in windows (:meth:`vcf_batch.vcf.pipeline.VCFPipeline.encode_windows`)."""
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
        self._unify_spellings()
        self._check_texts()
        self._check_fusion()
        self._check_sampling()
        self._check_gates()
        self._check_layout()
        self._check_workers()

    def _unify_spellings(self) -> None:
        """Give what means the same one spelling, as two would be two fingerprints."""
        for name in LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, column in COLUMN_SETTINGS.items():
            if getattr(self, column) == name:
                object.__setattr__(self, column, None)
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

    def _check_texts(self) -> None:
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                # A shell variable that is not set gives an empty text, which as a place would be the working directory.
                if isinstance(text, str) and ("\0" in text or (not text and name != "negative_prompt")):
                    raise UsageError(f"{name} is {text!r}; give a value without NUL characters, or leave it out")

    def _check_fusion(self) -> None:
        """Check what joins references with the prompt: fusion, adapters, roles and strengths."""
        check_choice("fusion", self.fusion, limits.FUSIONS)
        if self.fusion == limits.IP_ADAPTER and self.ip_adapter is None:
            raise UsageError(
                "fusion is ip_adapter, but no IP-Adapter is named: name its weights with --ip-adapter, such as "
                "ip-adapter-sd15 ('vcf-batch model list' has all names)"
            )
        if self.image_encoder is not None and self.ip_adapter is None:
            raise UsageError(
                f"image_encoder is {SHORT.repr(self.image_encoder)}, which is for an IP-Adapter: name its weights "
                "with --ip-adapter, or leave it out"
            )
        named_loras(self.lora)
        check_choice("role", self.role, limits.ROLES)
        if self.role != "all" and self.fusion not in limits.ROLED_FUSIONS:
            raise UsageError(
                f"role is {self.role}, and the fusion {self.fusion} cannot limit references: use --fusion "
                f"{' or '.join(limits.ROLED_FUSIONS)}, or leave the role out"
            )
        if self.fusion == limits.IP_ADAPTER and self.role not in limits.ADAPTED_ROLES:
            raise UsageError(
                f"role is {self.role}; with the fusion ip_adapter it must be {', '.join(limits.ADAPTED_ROLES)}"
            )
        check_choice("unconditional", self.unconditional, limits.UNCONDITIONALS)
        if self.image_tokens is not None:
            check_choice("image_tokens", self.image_tokens, limits.IMAGE_TOKENS)
        check_between("fusion_lo", self.fusion_lo, 0, 1)
        check_between("fusion_hi", self.fusion_hi, self.fusion_lo, 1)
        self._check_strengths()

    def _check_strengths(self) -> None:
        check_between("strength", self.strength, 0, limits.MAX_STRENGTH)
        if self.default_strengths is None:
            return
        if sorted(self.default_strengths) != sorted(limits.FUSIONS):
            raise UsageError(
                f"default_strengths has {', '.join(self.default_strengths)}; it must have {', '.join(limits.FUSIONS)}"
            )
        for fusion, strength in self.default_strengths.items():
            check_between(f"the default strength of {fusion}", strength, 0, limits.MAX_STRENGTH)
        if self.strength != self.default_strengths[self.fusion]:
            raise UsageError(
                f"strength is {self.strength}, and default_strengths has {self.default_strengths[self.fusion]} for "
                f"{self.fusion}; give strength alone, or neither"
            )

    def _check_sampling(self) -> None:
        """Check the way from noise to an image, and prompt-noise optimisation."""
        check_choice("long_prompts", self.long_prompts, limits.LONG_PROMPTS)
        check_choice("dtype", self.dtype, limits.DTYPES)
        check_choice("scheduler", self.scheduler, limits.SCHEDULERS)
        check_between("guidance_scale", self.guidance_scale, 0, limits.MAX_GUIDANCE_SCALE)
        # Making a Sampling checks the limits of its settings.
        if self.sampling.deep_cache > 1 and self.compile:
            raise UsageError(
                f"deep_cache is {self.deep_cache}, which cannot be compiled: leave out --compile or --deep-cache"
            )
        check_between("pno_steps", self.pno_steps, 0, limits.MAX_PNO_STEPS)
        for name in ("pno_lr_conditioning", "pno_lr_noise", "pno_gamma"):
            check_between(name, getattr(self, name), 0, 1)
        check_between("seed", self.seed, 0, limits.MAX_SEED)
        for name in ("height", "width"):
            check_between(name, getattr(self, name), limits.MIN_EDGE, limits.MAX_EDGE)
            if (getattr(self, name) or 0) % 8:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be a multiple of 8")

    def _check_gates(self) -> None:
        """Check what images have to reach, and the scores that tell it."""
        check_choice("lpips", self.lpips, limits.LPIPS_NETWORKS)
        for name, score in limits.GATES.items():
            limit = getattr(self, name)
            if isinstance(limit, str):
                self._check_share(name, limit)
            else:
                check_between(name, limit, *((0, None) if score == "lpips" else (-1, 1)))
        check_choice("best_by", self.best_by, tuple(limits.GATES.values()))
        check_between("attempts", self.attempts, 1, limits.MAX_ATTEMPTS)
        if self.best_by != "clip_score" and not self.is_gated:
            raise UsageError(
                f"best_by is {self.best_by}, but nothing is rejected: set one of {', '.join(limits.GATES)} or "
                "safety_checker, or leave best_by out"
            )
        if self.attempts > 1 and not self.is_gated:
            raise UsageError(
                f"attempts is {self.attempts}, but nothing is asked of them: set one of {', '.join(limits.GATES)} or "
                "safety_checker, or leave attempts at 1"
            )
        if self.min_content_alignment is not None and not self.triplets:
            raise UsageError(
                f"min_content_alignment is {self.min_content_alignment}, but only --triplets draw what the content "
                "is compared with: add them, or leave the gate out"
            )
        if self.lpips in ("alex", "vgg") and not self.lpips_weights:
            raise UsageError(
                f"lpips is {self.lpips!r}, which needs the published weights: name their folder with --lpips-weights, "
                "or turn the score off with --lpips none"
            )

    def _check_layout(self) -> None:
        """Check what is read of the manifest, and how the output is laid out."""
        check_choice("image_format", self.image_format, limits.IMAGE_FORMATS)
        check_between("batch_size", self.batch_size, 1, limits.MAX_BATCH_SIZE)
        check_between("shard_size", self.shard_size, 1, 1_000_000)
        check_between("max_pixels", self.max_pixels, 1, limits.MAX_PIXELS)
        check_between("max_failed", self.max_failed, 0, 1)
        check_between("limit", self.limit, 1, None)
        for column, count in Counter(self.columns.values()).items():
            if count > 1:
                raise UsageError(f"column {column!r} is named for {count} meanings; give each its own column")

    def _check_workers(self) -> None:
        """Check the workers, and the log."""
        check_between("num_workers", self.num_workers, 1, None)
        check_between("gpus_per_worker", self.gpus_per_worker, 0, 16)
        check_between("cpus_per_worker", self.cpus_per_worker, 1, 1024)
        check_between("stall_timeout", self.stall_timeout, 1, None)
        check_choice("log_format", self.log_format, limits.LOG_FORMATS)
        check_choice("verbosity", self.verbosity, limits.VERBOSITIES)

    def _check_share(self, name: str, limit: str) -> None:
        """Refuse a gate in words that names no share of false accepts, or that nothing gives a number."""
        if limit not in {f"far={share:g}": share for share in limits.FALSE_ACCEPTS}:
            shares = ", ".join(f"far={share:g}" for share in limits.FALSE_ACCEPTS)
            raise UsageError(f"{name} is {SHORT.repr(limit)}; it must be a number, or one of {shares}")
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
        """The gates that are set, by the names of :data:`vcf_batch.config.limits.GATES`.

        They are numbers once defaults are settled.
        """
        return {name: limit for name in limits.GATES if (limit := getattr(self, name)) is not None}

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


def part_of(text: str) -> range:
    """Numbers of the rows in a part ``A:B`` of a manifest.

    Raises:
        UsageError: the text is something else, or the part has no row.
    """
    numbers = _PART.fullmatch(text)
    if numbers is None:
        raise UsageError(
            f"rows is {SHORT.repr(text)}; give the number of the first row, a colon, and the number behind the last "
            "row, such as 1000:2000. The first row of a manifest has the number 0"
        )
    start, stop = map(int, numbers.groups())
    if start >= stop:
        raise UsageError(f"rows is {text}, which has no row; the second number must be larger than the first")
    return range(start, stop)


def _redacted(value: Any) -> Any:
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) and "://" in value else value
