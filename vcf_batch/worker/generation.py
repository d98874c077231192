"""One shard on its way through a worker: its rows cut into batches, sampled, scored, encoded and written.

Sampling never waits for what can be done beside it: a pool of threads reads and decodes references ahead of it, and one
thread scores, encodes and writes behind it. Two shards may be on their way at once. One of them is sampled: of the
other, the first references are read meanwhile, or the last samples scored and written.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from vcf_batch import sharding
from vcf_batch.errors import OutOfDeviceMemory
from vcf_batch.records import Objective, Reference, Row, Sample
from vcf_batch.row_settings import settings_of
from vcf_batch.vcf import pno
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.guide import Guide
from vcf_batch.worker import batches
from vcf_batch.worker.batches import Batch
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components
from vcf_batch.worker.finishing import Finisher
from vcf_batch.worker.shard_references import ShardReferences

BATCHES_AHEAD = 2
"""Batches whose references are read before sampling gets to them."""

BATCHES_BEHIND = 2
"""Sampled batches that may wait for scoring and writing before sampling pauses: a bound on memory."""

TURN_SECONDS = 1.0
"""Between two signs of life of a shard that waits until another one is sampled."""


class Generation:
    """Generates the rows of one shard, once.

    What is computed together depends on the manifest alone, never on what failed or is left out.

    Args:
        components: what to generate with.
        rows: of the shard.
        known: samples by the number of their row, which are handed on as they are: the row is not touched, and keeps
            its place in its batch as padding (:mod:`vcf_batch.worker.padding`). A batch of padding alone is not
            sampled.
        write: takes the samples, in the order of the rows.
        clock: where the time went.
        last_attempt: trouble of storage or network with one reference fails its rows. Before that it raises: only what
            repeats, and on another node if there is one, is blamed on a row.
        sampled_at_once: rows at most, if fewer than a batch has. The samples may then differ in their last bits.
    """

    def __init__(
        self,
        components: Components,
        rows: Sequence[Row],
        known: Mapping[int, Sample],
        write: Callable[[Sample], None],
        clock: Clock,
        last_attempt: bool,
        sampled_at_once: int | None,
    ) -> None:
        self.components, self.pipeline, self.config, self.clock = (
            components,
            components.pipeline,
            components.config,
            clock,
        )
        batch_size = cast(int, components.config.batch_size)
        self.sampled_at_once = min(sampled_at_once or batch_size, batch_size)
        self.padding = {position for position, row in enumerate(rows) if row.number in known}
        self.rows = rows = batches.neutral(rows, self.padding, self.config.negative_prompt)
        self.settings = [settings_of(row, self.config) for row in rows]
        self.batches = batches.cut(rows, self.settings, batch_size)
        self.references = ShardReferences(components, self.batches, rows, last_attempt, clock)
        self.finisher = Finisher(components, rows, self.settings, self.padding, known, write, clock)
        self.texts: dict[str, Tensor] = {}
        self.text_last_batch = {
            text: batch.number
            for batch in self.batches
            for position in batch.positions
            for text in self._texts(position)
        }
        self.ahead = iter(self.batches)
        self.reading: deque[Batch] = deque()
        """Batches that are not sampled yet, and whose references are read."""
        self.behind: deque[tuple[Batch, Future[bool]]] = deque()
        """Batches that are sampled, and finished now."""

    def run(self) -> None:
        """Sample every batch; score and write them in the background; return when the last sample is written.

        Raises:
            OutOfDeviceMemory: the GPU's memory does not hold a batch.
            VcfBatchError: storage or network failed.
        """
        try:
            with self.references:
                self._run()
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"out of GPU memory with {self.sampled_at_once} images of "
                f"{self.config.width}x{self.config.height} at once; rerun the command with --allow-smaller-batches, or "
                "use a smaller --batch-size (which makes it another run, in another output)"
            ) from error

    def _run(self) -> None:
        self._read_ahead()
        thread = ThreadPoolExecutor(1, "finish", initializer=self.components.device.use_threads)
        try:
            with self._turn():
                for batch in self.batches:
                    self._read_ahead()
                    self.reading.popleft()
                    with self.clock("wait_for_references"):
                        self.references.collect(batch)
                    with self.clock("sample"):
                        batch.text_tokens, batch.image_tokens = self._text_tokens(batch), self.references.tokens(batch)
                        self._sample(batch)
                    while len(self.behind) >= BATCHES_BEHIND:
                        self._settle_first(thread)
                    self._finish(thread, batch)
                while self.behind and self.config.attempts > 1:
                    self._settle_first(thread)
            while self.behind:
                self._settle_first(thread)
        finally:
            thread.shutdown(cancel_futures=True)

    def _finish(self, thread: ThreadPoolExecutor, batch: Batch) -> None:
        self.behind.append((batch, thread.submit(self.finisher.finish, batch)))

    def _settle_first(self, thread: ThreadPoolExecutor) -> None:
        """Wait until a batch is scored, then sample it again, or let go of it."""
        batch, finishing = self.behind.popleft()
        with self.clock("wait_for_scores"):
            is_settled = finishing.result()
        if is_settled:
            self._release(batch)
            return
        batch.attempt += 1
        with self.clock("sample"):
            self._sample(batch)
        self._finish(thread, batch)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other shard is sampled; then let every denoising step show that something moves."""
        with self.clock("wait_for_turn"):
            while not self.components.sampling.acquire(timeout=TURN_SECONDS):
                self.clock.tick()  # nothing hangs here: the other shard would
        hook = self.pipeline.unet.register_forward_hook(lambda *_: self.clock.tick())
        try:
            yield
        finally:
            hook.remove()
            self.components.sampling.release()

    def _read_ahead(self) -> None:
        while len(self.reading) <= BATCHES_AHEAD and (batch := next(self.ahead, None)):
            self.references.read(batch)
            self.reading.append(batch)

    def _texts(self, position: int) -> tuple[str, str]:
        return self.rows[position].prompt, self.settings[position]["negative_prompt"]

    def _sample(self, batch: Batch) -> None:
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

    def _generate(self, batch: Batch, part: slice) -> tuple[Tensor, list[Objective | None]]:
        """Sample some rows of a batch: float32 ``[B, 3, H, W]`` in [0, 1], and how prompt-noise optimisation went."""
        settings = [self.settings[position] for position in batch.positions[part]]
        inputs = self._inputs(batch, part)
        if settings[0]["pno_steps"]:
            return self._optimize(settings, batch.pictures[part], inputs)
        return self.pipeline.generate_from_tokens(**inputs), [None] * len(settings)

    def _generate_twins(self, batch: Batch, part: slice) -> Tensor:
        """What the prompts of some rows of a batch make of the same noise alone."""
        inputs = self._inputs(batch, part)
        return self.pipeline.generate_from_tokens(**inputs | {"fusions": [Fusion()] * len(inputs["fusions"])})

    def _inputs(self, batch: Batch, part: slice) -> dict[str, Any]:
        """What some rows of a batch are sampled from."""
        positions = batch.positions[part]
        settings = [self.settings[position] for position in positions]
        return {
            "text_tokens": torch.stack([batch.text_tokens[self.rows[position].prompt] for position in positions]),
            "negative_tokens": torch.stack([batch.text_tokens[used["negative_prompt"]] for used in settings]),
            "fusions": [self._fusion(position, batch.image_tokens) for position in positions],
            "seeds": [sharding.attempt_seed(used["seed"], batch.attempt) for used in settings],
            "guidance_scale": [used["guidance_scale"] for used in settings],
            "steps": self.config.steps,
            "scheduler": self.config.scheduler,
            "eta": self.config.eta,
            "guidance_lo": self.config.guidance_lo,
            "guidance_hi": self.config.guidance_hi,
            "deep_cache": settings[0]["deep_cache"],  # the same for the whole batch
            "height": self.config.height,
            "width": self.config.width,
        }

    def _optimize(
        self, settings: Sequence[Mapping[str, Any]], pictures: Sequence[list[Image.Image]], inputs: Mapping[str, Any]
    ) -> tuple[Tensor, list[Objective | None]]:
        """Sample with prompt-noise optimisation."""
        guide = cast(Guide, self.components.guide)
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
            unconditional = self.references.blank
        return Fusion(
            image_tokens=[image_tokens[reference] for reference in row.references],
            mode=used["fusion"],
            strength=used["strength"],
            weights=used["reference_weights"],
            unconditional=unconditional,
            lo=used["fusion_lo"],
            hi=used["fusion_hi"],
        )

    def _text_tokens(self, batch: Batch) -> dict[str, Tensor]:
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

    def _release(self, batch: Batch) -> None:
        """Let go of what no later batch needs."""
        batch.pictures, batch.images, batch.twins, batch.targets = [], None, None, None
        batch.text_tokens, batch.image_tokens = {}, {}
        self.references.release(batch)
