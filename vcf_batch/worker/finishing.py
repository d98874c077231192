"""The end of a batch: its images are scored, judged by the gates, encoded and written."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from vcf_batch import images, sharding
from vcf_batch.metrics.scorer import Targets
from vcf_batch.output import marking
from vcf_batch.records import TRIPLET, Sample, Scores
from vcf_batch.worker import gates
from vcf_batch.worker.batches import Batch, Pictures
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components
from vcf_batch.worker.shard_rows import ShardRows

NOT_FINITE = "the model produced values that are not finite for this row; try another seed or --dtype float32"

ONE_COLOUR = (
    "the model produced an image for this row whose pixels are all equal; try another seed, a lower guidance scale or "
    "--dtype float32"
)
"""Reason of a row whose image, or twin, has one colour.

No prompt gives such an image, not even one for a plain background: the decoder's output differs between pixels by more
than the rounding to 8 bits. It has collapsed, or was driven beyond black or white everywhere.
"""


class Finisher:
    """Finisher of the batches of one shard. It runs beside the sampling, and touches no state of it.

    Args:
        components: the components to score with.
        rows: the rows of the shard, padding included.
        write: takes a sample of each row, in the order of the rows.
        clock: the clock of the shard.
    """

    def __init__(self, components: Components, rows: ShardRows, write: Callable[[Sample], None], clock: Clock) -> None:
        self._components, self._config, self._scorer = components, components.config, components.scorer.new_shard()
        self._rows, self._write, self._clock = rows, write, clock
        self._finished: dict[int, Sample] = {}
        """Samples that wait for earlier ones to be written, by position."""
        self._position = 0
        """Position of the next row to be written."""

    def finish(self, batch: Batch) -> bool:
        """Score a sampled batch; encode and write the rows that get no other draw.

        Nothing is scored of a batch that was not sampled, because each of its rows has failed or is padding.

        Returns:
            Whether every row of the batch is finished.

        Raises:
            StorageError: the scratch cannot be written, or a sample that stays cannot be read.
        """
        if batch.targets is None:
            with self._clock("score"):
                batch.targets = self._targets(batch)
            batch.draws = {position: [] for position in batch.positions if position not in self._rows.padding}
        if batch.images is None:
            self._finished |= {position: self._failed(batch, position) for position in batch.draws}
            batch.draws = {}
        else:
            self._judge(batch, batch.targets, batch.images)
        with self._clock("write"):
            self._write_finished()
        return not batch.draws

    def _targets(self, batch: Batch) -> Targets:
        prompts = [self._rows.rows[position].prompt for position in batch.positions]
        weights = [self._rows.settings[position]["reference_weights"] for position in batch.positions]
        return self._scorer.targets(prompts, batch.pictures, weights)

    def _judge(self, batch: Batch, targets: Targets, sampled: Pictures) -> None:
        """Score one draw of a batch, and encode the rows that get no other."""
        faults, pixels = _with_faults(sampled)
        twin_faults, twins = (faults, []) if batch.twins is None else _with_faults(batch.twins)
        with self._clock("score"):
            scores = self._scorer.score(targets, pixels, twins)
            flags = self._flags(pixels, twins)
        with self._clock("encode"):
            decided: dict[int, Sample] = {}
            for place, position in enumerate(batch.positions):
                if position in batch.draws:
                    fault = faults[place] or twin_faults[place]
                    if sample := self._outcome(batch, place, scores[place], flags[place], fault):
                        decided[place] = sample

            def complete(place: int) -> Sample:
                twin = twins[place] if twins else None
                return self._complete(batch, place, decided[place], pixels[place], twin)

            for place, sample in zip(decided, self._components.encoders.map(complete, decided), strict=True):
                self._finished[batch.positions[place]] = sample
                del batch.draws[batch.positions[place]]

    def _complete(
        self, batch: Batch, place: int, sample: Sample, pixels: NDArray[np.uint8], twin: NDArray[np.uint8] | None
    ) -> Sample:
        """The outcome of a row with its images, encoded. Threads do this for several rows at once."""
        if sample.status != "success":
            return sample
        height, width, _ = pixels.shape
        return dataclasses.replace(
            sample,
            image=self._encoded(sample, pixels),
            triplet={} if twin is None else self._triplet(batch, place, sample, twin),
            width=width,
            height=height,
            phash=images.perceptual_hash(pixels),
        )

    def _write_finished(self) -> None:
        """Write the samples up to the first row that has none yet."""
        while True:
            if self._position in self._rows.padding:
                sample = self._rows.known_sample(self._position)
            elif self._position in self._finished:
                sample = self._finished.pop(self._position)
            else:
                return
            self._write(sample)
            self._position += 1
            self._clock.note_sample()

    def _flags(self, pixels: Sequence[NDArray[np.uint8]], twins: Sequence[NDArray[np.uint8]]) -> Sequence[bool | None]:
        """Flags of the safety checker for each row's image or twin; None for each row without a checker."""
        if self._components.safety is None:
            return [None] * len(pixels)
        flags = self._components.safety(pixels)
        return [*map(operator.or_, flags, self._components.safety(twins))] if twins else flags

    def _outcome(self, batch: Batch, place: int, scores: Scores, nsfw: bool | None, fault: str | None) -> Sample | None:
        """Outcome of a row, without its image; None if the row gets another draw. A draw with a fault has failed."""
        position = batch.positions[place]
        if position in batch.errors:
            return self._failed(batch, position)
        row, used = self._rows.rows[position], self._rows.settings[position]
        used = {**used, "seed": sharding.draw_seed(used["seed"], batch.draw)}
        drawn = Sample(row, "success", used, scores=scores, pno_objective=batch.objectives[place], nsfw=nsfw)
        if batch.loras:
            drawn = dataclasses.replace(drawn, lora_sha256=tuple(lora.sha256 for lora, _ in batch.loras))
        if fault:
            drawn = Sample(row, "failed", used, error_message=fault)
        batch.draws[position].append(drawn)
        return gates.outcome(batch.draws[position], self._config)

    def _failed(self, batch: Batch, position: int) -> Sample:
        """Sample of a row whose reference or LoRA could not be used."""
        return Sample(
            self._rows.rows[position], "failed", self._rows.settings[position], error_message=batch.errors[position]
        )

    def _encoded(self, sample: Sample, pixels: NDArray[np.uint8]) -> bytes:
        """The encoded image file, with the sample's settings as XMP unless the run leaves them out."""
        mark = marking.xmp(sample, self._components.model) if self._config.mark else None
        return images.encode(pixels, self._config.image_format, mark)

    def _triplet(self, batch: Batch, place: int, sample: Sample, twin: NDArray[np.uint8]) -> dict[str, bytes]:
        """The other images of a row's triplet, encoded, by :data:`vcf_batch.records.TRIPLET`.

        They are the text-only twin, and the reference with the largest weight, resized to the twin.
        """
        text_only = dataclasses.replace(sample, settings={**sample.settings, "strength": 0.0, "pno_steps": 0})
        shares = cast(Targets, batch.targets).shares[place]
        height, width, _ = twin.shape
        reference = images.resize(batch.pictures[place][shares.index(max(shares))], width, height)
        style = images.encode(np.asarray(reference), self._config.image_format)
        return dict(zip(TRIPLET, (self._encoded(text_only, twin), style), strict=True))


def _with_faults(sampled: Pictures) -> tuple[list[str | None], list[NDArray[np.uint8]]]:
    """The fault of each image, None if it has none, and the images, uint8 ``[H, W, 3]`` each."""
    finite, pixels = sampled.arrived()
    faults = [
        NOT_FINITE if not is_finite else ONE_COLOUR if (image == image[0, 0]).all() else None
        for is_finite, image in zip(finite, pixels, strict=True)
    ]
    return faults, pixels
