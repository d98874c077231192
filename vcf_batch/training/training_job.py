"""A training of an aligner: its models and data, and its log. This module needs neither torch nor ray."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.models.parts import Parts
from vcf_batch.training.captions import CaptionedData, Piece, cut
from vcf_batch.training.training_config import NOT_TRAINED, TrainingConfig

LOG = "log.csv"
ALIGNER, STATE = "aligner", "state.pt"
"""Names in a checkpoint: the ImageAligner directory, and the file with the state to resume from."""

CHECKPOINTS = "checkpoints"
"""Name of the checkpoints' folder in the output."""

VALIDATION_SHARE = 20
"""One of :data:`VALIDATION_SHARE` pairs is held out by default, and at most :data:`MAX_VALIDATION` pairs in all."""
MAX_VALIDATION = 1000


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs to know about a training; small and picklable."""

    config: TrainingConfig
    parts: Parts
    data: CaptionedData
    validation_data: CaptionedData
    training: tuple[Piece, ...]
    validation: tuple[Piece, ...]

    @classmethod
    def plan(cls, config: TrainingConfig) -> "TrainingJob":
        """Find the models, count the pairs, and hold out pairs for validation.

        Raises:
            UsageError: a model or the data cannot be used, or there are too few pairs.
            StorageError: the storage failed.
        """
        parts = Parts.resolve(config.model, config.revision, config.image_encoder, config.image_encoder_revision)
        columns = (config.image_column, config.caption_column, config.image_folder)
        data = CaptionedData.open(config.data, *columns)
        total = min(len(data), config.limit or len(data))
        if config.validation_data is not None:
            validation_data = CaptionedData.open(config.validation_data, *columns)
            held_out = min(config.validation_pairs or MAX_VALIDATION, len(validation_data))
            validation = cut(validation_data.files, 0, held_out)
        else:
            validation_data = data
            held_out = config.validation_pairs or min(max(total // VALIDATION_SHARE, 1), MAX_VALIDATION)
            total -= held_out
            validation = cut(data.files, total, total + held_out)
        if total < config.batch_size:
            raise UsageError(
                f"{config.data} has {max(total, 0):,} pairs to train on, besides {held_out:,} for "
                f"validation: fewer than --batch-size {config.batch_size:,}; use a smaller batch or more data"
            )
        return cls(config, parts, data, validation_data, tuple(cut(data.files, 0, total)), tuple(validation))

    @property
    def pairs(self) -> int:
        """Number of pairs to train on."""
        return sum(map(len, self.training))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What has to be told about the data, a line each."""
        return tuple(dict.fromkeys((*self.data.remarks, *self.validation_data.remarks)))

    @property
    def steps_per_epoch(self) -> int:
        return self.pairs // self.config.batch_size

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def fields(self) -> dict[str, Any]:
        """The settings and identities that define this training, as plain JSON types."""
        config = {name: value for name, value in vars(self.config).items() if name not in NOT_TRAINED}
        encoder = self.parts.image_encoder or self.parts.base
        return config | {
            "validation_pairs": sum(map(len, self.validation)),
            "data_id": self.data.identity,
            "validation_data_id": self.validation_data.identity,
            "model_id": self.parts.base.identity,
            "image_encoder_id": encoder.identity,
        }


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder in :data:`CHECKPOINTS`."""
    return f"step-{step:08d}"


def read_log(out: str) -> list[dict[str, float]]:
    """The validations of a training so far, beginning with the one before its first step.

    Raises:
        StorageError: the storage failed.
    """
    try:
        with storage.refusals_as_storage_errors():
            text = storage.read_text(storage.join(out, LOG))
    except FileNotFoundError:
        return []
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def describe(row: dict[str, Any], steps: int) -> str:
    """One validation in one line of text, with the number of broken pairs before it, if there were any."""
    broken = f"; {row['broken_pairs']:,} broken pairs left out before it" if row["broken_pairs"] else ""
    return (
        f"step {row['step']:,.0f} of {steps:,}: validation loss {row['validation_loss']:.4f} (InfoNCE "
        f"{row['validation_info_nce']:.4f}, reconstruction {row['validation_reconstruction']:.4f}), recall@1 "
        f"{row['recall_at_1']:.1%}, recall@5 {row['recall_at_5']:.1%}{broken}"
    )


def write_log(out: str, rows: Sequence[dict[str, Any]]) -> None:
    """Publish ``log.csv`` with the validations so far.

    Raises:
        StorageError: the storage failed.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.publish_bytes(storage.join(out, LOG), text.getvalue().encode())
