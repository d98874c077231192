"""What becomes of sampled batches: their images scored, judged by the gates, encoded and written."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vcf_batch import images, sharding
from vcf_batch.metrics.scorer import Targets
from vcf_batch.output import marking
from vcf_batch.records import TRIPLET, Row, Sample, Scores
from vcf_batch.worker import gates
from vcf_batch.worker.batches import Batch
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components

NOT_FINITE = "the model produced values that are not finite for this row; try another seed or --dtype float32"


class Finisher:
    """Finishes the batches of one shard, one after the other. It runs beside the sampling, and touches no state of it.

    Args:
        components: what to score with.
        rows: of the shard.
        settings: of each row.
        padding: positions of the rows that are not generated.
        known: samples of these rows, by the number of the row.
        write: takes the samples, in the order of the rows.
        clock: where the time went.
    """

    def __init__(
        self,
        components: Components,
        rows: Sequence[Row],
        settings: Sequence[Mapping[str, Any]],
        padding: Set[int],
        known: Mapping[int, Sample],
        write: Callable[[Sample], None],
        clock: Clock,
    ) -> None:
        self._components, self._config, self._scorer = components, components.config, components.scorer.new_shard()
        self._rows, self._settings, self._padding, self._known = rows, settings, padding, known
        self._write, self._clock = write, clock
        self._finished: dict[int, Sample] = {}
        """By position: samples that wait for earlier ones to be written."""

    def finish(self, batch: Batch) -> bool:
        """Score a batch; encode and write what is settled.

        Returns:
            Whether all rows are settled, and none gets another attempt.
        """
        finite, pixels = self._pixels(batch, batch.images)
        twins_finite, twins = self._pixels(batch, batch.twins) if self._config.triplets else (finite, [])
        with self._clock("score"):
            if batch.targets is None:
                prompts = [self._rows[position].prompt for position in batch.positions]
                weights = [self._settings[position]["reference_weights"] for position in batch.positions]
                batch.targets = self._scorer.targets(prompts, batch.pictures, weights)
                batch.tries = {position: [] for position in batch.positions if position not in self._padding}
            scores = self._scorer.score(batch.targets, pixels, twins)
            flags = self._flags(pixels, twins)
        with self._clock("encode"):
            for place, position in enumerate(batch.positions):
                if position not in batch.tries:
                    continue
                is_finite = finite[place] and twins_finite[place]
                sample = self._outcome(batch, place, scores[place], flags[place], is_finite)
                if sample is None:
                    continue
                if sample.status == "success":
                    height, width, _ = pixels[place].shape
                    sample = dataclasses.replace(
                        sample,
                        image=self._encoded(sample, pixels[place]),
                        triplet=self._triplet(batch, place, sample, twins[place]) if twins else {},
                        width=width,
                        height=height,
                        phash=images.perceptual_hash(pixels[place]),
                    )
                self._finished[position] = sample
                del batch.tries[position]
        with self._clock("write"):
            while (position := self._clock.samples_done) in self._finished or position in self._padding:
                known = position in self._padding
                self._write(self._known[self._rows[position].number] if known else self._finished.pop(position))
                self._clock.samples_done += 1
        return not batch.tries

    def _pixels(self, batch: Batch, sampled: Tensor | None) -> tuple[list[bool], list[NDArray[np.uint8]]]:
        """Which images are finite, and all as uint8 ``[H, W, 3]``; plain ones where nothing was sampled."""
        if sampled is None:
            size = cast(int, self._config.height), cast(int, self._config.width)
            sampled = torch.zeros(len(batch.positions), 3, *size)
        finite = sampled.isfinite().flatten(1).all(1).tolist()
        return finite, [images.from_unit(image) for image in sampled.nan_to_num().permute(0, 2, 3, 1).numpy()]

    def _flags(self, pixels: Sequence[NDArray[np.uint8]], twins: Sequence[NDArray[np.uint8]]) -> Sequence[bool | None]:
        """Of each row, whether the safety checker flags its image or its twin; None without a checker."""
        if self._components.safety is None:
            return [None] * len(pixels)
        flags = self._components.safety(pixels)
        return [*map(operator.or_, flags, self._components.safety(twins))] if twins else flags

    def _outcome(self, batch: Batch, place: int, scores: Scores, nsfw: bool | None, is_finite: bool) -> Sample | None:
        """What became of a row, but for its image; None if it gets another attempt."""
        position = batch.positions[place]
        row, used = self._rows[position], self._settings[position]
        if position in batch.errors:
            return Sample(row, "failed", used, error_message=batch.errors[position])
        used = {**used, "seed": sharding.attempt_seed(used["seed"], batch.attempt)}
        tried = Sample(row, "success", used, scores=scores, pno_objective=batch.objectives[place], nsfw=nsfw)
        if not is_finite:
            tried = Sample(row, "failed", used, error_message=NOT_FINITE)
        batch.tries[position].append(tried)
        return gates.outcome(batch.tries[position], self._config)

    def _encoded(self, sample: Sample, pixels: NDArray[np.uint8]) -> bytes:
        """The file of an image that a sample tells how it was made."""
        mark = marking.xmp(sample, self._components.model) if self._config.mark else None
        return images.encode(pixels, self._config.image_format, mark)

    def _triplet(self, batch: Batch, place: int, sample: Sample, twin: NDArray[np.uint8]) -> dict[str, bytes]:
        """The twin of a row, and the reference that counts most in it, as the perceptual distance sees it: encoded."""
        text_only = dataclasses.replace(sample, settings={**sample.settings, "strength": 0.0, "pno_steps": 0})
        shares = cast(Targets, batch.targets).shares[place]
        height, width, _ = twin.shape
        reference = images.resize(batch.pictures[place][shares.index(max(shares))], width, height)
        style = images.encode(np.asarray(reference), self._config.image_format)
        return dict(zip(TRIPLET, (self._encoded(text_only, twin), style), strict=True))
