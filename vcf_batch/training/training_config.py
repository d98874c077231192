"""TrainingConfig: all settings of one training of an aligner."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vcf_batch.config.limits import DTYPES, IMAGE_TOKENS, MAX_SEED
from vcf_batch.config.mapping import checked_values
from vcf_batch.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one run of ``vcf-batch model train``. Field names are the command's options; the defaults are the
    recipe of docs/method.md, section 3, with the tether of section 8.
    """

    model: str
    data: str
    out: str
    revision: str | None = None
    image_encoder: str | None = None
    image_encoder_revision: str | None = None
    image_folder: str | None = None
    """Folder that paths of images start at; None is the folder of the file that names them."""
    image_column: str | None = None
    caption_column: str | None = None
    limit: int | None = None
    """Number of pairs to use, from the first on; None uses all."""
    validation_data: str | None = None
    """Data for validation; None holds out the last pairs of ``data``."""
    validation_pairs: int | None = None
    """Number of validation pairs; None is 5 % of the pairs, at most 1,000."""
    tokens: str = "all"
    epochs: int = 10
    batch_size: int = 256
    """Number of pairs in a step, over all workers."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    info_nce_weight: float = 0.2
    tether: float = 1.0
    """Weight of the tether, the reconstruction loss with the roles exchanged; 0 is the paper's loss."""
    temperature: float = 0.07
    learn_temperature: bool = False
    match_norms: bool = False
    """Scale every image token to the mean norm of the text tokens of the validation's captions. Where a base has
    several text encoders, the part of each is scaled to the mean norm of that part."""
    validate_every: int | None = None
    """Number of steps between validations, each with a checkpoint; None is one epoch."""
    transfer_pairs: int | None = None
    """Pairs of prompt and reference that each validation generates; 0 generates none. None is 16 if there is a judge,
    else 0."""
    prompts: str | None = None
    """File with the prompts of these pairs; None takes captions of other validation images."""
    judge: str | None = None
    """The CLIP that compares their pictures with prompts and references; None is the model's own."""
    tune_strength: bool = False
    """Generate the pairs at several strengths, and store the best one in the aligner as its default."""
    select_by: str = "loss"
    """What the aligner that is kept is best in: ``loss`` or ``transfer``."""
    shuffle_buffer: int = 1000
    seed: int = 0
    dtype: str = "auto"
    """Data type of the frozen towers; ``auto`` is bfloat16 if workers have GPUs, else float32."""
    cache_features: str | None = None
    num_workers: int | None = None
    gpus_per_worker: int | None = None
    cpus_per_worker: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            # Written so, NaN is refused too.
            if value is not None and not least <= value <= most:
                raise UsageError(
                    f"--{name.replace('_', '-')} is {value}; it must be a number from {least:g} to {most:g}"
                )
        if self.seed > MAX_SEED or self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; it must be a whole number from 0 to {MAX_SEED}")
        for name in ("limit", "validation_pairs", "epochs", "batch_size", "validate_every", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_COUNT:
                raise UsageError(
                    f"--{name.replace('_', '-')} is {value}; it must be a whole number from 1 to {MAX_COUNT:,}"
                )

        if self.transfer_pairs is not None and not (self.transfer_pairs == 0 or 2 <= self.transfer_pairs <= MAX_PAIRS):
            raise UsageError(f"--transfer-pairs is {self.transfer_pairs}; it must be 0, or from 2 to {MAX_PAIRS:,}")
        for name, allowed in (("tokens", IMAGE_TOKENS), ("dtype", DTYPES), ("select_by", SELECTIONS)):
            if getattr(self, name) not in allowed:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")

    @property
    def needs_transfer(self) -> bool:
        """Whether what is trained depends on the pictures of the validations."""
        return self.tune_strength or self.select_by == "transfer"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """Build from names and values of settings.

        Raises:
            UsageError: an unknown name, a missing one, or a value outside its limits.
        """
        return cls(**checked_values(cls, values))

    def replace(self, **changes: Any) -> "TrainingConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


MAX_PAIRS = 1000
"""Largest number of pairs that a validation generates."""

SELECTIONS = ("loss", "transfer")

MAX_COUNT = 10**12
"""Largest number of pairs, steps or epochs."""

_LIMITS = {
    "learning_rate": (1e-12, 1.0),
    "weight_decay": (0.0, 1e3),
    "gradient_norm": (1e-12, 1e12),
    "info_nce_weight": (0.0, 1e6),
    "tether": (0.0, 1e6),
    "temperature": (1e-4, 1e3),
}
"""Smallest and largest values. Beyond them, steps of float32 vanish or overflow, whatever the data are."""

NOT_TRAINED = frozenset(
    {
        "model",
        "data",
        "out",
        "revision",
        "image_encoder",
        "image_encoder_revision",
        "image_folder",
        "validation_data",
        "validate_every",
        "transfer_pairs",
        "prompts",
        "judge",
        "cache_features",
        "num_workers",
        "gpus_per_worker",
        "cpus_per_worker",
        "address",
    }
)
"""Settings that may change when a training is resumed. Models and data are compared by their identity instead, and what
pictures are compared by only counts where they decide: :attr:`TrainingConfig.needs_transfer`."""

AS_BEFORE: Mapping[str, Any] = {"tether": 0.0, "match_norms": False, "tune_strength": False, "select_by": "loss"}
"""Settings added later, each with the value that means the behaviour before it. With that value they stay out of what
defines a training, so that one begun before goes on."""
