"""One worker's part of a training: steps, validations and checkpoints. This module does not use ray."""

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import nn

from vcf_batch import storage
from vcf_batch.config.strengths import EVALUATED_STRENGTHS
from vcf_batch.errors import UsageError, VcfBatchError
from vcf_batch.storage import scratch
from vcf_batch.training.alignment import Alignment, Diverged, Losses, Trainer, level, summed
from vcf_batch.training.assembly import load
from vcf_batch.training.captions import CaptionedData, Piece, cut
from vcf_batch.training.features import Example, Towers
from vcf_batch.training.feed import Feed
from vcf_batch.training.training_job import (
    ALIGNER,
    CHECKPOINTS,
    LOG,
    STATE,
    TRANSFER,
    TRANSFER_LOG,
    TrainingJob,
    checkpoint_name,
    describe,
    write_events,
    write_table,
)
from vcf_batch.training.transfer import Measured, Transfer
from vcf_batch.vcf.aligner import ImageAligner


@dataclass(frozen=True)
class Place:
    """One worker's rank and device, and the functions that report its progress."""

    report: Callable[[dict[str, Any], Path | None], None]
    """Called on every worker with a validation's metrics. The first worker also passes the folder of its checkpoint."""
    progress: Callable[[int, int], None]
    """Called with the number of pairs trained on so far, and of broken pairs up to the last validation."""
    note: Callable[[str], None]
    """Called with messages for the user."""
    parallel: Callable[[nn.Module], nn.Module]
    """Wraps a module for data-parallel training."""
    device: torch.device
    rank: int = 0
    world: int = 1


def fit(job: TrainingJob, place: Place, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint or from the beginning.

    Args:
        job: the training. Its ``dtype`` and ``cpus_per_worker`` are settled, and its ``batch_size`` is a multiple of
            ``place.world``.
        checkpoint: folder of the last checkpoint that ``place.report`` took; None begins anew.

    Raises:
        UsageError: the models or the data cannot be used.
        StorageError: the storage failed.
        VcfBatchError: the training has diverged: a loss, a score or a weight is no longer finite.
    """
    with _Fit(job, place, checkpoint) as fitting:
        fitting.run()


class _Fit:
    losses: list[float]
    """The :class:`Losses`, each summed over the steps since the last validation."""

    def __init__(self, job: TrainingJob, place: Place, checkpoint: Path | None) -> None:
        self.job, self.place, config = job, place, job.config
        torch.set_num_threads(config.cpus_per_worker)
        torch.manual_seed(config.seed)
        self.towers = _towers(job, place.device)
        dtype = self.towers.pipeline.text_encoder.dtype
        alignment = Alignment(self.towers.pipeline.aligner, config, dtype).to(place.device)
        self.trainer = Trainer(alignment, place.parallel(alignment), config, job.steps)
        self.rows: list[dict[str, Any]] = []
        self.transfer_rows: list[dict[str, Any]] = []
        if checkpoint is not None:
            state = torch.load(checkpoint / STATE, map_location=place.device, weights_only=True)
            self.rows, self.transfer_rows = state.pop("rows"), state.pop("transfer_rows", [])
            self.trainer.load_state_dict(state)
        self.batch = config.batch_size // place.world
        with self._feed(job.validation_data, job.validation) as feed:
            self.validation = feed.all()
        if not any(summed([float(len(self.validation))], place.device)):
            held_out, last = f"{sum(map(len, job.validation)):,}", feed.last_broken or "in another worker's share"
            raise UsageError(
                f"{held_out} of the first {held_out} validation pairs cannot be used, more than half; the last: {last}"
                ". If the others are whole, raise --validation-pairs, or name some with --validation-data"
            )
        self._match_norms()
        self.transfer = self._transfer()
        self.feed = self._feed(job.data, job.training)
        self._begin_interval()
        # The first validation counts its own broken pairs. The rows of a checkpoint have done so.
        self.first_broken -= 0 if self.rows else feed.broken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.feed.__exit__(*exc_info)

    def run(self) -> None:
        job, trainer = self.job, self.trainer
        every = job.config.validate_every or job.steps_per_epoch
        if not trainer.steps_done:
            self._record()
        while trainer.steps_done < job.steps:
            epoch, done = divmod(trainer.steps_done, job.steps_per_epoch)
            with contextlib.closing(self.feed.batches(epoch, self.batch, first=done)) as batches:
                for batch in islice(batches, job.steps_per_epoch - done):
                    self._step(batch)
                    if trainer.steps_done % every == 0 or trainer.steps_done == job.steps:
                        self._record()
                        self._checkpoint()

    def _step(self, batch: Sequence[Example]) -> None:
        try:
            losses = self.trainer.step(*self.towers.encode(batch))
        except Diverged as error:
            raise self._diverged(str(error)) from error
        self.losses = [total + loss.item() for total, loss in zip(self.losses, losses, strict=True)]
        self.place.progress(self.trainer.steps_done * self.job.config.batch_size, self._broken())

    def _diverged(self, what: str) -> VcfBatchError:
        """The error that ends a diverged training. It names the last checkpoint, whose validation was good.

        Before the first step is done, no learning rate has had an effect, and the frozen towers are to blame.
        """
        if not self.trainer.steps_done:
            dtype = self.job.config.dtype
            remedy = "use other models" if dtype == "float32" else "use --dtype float32, or other models"
            return VcfBatchError(
                f"the training cannot begin: {what}, before anything is trained. The towers give numbers that are not "
                f"finite, or that --dtype {dtype} does not hold: {remedy}"
            )
        done = [int(row["step"]) for row in self.rows if row["step"]]
        kept = "There is no checkpoint before it"
        if done:
            last = storage.join(self.job.config.out, CHECKPOINTS, checkpoint_name(done[-1]))
            kept = f"The last good checkpoint is {last}, with the aligner in {ALIGNER}/"
        return VcfBatchError(
            f"the training has diverged: {what}. {kept}. Train with a lower --learning-rate into another --out"
        )

    def _broken(self) -> int:
        return sum(row["broken_pairs"] for row in self.rows)

    def _record(self) -> None:
        """Validate, and log the losses of the steps since the last validation."""
        trainer, steps = self.trainer, self.trainer.steps_done - self.first_step
        *losses, broken = summed([*self.losses, float(self.feed.broken - self.first_broken)], self.place.device)
        seconds = time.monotonic() - self.begin
        mean = [loss / self.place.world / steps if steps else None for loss in losses]
        found, picture = self._measure()
        row = {
            "step": trainer.steps_done,
            "epoch": trainer.steps_done / self.job.steps_per_epoch,
            "learning_rate": trainer.schedule.get_last_lr()[0],
            **dict(zip(("loss", *Losses._fields[1:]), mean, strict=True)),
            **trainer.validate(map(self.towers.encode, self._validation_batches())),
            **(max(found, key=lambda each: each.transfer).row if found else {}),
            "broken_pairs": int(broken),
            "pairs_per_second": steps * self.job.config.batch_size / seconds,
        }
        if wrong := trainer.not_finite(row):
            raise self._diverged(f"{wrong} after step {trainer.steps_done:,}")
        self.rows.append(row)
        if self.place.rank == 0:
            self._publish(found, picture)
            self.place.note(describe(self.rows[-1], self.job.steps))
        self._begin_interval()

    def _validation_batches(self) -> list[list[Example]]:
        return [self.validation[start : start + self.batch] for start in range(0, len(self.validation), self.batch)]

    def _match_norms(self) -> None:
        """Measure the text tokens of the validation's captions, where their norms matter.

        With ``match_norms`` the aligner gets their mean norm, or that of each text encoder's part where there are
        several: within the norm of a whole token one part could grow at the cost of another. These parts are also made
        to count alike in the losses.
        """
        widths = [int(encoder.config.hidden_size) for encoder in self.towers.pipeline.family.encoders]
        if len(widths) == 1 and not self.job.config.match_norms:
            return
        total = [0.0] * (len(widths) + 2)
        for batch in self._validation_batches():
            text = self.towers.encode(batch)[1].float()
            norms = [part.norm(dim=-1) for part in (text, *text.split(widths, dim=-1))]
            found = [float(norms[0].numel()), *(each.sum().item() for each in norms)]
            total = [one + other for one, other in zip(total, found, strict=True)]
        count, *sums = summed(total, self.place.device)
        # Rounded, so that they do not depend on the number of workers.
        whole, *parts = (max(round(each / count, 3), 0.001) for each in sums)
        if self.job.config.match_norms:
            several = {"token_norm": parts, "token_parts": widths} if len(widths) > 1 else {"token_norm": whole}
            self.towers.pipeline.aligner.register_to_config(**several)
        scale = level(parts, widths)
        self.trainer.alignment.scale = None if scale is None else scale.to(self.place.device)

    def _transfer(self) -> Transfer | None:
        job = self.job
        if not job.transfer_pairs:
            return None
        held_out = job.validation_data.read(cut(job.validation, 0, 2 * job.transfer_pairs))
        transfer = Transfer.load(job, self.towers.pipeline, held_out, self.place.rank)
        if transfer is None and job.config.needs_transfer:
            raise UsageError(
                f"{', '.join(dict.fromkeys(piece.url for piece in job.validation))}: fewer than two validation images "
                "can be used to compare pictures with; hold out more --validation-pairs"
            )
        return transfer

    def _measure(self) -> tuple[list[Measured], Image.Image | None]:
        """What the aligner's tokens do in pictures. Store the best strength in the aligner if that was asked for."""
        if self.transfer is None:
            return [], None
        pipeline, tuned = self.towers.pipeline, self.job.config.tune_strength
        found, picture = self.transfer.measure(
            EVALUATED_STRENGTHS if tuned else [pipeline.resolve_strength("concat", None)]
        )
        if tuned:
            best = max(found, key=lambda each: each.transfer)
            pipeline.aligner.register_to_config(default_strength=best.strength)
        return found, picture

    def _publish(self, found: Sequence[Measured], picture: Image.Image | None) -> None:
        """Write the last validation to the logs."""
        out, row = self.job.config.out, self.rows[-1]
        write_table(out, LOG, self.rows)
        shown = None
        if picture is not None:
            self.transfer_rows += [{"step": row["step"], **each.row, **each.layers} for each in found]
            write_table(out, TRANSFER_LOG, self.transfer_rows)
            file = io.BytesIO()
            picture.save(file, "png")
            shown = file.getvalue(), *picture.size
            storage.publish_bytes(storage.join(out, TRANSFER, f"{checkpoint_name(row['step'])}.png"), shown[0])
        write_events(out, row, shown)

    def _begin_interval(self) -> None:
        self.begin = time.monotonic()
        self.first_step, self.first_broken = self.trainer.steps_done, self.feed.broken
        self.losses = [0.0] * len(Losses._fields)

    def _checkpoint(self) -> None:
        if self.place.rank > 0:
            self.place.report(self.rows[-1], None)
            return
        with scratch.temporary("a checkpoint") as folder:
            self.towers.pipeline.aligner.save_pretrained(Path(folder, ALIGNER))
            torch.save(
                self.trainer.state_dict() | {"rows": self.rows, "transfer_rows": self.transfer_rows},
                Path(folder, STATE),
            )
            self.place.report(self.rows[-1], Path(folder))

    def _feed(self, data: CaptionedData, pieces: Sequence[Piece]) -> Feed[Example]:
        config = self.job.config
        return Feed(
            data,
            pieces,
            self.towers.draw_example,
            rank=self.place.rank,
            world=self.place.world,
            seed=config.seed,
            buffer=config.shuffle_buffer,
            threads=config.cpus_per_worker,
            note=self.place.note,
        )


def _towers(job: TrainingJob, device: torch.device) -> Towers:
    """Load the frozen towers, and add a new aligner."""
    config, parts = job.config, job.parts
    unused = {} if job.transfer_pairs else {"unet": None, "vae": None}
    pipeline = load(parts, getattr(torch, config.dtype), aligner=None, **unused)
    widths = pipeline.image_encoder.config.hidden_size, pipeline.family.width
    torch.manual_seed(config.seed)  # The first weights do not depend on which parts were loaded before.
    pipeline.register_modules(aligner=ImageAligner(*widths, tokens=config.tokens))
    for tower in (*pipeline.family.encoders, pipeline.image_encoder):
        tower.requires_grad_(False).eval()
    encoder = parts.image_encoder or parts.base
    image_id, text_id = (f"{config.dtype}-{model.identity[:16]}" for model in (encoder, parts.base))
    # Earlier versions cached tokens of pixels that were not converted to sRGB.
    return Towers(pipeline.to(device), config.cache_features, f"image-{image_id}-srgb", f"text-{text_id}")
