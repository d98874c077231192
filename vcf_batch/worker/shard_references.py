"""The references of a shard: read ahead of the sampling, encoded once each, released after their last batch."""

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self, cast

from PIL import Image
from torch import Tensor

from vcf_batch.errors import RowError, StorageError, VcfBatchError
from vcf_batch.models.forward_pass import ForwardPass
from vcf_batch.records import Reference
from vcf_batch.vcf.arguments import BLANK
from vcf_batch.worker.batches import Batch, Sight
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components
from vcf_batch.worker.shard_rows import ShardRows

REFERENCE_READERS = 8
"""Number of threads that read references. They wait for storage most of the time."""

PICTURE_BYTES = 1 << 30
"""Bytes of decoded references that a shard keeps for later batches. Images beyond this limit are read again."""


@dataclass
class _Entry:
    """One distinct reference of a shard."""

    number: int
    """Place among the distinct references of the shard, from 0."""
    batches_left: int = 0
    """Number of batches that need the reference and are not finished."""
    holders: int = 0
    """Number of batches that need the image now: they are read ahead, sampled or being finished."""
    adapted: set[bool] = field(default_factory=set)
    """The encoders that its rows need: the IP-Adapter's (True), the aligner's (False)."""
    reading: "Future[tuple[Image.Image, dict[bool, Image.Image]]] | None" = None
    """The read under way, which gives ``image`` and ``squashed``."""
    image: Image.Image | None = None
    """The decoded image; None before it is read, and after it is dropped."""
    squashed: dict[bool, Image.Image] = field(default_factory=dict)
    """The image as each encoder takes it, until its pass has it."""
    error: str | None = None
    """Reason why the rows of the reference fail."""
    encodings: dict[bool, ForwardPass[Reference, Image.Image, Tensor]] = field(default_factory=dict)
    """The passes that give the tokens ``[N, Dt]``, by encoder."""

    def wait(self, blamed: type[VcfBatchError] | tuple[type[VcfBatchError], ...]) -> None:
        """Wait for the read under way, if there is one.

        Args:
            blamed: errors that fail the rows of the reference. Any other error is raised.

        Raises:
            StorageError: storage or network failed, and ``blamed`` does not have it.
        """
        if self.image is None and self.reading is not None:
            try:
                self.image, self.squashed = self.reading.result()
            except blamed as error:
                self.error = str(error)
                # A plain image stands in, so that the batch keeps its shape. No two are equal, so that none are merged.
                self.image = Image.new("RGB", (64, 64), (self.number % 256, self.number // 256 % 256, 128))
                self.squashed = dict.fromkeys(self.adapted, self.image)
            self.reading = None


class ShardReferences:
    """Reader and encoder of the references of one shard; use it with ``with``.

    Args:
        components: the components to read and encode with.
        batches: the batches of the shard, in order.
        rows: the rows of the shard.
        last_attempt: whether trouble of storage or network with one reference fails its rows. Before the last attempt
            it raises.
        clock: the clock of the shard.
    """

    def __init__(
        self, components: Components, batches: Sequence[Batch], rows: ShardRows, last_attempt: bool, clock: Clock
    ) -> None:
        self._components, self._rows, self._clock = components, rows, clock
        self._blamed = (RowError, StorageError) if last_attempt else RowError
        self._entries: dict[Reference, _Entry] = {}
        self._unconditional: dict[tuple[str, bool], Tensor | None] = {}
        for batch in batches:
            for reference in batch.distinct_references():
                entry = self._entries.setdefault(reference, _Entry(len(self._entries)))
                entry.batches_left += 1
            for adapted, reference in batch.sights(rows.settings):
                self._entries[reference].adapted.add(adapted)

    def __enter__(self) -> Self:
        self._readers = ThreadPoolExecutor(REFERENCE_READERS, "references")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._readers.shutdown(cancel_futures=True)

    def read(self, batch: Batch) -> None:
        """Start reading the batch's references."""
        for reference in batch.distinct_references():
            entry = self._entries[reference]
            entry.holders += 1
            if entry.image is None and entry.reading is None:
                entry.reading = self._readers.submit(self._read_one, reference)

    def _read_one(self, reference: Reference) -> tuple[Image.Image, dict[bool, Image.Image]]:
        """Image of a reference, and its form for each encoder. Runs in a thread beside the sampling."""
        with self._clock("read_references"):
            image = self._components.references.read(reference)
            squash, needed = self._components.pipeline.squash, self._entries[reference].adapted
            return image, {adapted: squash(image, adapted=adapted) for adapted in sorted(needed)}

    def collect(self, batch: Batch) -> None:
        """Wait for the batch's references; fill in its pictures and masks, and the errors of rows that fail.

        Raises:
            StorageError: storage or network failed, and this is not the last attempt.
        """
        for position, references in zip(batch.positions, batch.references, strict=True):
            entries = [self._entries[reference] for reference in references]
            for entry in entries:
                entry.wait(self._blamed)
            row = self._rows.rows[position]
            shown = entries[: len(row.references)]
            batch.pictures.append([cast(Image.Image, entry.image) for entry in shown])
            if any(row.masks):
                decoded = iter(entries[len(row.encoded) :])
                batch.masks[position] = [next(decoded).image if mask else None for mask in row.masks]
            error = next((entry.error for entry in entries[: len(row.encoded)] if entry.error), None)
            error = error or next((f"reference_masks: {each.error}" for each in entries if each.error), None)
            if error:
                batch.errors[position] = error

    def passes(self, batch: Batch) -> dict[Sight, ForwardPass[Reference, Image.Image, Tensor]]:
        """The passes of the batch's references, which give the tokens ``[N, Dt]``.

        Each reference is in one pass of the shard for each encoder.
        """
        wanted = batch.sights(self._rows.settings)
        for adapted in (False, True):
            entries = {key: self._entries[key] for own, key in wanted if own == adapted}
            new = {key: entry for key, entry in entries.items() if adapted not in entry.encodings}
            encode = functools.partial(self._encoded, adapted=adapted)
            encoding = ForwardPass({key: entry.squashed[adapted] for key, entry in new.items()}, encode)
            for entry in new.values():
                entry.encodings[adapted] = encoding
            for entry in entries.values():
                entry.squashed.pop(adapted, None)
        return {(adapted, key): self._entries[key].encodings[adapted] for adapted, key in wanted}

    def unconditional(self, choice: str, adapted: bool) -> Tensor | None:
        """Tokens ``[N, Dt]`` of the unconditional side in rows without a negative reference; None for none.

        Args:
            choice: ``blank``, or anything else for the encoder's own zeros.
            adapted: whether the IP-Adapter's are asked for.
        """
        if (choice, adapted) not in self._unconditional:
            tokens = self._components.pipeline.adapter.nothing() if adapted else None
            if choice == "blank":
                tokens = self._encoded([BLANK], adapted=adapted)[0]
            self._unconditional[choice, adapted] = tokens
        return self._unconditional[choice, adapted]

    def _encoded(self, pictures: list[Image.Image], *, adapted: bool) -> Tensor:
        pipeline, config = self._components.pipeline, self._components.config
        return pipeline.encode_references(pictures, config.image_tokens, adapted=adapted)

    def release(self, batch: Batch) -> None:
        """Release the references that no later batch needs, and images beyond :data:`PICTURE_BYTES`."""
        for reference in batch.distinct_references():
            entry = self._entries[reference]
            entry.holders -= 1
            entry.batches_left -= 1
            if not entry.batches_left:
                del self._entries[reference]
            elif not entry.holders and not entry.error and self._picture_bytes() > PICTURE_BYTES:
                entry.image = None

    def _picture_bytes(self) -> int:
        return sum(3 * entry.image.width * entry.image.height for entry in self._entries.values() if entry.image)
