"""TrainingConfig: everything that one training of an aligner was asked to do."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run of ``vcf-batch model train``. Field names are the command's options; the defaults are the recipe of
    docs/method.md, section 3.
    """

    model: str
    data: str
    out: str
    revision: str | None = None
    image_encoder: str | None = None
    image_encoder_revision: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    limit: int | None = None
    """Only the first pairs."""
    validation_data: str | None = None
    """None: the last pairs of ``data``, which are then not trained on."""
    validation_pairs: int | None = None
    """None: 5 % of the pairs, at most 1,000."""
    tokens: str = "all"
    epochs: int = 10
    batch_size: int = 256
    """Pairs in a step, over all workers."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    info_nce_weight: float = 0.2
    temperature: float = 0.07
    learn_temperature: bool = False
    validate_every: int | None = None
    """Steps between validations, each with a checkpoint. None: an epoch."""
    shuffle_buffer: int = 1000
    seed: int = 0
    dtype: str = "auto"
    """Of the frozen towers. ``auto``: bfloat16 where workers have GPUs, else float32."""
    cache_features: str | None = None
    num_workers: int | None = None
    gpus_per_worker: int | None = None
    cpus_per_worker: int = 1
    address: str | None = None

    def replace(self, **changes: Any) -> "TrainingConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


NOT_CONTENT = frozenset(
    {
        "model",
        "data",
        "out",
        "revision",
        "image_encoder",
        "image_encoder_revision",
        "validation_data",
        "validate_every",
        "cache_features",
        "num_workers",
        "gpus_per_worker",
        "cpus_per_worker",
        "address",
    }
)
"""Settings that a training may go on with after they have changed. Models and data count by their identity."""
