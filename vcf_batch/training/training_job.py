"""A training of an aligner: its models and data, and its log. This module needs neither torch nor ray."""

import csv
import dataclasses
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.manifest.prompts import read as read_prompts
from vcf_batch.models import resolution
from vcf_batch.models.parts import Parts
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.setup.run_models import DEFAULT_JUDGE, OWN_JUDGE
from vcf_batch.storage import scratch
from vcf_batch.training.captions import CaptionedData, Piece, cut
from vcf_batch.training.training_config import AS_BEFORE, NOT_TRAINED, TrainingConfig

LOG, TRANSFER_LOG = "log.csv", "transfer.csv"
TRANSFER = "transfer"
"""Folder in the output with a picture of each validation."""
EVENTS = "tensorboard"
"""Folder in the output with the log as TensorBoard reads it."""
TRANSFER_PAIRS = 16
"""Pairs of prompt and reference that a validation generates by default."""
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
    transfer_pairs: int = 0
    """Number of pairs that each validation generates, at least two; 0 generates none."""
    prompts: tuple[str, ...] = ()
    """Their prompts, each once; none takes captions of other validation images."""
    judge: ResolvedModel | None = None
    """The CLIP that compares the pictures; None is the model's own."""

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
        found = cls(config, parts, data, validation_data, tuple(cut(data.files, 0, total)), tuple(validation))
        return found._with_transfer(held_out)

    def _with_transfer(self, held_out: int) -> "TrainingJob":
        """Settle what the validations generate, and how it is compared."""
        config = self.config
        judge = None if config.judge is None else resolution.resolve(config.judge)
        has_judge = judge is not None or resolution.read_config(self.parts.base, f"{OWN_JUDGE}/config.json") is not None
        pairs = config.transfer_pairs
        if pairs is None:
            pairs = min(TRANSFER_PAIRS, held_out) if has_judge else 0
        if pairs and not has_judge:
            raise UsageError(
                f"{config.model} brings no CLIP that compares pictures: name one with --judge, such as "
                f"{DEFAULT_JUDGE}, or give --transfer-pairs 0"
            )
        if min(pairs, held_out) < 2:
            if pairs > held_out or config.needs_transfer:
                option = "--tune-strength" if config.tune_strength else "--select-by transfer"
                needed = option if config.needs_transfer else f"--transfer-pairs {pairs}"
                raise UsageError(
                    f"{needed} compares pictures of two pairs or more, and there are {min(pairs, held_out)}: name a "
                    f"CLIP that compares them with --judge, such as {DEFAULT_JUDGE}, and hold out more "
                    "--validation-pairs"
                )
            pairs = 0
        prompts: dict[str, None] = {}
        if pairs and config.prompts is not None:
            for text in filter(None, map(str.strip, read_prompts(storage.absolute(config.prompts)))):
                prompts[text] = None
                if len(prompts) == pairs:
                    break
            if not prompts:
                raise UsageError(f"{config.prompts} has no prompts: every line is blank")
        return dataclasses.replace(self, transfer_pairs=min(pairs, held_out), prompts=tuple(prompts), judge=judge)

    @property
    def pairs(self) -> int:
        """Number of pairs to train on."""
        return sum(map(len, self.training))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What has to be told before the training, a line each."""
        about = [*self.data.remarks, *self.validation_data.remarks]
        if not self.transfer_pairs and self.config.transfer_pairs is None:
            about.append(
                "what pictures take from references is not measured, and the losses do not tell it: name a CLIP that "
                f"compares pictures with --judge, such as {DEFAULT_JUDGE}"
            )
        return tuple(dict.fromkeys(about))

    @property
    def steps_per_epoch(self) -> int:
        return self.pairs // self.config.batch_size

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def fields(self) -> dict[str, Any]:
        """The settings and identities that define this training, as plain JSON types."""
        config = {
            name: value
            for name, value in vars(self.config).items()
            if name not in NOT_TRAINED and (name not in AS_BEFORE or value != AS_BEFORE[name])
        }
        encoder = self.parts.image_encoder or self.parts.base
        if self.config.needs_transfer:
            judge = self.judge or self.parts.base
            config |= {"transfer_pairs": self.transfer_pairs, "prompts": [*self.prompts], "judge_id": judge.identity}
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


def best_of(rows: Sequence[dict[str, Any]], config: TrainingConfig) -> dict[str, Any]:
    """The validation whose aligner is kept; the earlier one in a tie."""
    if config.select_by == "transfer":
        return max(rows, key=lambda row: row["transfer"])
    return min(rows, key=lambda row: row["validation_loss"])


def describe(row: dict[str, Any], steps: int) -> str:
    """One validation in one line of text, with the number of broken pairs before it, if there were any."""
    broken = f"; {row['broken_pairs']:,} broken pairs left out before it" if row["broken_pairs"] else ""
    return (
        f"step {row['step']:,.0f} of {steps:,}: validation loss {row['validation_loss']:.4f} (InfoNCE "
        f"{row['validation_info_nce']:.4f}, reconstruction {row['validation_reconstruction']:.4f}), recall@1 "
        f"{row['recall_at_1']:.1%}, recall@5 {row['recall_at_5']:.1%}{transfer_in_words(row)}{broken}"
    )


def transfer_in_words(row: dict[str, Any]) -> str:
    """What a validation's pictures show, as the end of a line; empty if it has none."""
    if row.get("transfer") is None:
        return ""
    return (
        f"; pictures at strength {row['strength']:g}: prompt kept {row['prompt_kept']:.0%}, reference followed "
        f"{row['reference_followed']:.0%}"
    )


def write_table(out: str, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Publish a table of the validations so far, such as ``log.csv``.

    Raises:
        StorageError: the storage failed.
    """
    text = io.StringIO()
    # The rows of a training that an earlier version began may lack columns.
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.publish_bytes(storage.join(out, name), text.getvalue().encode())


def write_events(out: str, row: dict[str, Any], picture: tuple[bytes, int, int] | None) -> None:
    """Publish one validation as TensorBoard reads it: a file of its own, which comes after those of earlier steps.

    Args:
        out: the output.
        row: the validation's numbers, with its ``step``.
        picture: a PNG, its width and its height.

    Raises:
        StorageError: the storage failed.
    """
    from tensorboardX.proto.event_pb2 import Event  # brings torch
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if value is not None]
    if picture is not None:
        image, width, height = picture
        shown = Summary.Image(encoded_image_string=image, width=width, height=height, colorspace=3)
        values.append(Summary.Value(tag=TRANSFER, image=shown))
    now = time.time()
    events = [
        Event(wall_time=now, file_version="brain.Event:2"),
        Event(wall_time=now, step=row["step"], summary=Summary(value=values)),
    ]
    name = f"events.out.tfevents.{row['step']:010d}"
    with scratch.temporary("the log") as folder:
        path = os.path.join(folder, name)
        writer = RecordWriter(path)
        for event in events:
            writer.write(event.SerializeToString())
        writer.close()
        storage.upload(path, storage.join(out, EVENTS, name))
