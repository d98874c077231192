"""One shard on its way through a worker: its rows cut into batches, sampled, scored, encoded and written.

Sampling never waits for what can be done beside it: a pool of threads reads and decodes references ahead of it, and one
thread scores, encodes and writes behind it. Two shards may be on their way at once. One of them is sampled: of the
other, the first references are read meanwhile, or the last samples scored and written.
"""

import contextlib
import dataclasses
import functools
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.profiler import record_function

from vcf_batch import gates, images, marking, padding, plan
from vcf_batch.config import RunConfig
from vcf_batch.device import Device
from vcf_batch.errors import OutOfDeviceMemory, RowError, StorageError, VcfBatchError
from vcf_batch.metrics.scorer import Scorer, Targets
from vcf_batch.records import TRIPLET, Objective, Reference, Row, Sample, Scores
from vcf_batch.references import ReferenceReader
from vcf_batch.row_settings import settings_of
from vcf_batch.vcf import pno
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import BLANK, VCFPipeline
from vcf_batch.vcf.safety import SafetyChecker

READERS = 8
"""Threads that read references. They wait for storage most of the time."""

BATCHES_AHEAD = 2
"""Batches whose references are read before sampling gets to them."""

BATCHES_BEHIND = 2
"""Sampled batches that may wait for scoring and writing before sampling pauses: a bound on memory."""

TURN_SECONDS = 1.0
"""Between two signs of life of a shard that waits until another one is sampled."""

PICTURE_BYTES = 1 << 30
"""Decoded references of a shard that are kept for later batches; beyond it they are read again."""

NOT_FINITE = "the model produced values that are not finite for this row; try another seed or --dtype float32"


@dataclass(frozen=True)
class Tools:
    """What a shard is generated with, from one shard to the next."""

    config: RunConfig
    """With every default resolved."""
    pipeline: VCFPipeline
    scorer: Scorer
    references: ReferenceReader
    model: str
    """Identity of the model, as images name it."""
    device: Device
    """Of pipeline and scorer."""
    guide: Guide | None = None
    """Of prompt-noise optimisation; None where no row asks for it."""
    safety: SafetyChecker | None = None
    """None without one."""
    sampling: threading.Lock = field(default_factory=threading.Lock)
    """Held by the shard that is sampled."""

    def settings(self, row: Row) -> dict[str, Any]:
        """What a row is generated with: the run's settings, with the row's own in their place."""
        used = settings_of(row, self.config)
        return used | {"strength": float(self.pipeline.resolve_strength(used["fusion"], used["strength"]))}


def batch_key(row: Row, used: Mapping[str, Any]) -> tuple[int, int]:
    """Rows share a batch that have as many updates of prompt-noise optimisation and equally many conditioning tokens.

    Args:
        row: of a shard.
        used: its settings.
    """
    pictures = max(len(row.references), int(row.negative_reference is not None))
    return used["pno_steps"], pictures if used["fusion"] == "concat" else 0


@dataclass
class _Reference:
    """One distinct reference of a shard."""

    number: int
    batches_left: int = 0
    """Batches with a row of it that are not finished."""
    holders: int = 0
    """Batches in the making that look at the image."""
    reading: "Future[tuple[Image.Image, Image.Image]] | None" = None
    image: Image.Image | None = None
    squashed: Image.Image | None = None
    """What the model gets of it, until there are tokens."""
    error: str | None = None
    tokens: Tensor | None = None
    """Aligned, ``[N, Dt]``."""

    def collect(self, blamed: type[VcfBatchError] | tuple[type[VcfBatchError], ...]) -> None:
        """Wait for the image.

        Args:
            blamed: errors that fail the rows of the reference. Any other is raised.
        """
        if self.image is None and self.reading is not None:
            try:
                self.image, self.squashed = self.reading.result()
            except blamed as error:
                self.error = str(error)
                # Stands in for the image, so that its batch keeps its shape. No two alike, so that none are merged.
                self.image = Image.new("RGB", (64, 64), (self.number % 256, self.number // 256 % 256, 128))
                self.squashed = self.image
            self.reading = None


@dataclass
class _Batch:
    """Rows of a shard that are sampled together."""

    number: int
    positions: list[int]
    """Places of the rows in the shard, from 0."""
    references: list[tuple[Reference, ...]]
    """Of each row, its negative one included."""
    pictures: list[list[Image.Image]] = field(default_factory=list)
    """Of each row: its references, decoded, without the negative one."""
    errors: dict[int, str] = field(default_factory=dict)
    """Position to the reason why that row fails."""
    text_tokens: dict[str, Tensor] = field(default_factory=dict)
    """Of each prompt and negative prompt ``[T, Dt]``."""
    image_tokens: dict[Reference, Tensor] = field(default_factory=dict)
    """Of each reference, aligned, ``[N, Dt]``."""
    targets: Targets | None = None
    """What the images are scored against, once that is known."""
    attempt: int = 0
    """Of the images, counted from 0."""
    tries: dict[int, list[Sample]] = field(default_factory=dict)
    """Position of each row that is not settled, to what the attempts at it gave."""
    images: Tensor | None = None
    """float32 ``[B, 3, H, W]`` in [0, 1], once sampled; None if every row failed before."""
    twins: Tensor | None = None
    """What the prompts alone make of the same noise, likewise, in a run with triplets."""
    objectives: Sequence[Objective | None] = ()
    """Of each row, once sampled; None without prompt-noise optimisation."""

    def distinct_references(self) -> list[Reference]:
        return list(dict.fromkeys(reference for own in self.references for reference in own))


class Generation:
    """Generates the rows of one shard; use it with ``with``.

    What is computed together depends on the manifest alone, never on what failed or is left out.

    Args:
        tools: what to generate with.
        rows: of the shard.
        known: samples by the number of their row, which are handed on as they are: the row is not touched, and keeps
            its place in its batch as padding (:mod:`vcf_batch.padding`). A batch of padding alone is not sampled.
        write: takes the samples, in the order of the rows.
        clock: where the time went.
        last_attempt: trouble of storage or network with one reference fails its rows. Before that it raises: only what
            repeats, and on another node if there is one, is blamed on a row.
        sampled_at_once: rows at most, if fewer than a batch has. The samples may then differ in their last bits.
    """

    def __init__(
        self,
        tools: Tools,
        rows: Sequence[Row],
        known: Mapping[int, Sample],
        write: Callable[[Sample], None],
        clock: "Clock",
        last_attempt: bool,
        sampled_at_once: int | None,
    ) -> None:
        self.tools, self.known, self.write, self.clock = tools, known, write, clock
        self.batch_size = cast(int, tools.config.batch_size)
        self.sampled_at_once = min(sampled_at_once or self.batch_size, self.batch_size)
        self.blamed = (RowError, StorageError) if last_attempt else RowError
        self.pipeline, self.config = tools.pipeline, tools.config
        self.padding = {position for position, row in enumerate(rows) if row.number in known}
        self.rows = rows = padding.neutral(rows, self.padding, self.config.negative_prompt)
        self.settings = [tools.settings(row) for row in rows]
        keys = [batch_key(row, used) for row, used in zip(rows, self.settings, strict=True)]
        # In the order of their first rows, so that few finished samples wait for earlier ones to be written.
        self.batches = [
            _Batch(number, positions, [rows[position].images for position in positions])
            for number, positions in enumerate(sorted(plan.batches(keys, self.batch_size)))
        ]
        self.references: dict[Reference, _Reference] = {}
        for batch in self.batches:
            for reference in batch.distinct_references():
                entry = self.references.setdefault(reference, _Reference(len(self.references)))
                entry.batches_left += 1
        self.texts: dict[str, Tensor] = {}
        self.text_last_batch = {
            text: batch.number
            for batch in self.batches
            for position in batch.positions
            for text in self._texts(position)
        }
        self.scorer = tools.scorer.new_shard()
        self.ahead = iter(self.batches)
        self.reading: deque[_Batch] = deque()
        """Batches that are not sampled yet, and whose references are read."""
        self.finished: dict[int, Sample] = {}

    def __enter__(self) -> Self:
        self.readers = ThreadPoolExecutor(READERS, "references")
        self.behind = ThreadPoolExecutor(1, "scores", initializer=self.tools.device.use_threads)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.behind.shutdown(cancel_futures=True)
        self.readers.shutdown(cancel_futures=True)

    def run(self) -> None:
        """Sample every batch; score and write them in the background; return when the last sample is written.

        Raises:
            OutOfDeviceMemory: the GPU's memory does not hold a batch.
            VcfBatchError: storage or network failed.
        """
        try:
            self._run()
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"out of GPU memory with {self.sampled_at_once} images of "
                f"{self.config.width}x{self.config.height} at once; rerun the command with --allow-smaller-batches, or "
                "use a smaller --batch-size (which makes it another run, in another output)"
            ) from error

    def _run(self) -> None:
        behind: deque[tuple[_Batch, Future[bool]]] = deque()
        self._read_ahead()
        with self._turn():
            for batch in self.batches:
                self._read_ahead()
                self.reading.popleft()
                with self.clock("wait_for_references"):
                    self._collect(batch)
                with self.clock("sample"):
                    batch.text_tokens, batch.image_tokens = self._text_tokens(batch), self._image_tokens(batch)
                    self._sample(batch)
                while len(behind) >= BATCHES_BEHIND:
                    self._settle_first(behind)
                behind.append((batch, self.behind.submit(self._finish, batch)))
            while behind and self.config.attempts > 1:
                self._settle_first(behind)
        while behind:
            self._settle_first(behind)

    def _settle_first(self, behind: "deque[tuple[_Batch, Future[bool]]]") -> None:
        """Wait until a batch is scored, then sample it again, or let go of it."""
        batch, finishing = behind.popleft()
        with self.clock("wait_for_scores"):
            is_settled = finishing.result()
        if is_settled:
            self._release(batch)
            return
        batch.attempt += 1
        with self.clock("sample"):
            self._sample(batch)
        behind.append((batch, self.behind.submit(self._finish, batch)))

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other shard is sampled; then let every denoising step show that something moves."""
        with self.clock("wait_for_turn"):
            while not self.tools.sampling.acquire(timeout=TURN_SECONDS):
                self.clock.tick()  # nothing hangs here: the other shard would
        hook = self.pipeline.unet.register_forward_hook(lambda *_: self.clock.tick())
        try:
            yield
        finally:
            hook.remove()
            self.tools.sampling.release()

    def _read_ahead(self) -> None:
        while len(self.reading) <= BATCHES_AHEAD and (batch := next(self.ahead, None)):
            self._read(batch)
            self.reading.append(batch)

    def _texts(self, position: int) -> tuple[str, str]:
        return self.rows[position].prompt, self.settings[position]["negative_prompt"]

    def _read(self, batch: _Batch) -> None:
        """Start reading the batch's references."""
        for reference in batch.distinct_references():
            entry = self.references[reference]
            entry.holders += 1
            if entry.image is None and entry.reading is None:
                entry.reading = self.readers.submit(self._read_one, reference)

    def _read_one(self, reference: Reference) -> tuple[Image.Image, Image.Image]:
        """The image, and what the model gets of it. Runs beside the sampling."""
        with self.clock("read_references"):
            image = self.tools.references.read(reference)
            return image, self.pipeline.squash(image)

    def _collect(self, batch: _Batch) -> None:
        """Wait for the batch's references and note which rows fail."""
        for position, references in zip(batch.positions, batch.references, strict=True):
            entries = [self.references[reference] for reference in references]
            for entry in entries:
                entry.collect(self.blamed)
            shown = entries[: len(self.rows[position].references)]
            batch.pictures.append([cast(Image.Image, entry.image) for entry in shown])
            error = next((entry.error for entry in entries if entry.error), None)
            if error:
                batch.errors[position] = error

    def _sample(self, batch: _Batch) -> None:
        """Sample a batch, unless every row of it failed or is padding.

        Failed rows are encoded and sampled beside the others, and rows that are settled beside those that get another
        attempt: what their neighbours get does not depend on them.
        """
        if self.padding.union(batch.errors).issuperset(batch.positions):
            return
        starts = range(0, len(batch.positions), self.sampled_at_once)
        parts = [slice(start, start + self.sampled_at_once) for start in starts]
        sampled = [self._generate(batch, part) for part in parts]
        batch.images = torch.cat([pictures for pictures, _ in sampled])
        batch.objectives = [objective for _, objectives in sampled for objective in objectives]
        if self.config.triplets:
            # Apart from the others, so that these have the bytes and take the memory that they have without twins.
            batch.twins = torch.cat([self._generate_twins(batch, part) for part in parts])

    def _generate(self, batch: _Batch, part: slice) -> tuple[Tensor, list[Objective | None]]:
        """Sample some rows of a batch: float32 ``[B, 3, H, W]`` in [0, 1], and how prompt-noise optimisation went."""
        settings = [self.settings[position] for position in batch.positions[part]]
        inputs = self._inputs(batch, part)
        if settings[0]["pno_steps"]:
            return self._optimize(settings, batch.pictures[part], inputs)
        return self.pipeline.generate_from_tokens(**inputs), [None] * len(settings)

    def _generate_twins(self, batch: _Batch, part: slice) -> Tensor:
        """What the prompts of some rows of a batch make of the same noise alone."""
        inputs = self._inputs(batch, part)
        return self.pipeline.generate_from_tokens(**inputs | {"fusions": [Fusion()] * len(inputs["fusions"])})

    def _inputs(self, batch: _Batch, part: slice) -> dict[str, Any]:
        """What some rows of a batch are sampled from."""
        positions = batch.positions[part]
        settings = [self.settings[position] for position in positions]
        return {
            "text_tokens": torch.stack([batch.text_tokens[self.rows[position].prompt] for position in positions]),
            "negative_tokens": torch.stack([batch.text_tokens[used["negative_prompt"]] for used in settings]),
            "fusions": [self._fusion(position, batch.image_tokens) for position in positions],
            "seeds": [plan.attempt_seed(used["seed"], batch.attempt) for used in settings],
            "guidance_scale": [used["guidance_scale"] for used in settings],
            "steps": self.config.steps,
            "scheduler": self.config.scheduler,
            "eta": self.config.eta,
            "guidance_lo": self.config.guidance_lo,
            "guidance_hi": self.config.guidance_hi,
            "height": self.config.height,
            "width": self.config.width,
        }

    def _optimize(
        self, settings: Sequence[Mapping[str, Any]], pictures: Sequence[list[Image.Image]], inputs: Mapping[str, Any]
    ) -> tuple[Tensor, list[Objective | None]]:
        """Sample with prompt-noise optimisation."""
        guide = cast(Guide, self.tools.guide)
        sample, noise, conditioning = self.pipeline.prepare(**inputs)
        found, course = pno.optimize(
            sample,
            noise,
            conditioning,
            guide,
            guide.targets(pictures, [used["reference_weights"] for used in settings]),
            seeds=inputs["seeds"],
            steps=settings[0]["pno_steps"],
            lr_conditioning=self.config.pno_lr_conditioning,
            lr_noise=self.config.pno_lr_noise,
            gamma=self.config.pno_gamma,
        )
        return found.cpu(), [*course]

    def _fusion(self, position: int, image_tokens: Mapping[Reference, Tensor]) -> Fusion:
        row, used = self.rows[position], self.settings[position]
        unconditional = None
        if row.negative_reference is not None:
            unconditional = image_tokens[row.negative_reference]
        elif row.references and used["unconditional"] == "blank":
            unconditional = self._blank
        return Fusion(
            image_tokens=[image_tokens[reference] for reference in row.references],
            mode=used["fusion"],
            strength=used["strength"],
            weights=used["reference_weights"],
            unconditional=unconditional,
            lo=used["fusion_lo"],
            hi=used["fusion_hi"],
        )

    @functools.cached_property
    def _blank(self) -> Tensor:
        """Aligned tokens ``[N, Dt]`` of the blank image."""
        return self.pipeline.encode_references([BLANK], self.config.image_tokens)[0]

    def _text_tokens(self, batch: _Batch) -> dict[str, Tensor]:
        """Tokens ``[T, Dt]`` of the batch's prompts and negative prompts; each distinct one is encoded once a shard."""
        wanted = dict.fromkeys(text for position in batch.positions for text in self._texts(position))
        new = [text for text in wanted if text not in self.texts]
        if new:
            self.texts.update(zip(new, self.pipeline.encode_prompts(new), strict=True))
        tokens = {text: self.texts[text] for text in wanted}
        for text in wanted:
            if self.text_last_batch[text] == batch.number:
                del self.texts[text]
        return tokens

    def _image_tokens(self, batch: _Batch) -> dict[Reference, Tensor]:
        """Aligned tokens ``[N, Dt]`` of the batch's references; each distinct one is encoded once a shard."""
        wanted = {reference: self.references[reference] for reference in batch.distinct_references()}
        new = [entry for entry in wanted.values() if entry.tokens is None]
        if new:
            squashed = [cast(Image.Image, entry.squashed) for entry in new]
            for entry, tokens in zip(
                new, self.pipeline.encode_references(squashed, self.config.image_tokens), strict=True
            ):
                entry.tokens = tokens
        for entry in wanted.values():
            entry.squashed = None
        return {reference: cast(Tensor, entry.tokens) for reference, entry in wanted.items()}

    def _finish(self, batch: _Batch) -> bool:
        """Score a batch; encode and write what is settled. Runs behind the sampling, and touches no state of it.

        Returns:
            Whether all rows are settled, and none gets another attempt.
        """
        finite, pixels = self._pixels(batch, batch.images)
        twins_finite, twins = self._pixels(batch, batch.twins) if self.config.triplets else (finite, [])
        with self.clock("score"):
            if batch.targets is None:
                prompts = [self.rows[position].prompt for position in batch.positions]
                weights = [self.settings[position]["reference_weights"] for position in batch.positions]
                batch.targets = self.scorer.targets(prompts, batch.pictures, weights)
                batch.tries = {position: [] for position in batch.positions if position not in self.padding}
            scores = self.scorer.score(batch.targets, pixels, twins)
            flags = self._flags(pixels, twins)
        with self.clock("encode"):
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
                self.finished[position] = sample
                del batch.tries[position]
        with self.clock("write"):
            while (position := self.clock.samples_done) in self.finished or position in self.padding:
                known = position in self.padding
                self.write(self.known[self.rows[position].number] if known else self.finished.pop(position))
                self.clock.samples_done += 1
        return not batch.tries

    def _pixels(self, batch: _Batch, sampled: Tensor | None) -> tuple[list[bool], list[NDArray[np.uint8]]]:
        """Which images are finite, and all as uint8 ``[H, W, 3]``; plain ones where nothing was sampled."""
        if sampled is None:
            sampled = torch.zeros(len(batch.positions), 3, cast(int, self.config.height), cast(int, self.config.width))
        finite = sampled.isfinite().flatten(1).all(1).tolist()
        return finite, [images.from_unit(image) for image in sampled.nan_to_num().permute(0, 2, 3, 1).numpy()]

    def _encoded(self, sample: Sample, pixels: NDArray[np.uint8]) -> bytes:
        """The file of an image that a sample tells how it was made."""
        mark = marking.xmp(sample, self.tools.model) if self.config.mark else None
        return images.encode(pixels, self.config.image_format, mark)

    def _triplet(self, batch: _Batch, place: int, sample: Sample, twin: NDArray[np.uint8]) -> dict[str, bytes]:
        """The twin of a row, and the reference that counts most in it, as the perceptual distance sees it: encoded."""
        text_only = dataclasses.replace(sample, settings={**sample.settings, "strength": 0.0, "pno_steps": 0})
        shares = cast(Targets, batch.targets).shares[place]
        height, width, _ = twin.shape
        reference = images.resize(batch.pictures[place][shares.index(max(shares))], width, height)
        style = images.encode(np.asarray(reference), self.config.image_format)
        return dict(zip(TRIPLET, (self._encoded(text_only, twin), style), strict=True))

    def _flags(self, pixels: Sequence[NDArray[np.uint8]], twins: Sequence[NDArray[np.uint8]]) -> Sequence[bool | None]:
        """Of each row, whether the safety checker flags its image or its twin; None without a checker."""
        if self.tools.safety is None:
            return [None] * len(pixels)
        flags = self.tools.safety(pixels)
        return [*map(operator.or_, flags, self.tools.safety(twins))] if twins else flags

    def _outcome(self, batch: _Batch, place: int, scores: Scores, nsfw: bool | None, is_finite: bool) -> Sample | None:
        """What became of a row, but for its image; None if it gets another attempt."""
        position = batch.positions[place]
        row, used = self.rows[position], self.settings[position]
        if position in batch.errors:
            return Sample(row, "failed", used, error_message=batch.errors[position])
        used = used | {"seed": plan.attempt_seed(used["seed"], batch.attempt)}
        tried = Sample(row, "success", used, scores=scores, pno_objective=batch.objectives[place], nsfw=nsfw)
        if not is_finite:
            tried = Sample(row, "failed", used, error_message=NOT_FINITE)
        batch.tries[position].append(tried)
        return gates.outcome(batch.tries[position], self.config)

    def _release(self, batch: _Batch) -> None:
        """Let go of what no later batch needs."""
        batch.pictures, batch.images, batch.twins, batch.targets = [], None, None, None
        batch.text_tokens, batch.image_tokens = {}, {}
        for reference in batch.distinct_references():
            entry = self.references[reference]
            entry.holders -= 1
            entry.batches_left -= 1
            if not entry.batches_left:
                del self.references[reference]
            elif not entry.holders and not entry.error and self._picture_bytes() > PICTURE_BYTES:
                entry.image = None

    def _picture_bytes(self) -> int:
        return sum(3 * entry.image.width * entry.image.height for entry in self.references.values() if entry.image)


class Clock:
    """How far a shard is, read from other threads: seconds spent in each phase, summed over threads, and samples."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.samples_done = 0
        """Samples that are written."""
        self.ticks = 0
        """Grows with every phase and every denoising step: it shows whether anything moves."""
        self._begin = time.monotonic()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            with record_function(phase):  # for --profile
                yield
        finally:
            with self._lock:
                self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - begin, 3)
            self.tick()

    def tick(self) -> None:
        """Something is done."""
        self.ticks += 1

    def elapsed(self) -> float:
        return time.monotonic() - self._begin
