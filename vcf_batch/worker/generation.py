"""One shard on its way through a worker: its rows cut into batches, sampled, scored, encoded and written.

Other work is done beside the sampling: a pool of threads reads and decodes references ahead of it, and one thread
scores, encodes and writes behind it. Two shards may be on their way at once. While one of them is sampled, the other's
first references are read, or its last samples are scored and written.
"""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from vcf_batch import sharding
from vcf_batch.config.limits import IP_ADAPTER
from vcf_batch.errors import OutOfDeviceMemory
from vcf_batch.models.forward_pass import ForwardPass, outputs
from vcf_batch.records import Lora, Objective, Sample
from vcf_batch.vcf import pno
from vcf_batch.vcf.base.family import EncodedText
from vcf_batch.vcf.fusion import Fusion, filled
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.roles.reach import mask_of
from vcf_batch.vcf.roles.role import role_of
from vcf_batch.worker import batches
from vcf_batch.worker.batches import Batch, Pictures
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components
from vcf_batch.worker.finishing import Finisher
from vcf_batch.worker.lora.shard_loras import ShardLoras
from vcf_batch.worker.shard_references import ShardReferences
from vcf_batch.worker.shard_rows import ShardRows

BATCHES_AHEAD = 2
"""Number of batches whose references are read ahead of the sampling."""

BATCHES_BEHIND = 2
"""Number of sampled batches that wait for scoring and writing at which sampling pauses: a bound on memory."""

TURN_SECONDS = 1.0
"""Seconds after which a shard that waits for its turn notes progress."""


_Text = tuple[tuple[Lora, ...], str]
"""A text as its encoder sees it with LoRAs, which may change its tokens."""


class Generation:
    """Generation of the rows of one shard, once.

    The batches depend on the manifest alone, never on failed rows or padding. A batch of which every row has failed or
    is padding is neither encoded nor sampled nor scored.

    Args:
        components: the components to generate with.
        rows: the rows of the shard. Known samples are handed on as they are.
        write: takes a sample of each row, in the order of the rows.
        clock: the clock of the shard.
        last_attempt: whether trouble of storage or network with one reference fails its rows. Before the last attempt
            it raises, since a row is blamed only for a failure that repeats.
        sampled_at_once: largest number of rows sampled at once, if that is less than a batch; else None. The samples
            may then differ in their last bits.
    """

    def __init__(
        self,
        components: Components,
        rows: ShardRows,
        write: Callable[[Sample], None],
        clock: Clock,
        last_attempt: bool,
        sampled_at_once: int | None,
    ) -> None:
        self.components, self.pipeline, self.config = components, components.pipeline, components.config
        self.clock, self.shard_rows, self.rows, self.settings = clock, rows, rows.rows, rows.settings
        batch_size = cast(int, components.config.batch_size)
        self.sampled_at_once = min(sampled_at_once or batch_size, batch_size)
        self.batches = batches.cut(rows, batch_size)
        self.references = ShardReferences(components, self.batches, rows, last_attempt, clock)
        self.loras = ShardLoras(components.loras, rows, last_attempt, clock)
        self.finisher = Finisher(components, rows, write, clock)
        self.text_passes: dict[_Text, ForwardPass[str, str, EncodedText]] = {}
        """The passes that encode the texts that this or a later batch needs."""
        self.text_last_batch = {
            (rows.loras[position], text): batch.number
            for batch in self.batches
            for position in batch.positions
            for text in rows.texts(position)
        }
        self.ahead = iter(self.batches)
        self.reading: deque[Batch] = deque()
        """Batches that are not sampled yet and whose references are being read."""
        self.behind: deque[tuple[Batch, Future[bool]]] = deque()
        """Batches that are sampled and being finished, with what :meth:`Finisher.finish` will return."""

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
                    self.loras.collect(batch)
                    if self._has_work(batch):
                        self.loras.switch(batch)
                    with self.clock("sample"):
                        texts, references = self._texts(batch), self.references.passes(batch)
                        if self._has_work(batch):
                            batch.texts = outputs(texts)
                            batch.image_tokens = {sight: own[sight[1]] for sight, own in references.items()}
                            self._sample(batch)
                    while len(self.behind) >= BATCHES_BEHIND:
                        self._take_first(thread)
                    self._finish(thread, batch)
                while self.behind and self.config.attempts > 1:
                    self._take_first(thread)
            while self.behind:
                self._take_first(thread)
        finally:
            thread.shutdown(cancel_futures=True)

    def _finish(self, thread: ThreadPoolExecutor, batch: Batch) -> None:
        self.behind.append((batch, thread.submit(self._finish_beside, batch)))

    def _finish_beside(self, batch: Batch) -> bool:
        with self.components.device.beside():
            return self.finisher.finish(batch)

    def _take_first(self, thread: ThreadPoolExecutor) -> None:
        """Wait until the first sampled batch is scored; then release it, or sample its next draw."""
        batch, finishing = self.behind.popleft()
        if batch.images is not None:
            with self.clock("sample"):  # a GPU may have its last steps to do
                batch.images.wait()
        with self.clock("wait_for_scores"):
            is_done = finishing.result()
        if is_done:
            self._release(batch)
            return
        batch.draw += 1
        self.loras.switch(batch)
        with self.clock("sample"):
            self._sample(batch)
        self._finish(thread, batch)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other shard is sampled; within the block, note progress for every denoising step."""
        with self.clock("wait_for_turn"):
            while not self.components.sampling.acquire(timeout=TURN_SECONDS):
                self.clock.note_progress()  # if anything hangs, it is the other shard
        hook = self.pipeline.unet.register_forward_hook(lambda *_: self.clock.note_progress())
        try:
            yield
        finally:
            hook.remove()
            self.components.sampling.release()

    def _read_ahead(self) -> None:
        while len(self.reading) <= BATCHES_AHEAD and (batch := next(self.ahead, None)):
            self.references.read(batch)
            self.loras.ask(batch)
            self.reading.append(batch)

    def _has_work(self, batch: Batch) -> bool:
        """Whether the batch has a row that is not padding and has not failed."""
        return not self.shard_rows.padding.union(batch.errors).issuperset(batch.positions)

    def _sample(self, batch: Batch) -> None:
        """Sample one draw of a batch.

        Failed rows and rows that get no other draw are sampled too, so that their neighbours do not depend on them.
        """
        starts = range(0, len(batch.positions), self.sampled_at_once)
        parts = [slice(start, start + self.sampled_at_once) for start in starts]
        sampled = [self._generate(batch, part) for part in parts]
        batch.images = Pictures(torch.cat([pictures for pictures, _ in sampled]))
        batch.objectives = [objective for _, objectives in sampled for objective in objectives]
        if self.config.triplets:
            # Twins are sampled apart, so that the images have the bytes and take the memory of a run without twins.
            batch.twins = Pictures(torch.cat([self._generate_twins(batch, part) for part in parts]))

    def _generate(self, batch: Batch, part: slice) -> tuple[Tensor, list[Objective | None]]:
        """Sample some rows of a batch.

        Returns:
            Images, float32 ``[B, 3, H, W]`` in [0, 1], and the course of prompt-noise optimisation of each row.
        """
        settings = [self.settings[position] for position in batch.positions[part]]
        inputs = self._inputs(batch, part)
        if settings[0]["pno_steps"]:
            return self._optimize(settings, batch.pictures[part], inputs)
        return self.pipeline.generate_from_tokens(**inputs), [None] * len(settings)

    def _generate_twins(self, batch: Batch, part: slice) -> Tensor:
        """Images ``[B, 3, H, W]`` of the prompts alone for some rows of a batch, from the same noise."""
        inputs = self._inputs(batch, part)
        return self.pipeline.generate_from_tokens(**inputs | {"fusions": [Fusion()] * len(inputs["fusions"])})

    def _inputs(self, batch: Batch, part: slice) -> dict[str, Any]:
        """The arguments of :meth:`vcf_batch.vcf.pipeline.VCFPipeline.prepare` for some rows of a batch."""
        positions = batch.positions[part]
        settings = [self.settings[position] for position in positions]
        texts = [self._encoded_texts(batch, position) for position in positions]
        return {
            "text_tokens": [prompt for prompt, _ in texts],
            "negative_tokens": [negative for _, negative in texts],
            "fusions": [self._fusion(batch, position) for position in positions],
            "seeds": [sharding.draw_seed(used["seed"], batch.draw) for used in settings],
            "guidance_scale": [used["guidance_scale"] for used in settings],
            # The rows of a batch have the same deep_cache, because they have the same pno_steps.
            "sampling": dataclasses.replace(self.config.sampling, deep_cache=settings[0]["deep_cache"]),
        }

    def _encoded_texts(self, batch: Batch, position: int) -> tuple[EncodedText, EncodedText]:
        """A row's prompt and negative prompt, of as many windows."""
        windows, (prompt, negative, *empty) = self.shard_rows.windows[position], self.shard_rows.texts(position)
        both = batch.texts[prompt], batch.texts[negative]
        if not empty:
            return both
        length, nothing = windows * self.pipeline.max_tokens, batch.texts[empty[0]].tokens
        first, second = (text._replace(tokens=filled(text.tokens, length, nothing)) for text in both)
        return first, second

    def _optimize(
        self, settings: Sequence[Mapping[str, Any]], pictures: Sequence[list[Image.Image]], inputs: Mapping[str, Any]
    ) -> tuple[Tensor, list[Objective | None]]:
        """Sample rows with prompt-noise optimisation, and return the same as :meth:`_generate`."""
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
        return found, [*course]

    def _fusion(self, batch: Batch, position: int) -> Fusion:
        """Fusion of a row, with its references' tokens ``[N, Dt]``."""
        row, used, image_tokens = self.rows[position], self.settings[position], batch.image_tokens
        adapted, unconditional = used["fusion"] == IP_ADAPTER, None
        if row.negative_reference is not None:
            unconditional = image_tokens[adapted, row.negative_reference]
        elif row.references:
            unconditional = self.references.unconditional(used["unconditional"], adapted)
        tokens = [image_tokens[adapted, reference] for reference in row.references]
        roles = used["reference_roles"] and [role_of(name, adapted) for name in used["reference_roles"]]
        if roles:
            tokens = [self.pipeline.project(*each, adapted) for each in zip(tokens, roles, strict=True)]
        masks = batch.masks.get(position)
        return Fusion(
            image_tokens=tokens,
            mode=used["fusion"],
            strength=used["strength"],
            weights=used["reference_weights"],
            unconditional=unconditional,
            lo=used["fusion_lo"],
            hi=used["fusion_hi"],
            roles=roles,
            masks=masks and [mask and mask_of(mask) for mask in masks],
        )

    def _texts(self, batch: Batch) -> dict[str, ForwardPass[str, str, EncodedText]]:
        """The passes of the batch's prompts and negative prompts. Each distinct text is in one pass of the shard."""
        loras = self.shard_rows.loras[batch.positions[0]]
        wanted = dict.fromkeys(text for position in batch.positions for text in self.shard_rows.texts(position))
        new = {text: text for text in wanted if (loras, text) not in self.text_passes}
        encode = functools.partial(self.pipeline.family.encode, chunked=self.config.long_prompts == "chunk")
        self.text_passes.update(dict.fromkeys(((loras, text) for text in new), ForwardPass(new, encode)))
        passes = {text: self.text_passes[loras, text] for text in wanted}
        for text in wanted:
            if self.text_last_batch[loras, text] == batch.number:
                del self.text_passes[loras, text]
        return passes

    def _release(self, batch: Batch) -> None:
        """Release the contents of the batch, and the references that no later batch needs."""
        batch.pictures, batch.images, batch.twins, batch.targets = [], None, None, None
        batch.masks = {}
        batch.texts, batch.image_tokens, batch.loras = {}, {}, []
        self.references.release(batch)
