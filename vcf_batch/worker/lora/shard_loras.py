"""The LoRAs of a shard: asked for ahead of the sampling, and given to the model for each batch."""

from concurrent.futures import Future

from vcf_batch.errors import ModelError, RowError, StorageError, VcfBatchError
from vcf_batch.vcf.lora.weights import LoraWeights
from vcf_batch.worker.batches import Batch
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.lora.shelf import LoraShelf
from vcf_batch.worker.shard_rows import ShardRows


class ShardLoras:
    """LoRAs of the batches of one shard.

    Args:
        shelf: the LoRAs of the worker; None in a run without any.
        rows: the rows of the shard.
        last_attempt: whether trouble of storage or network with a LoRA fails its rows. Before the last attempt it
            raises.
        clock: the clock of the shard.
    """

    def __init__(self, shelf: LoraShelf | None, rows: ShardRows, last_attempt: bool, clock: Clock) -> None:
        self._shelf, self._rows, self._clock = shelf, rows, clock
        self._blamed: tuple[type[VcfBatchError], ...] = (RowError, ModelError)
        if last_attempt:
            self._blamed = (*self._blamed, StorageError)
        self._asked: dict[int, list[Future[LoraWeights]]] = {}
        """The LoRAs of each batch that is read ahead, by its number."""

    def ask(self, batch: Batch) -> None:
        """Start reading the batch's LoRAs. A batch that is all padding needs none."""
        if self._shelf is not None and not self._rows.padding.issuperset(batch.positions):
            loras = self._rows.loras[batch.positions[0]]
            self._asked[batch.number] = [self._shelf.ask(lora) for lora in loras]

    def collect(self, batch: Batch) -> None:
        """Wait for the batch's LoRAs; all rows of the batch fail with one that cannot be used.

        Raises:
            StorageError: storage or network failed, and this is not the last attempt.
        """
        if not (asked := self._asked.pop(batch.number, [])):
            return
        loras = self._rows.loras[batch.positions[0]]
        with self._clock("wait_for_loras"):
            try:
                weights = [held.result() for held in asked]
            except self._blamed as error:
                batch.errors = {**dict.fromkeys(batch.positions, str(error)), **batch.errors}
                return
        batch.loras = [(own, lora.scale or 0.0) for own, lora in zip(weights, loras, strict=True)]

    def switch(self, batch: Batch) -> None:
        """Give the model the LoRAs of a batch that is sampled next, which may be none."""
        if self._shelf is not None:
            with self._clock("switch_loras"):
                self._shelf.switch.use(batch.loras)
