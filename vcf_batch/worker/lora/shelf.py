"""The LoRAs that a worker holds in memory, and the switch that its model has."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from vcf_batch.errors import ModelError
from vcf_batch.manifest.references import LoraReader
from vcf_batch.records import Lora, Reference
from vcf_batch.vcf.lora.switch import LoraSwitch
from vcf_batch.vcf.lora.weights import LoraWeights, layers_of, read
from vcf_batch.vcf.pipeline import VCFPipeline

RESIDENT = 16
"""Largest number of LoRAs of rows that a worker holds. Beyond it the one that was asked for least recently is dropped.
Those of the run stay."""
RESIDENT_BYTES = 4 << 30
"""Bytes of weights at which LoRAs of rows are dropped, too, down to one."""
LORA_READERS = 2
"""Number of threads that read LoRAs."""


class LoraShelf:
    """LoRAs of a worker, for all its shards. Any thread may ask for one.

    Args:
        pipeline: the model, with the weights of its base.
        reader: reader of the files that rows name.
        run: the file of each of the run's LoRAs, by name.
        use_threads: called in each thread that reads.

    Raises:
        ModelError: a LoRA of the run is damaged, or does not fit the model.
    """

    def __init__(
        self, pipeline: VCFPipeline, reader: LoraReader, run: Mapping[str, str], use_threads: Callable[[], object]
    ) -> None:
        self._pipeline, self._reader, self._layers = pipeline, reader, layers_of(pipeline)
        self.switch = LoraSwitch(self._layers)
        self.loads = 0
        """Number of files that rows have named and that were read so far."""
        self._run: dict[str, Future[LoraWeights]] = {name: Future() for name in run}
        for name, file in run.items():
            self._run[name].set_result(self._read_file(name, file))
        self._asked: dict[str, Future[LoraWeights]] = {}
        """LoRAs of rows, that of the latest request last."""
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(LORA_READERS, "loras", initializer=use_threads)

    def ask(self, lora: Lora) -> "Future[LoraWeights]":
        """The LoRA, which is read in another thread if the shelf does not hold it.

        Its errors are those of :meth:`vcf_batch.manifest.references.FileReader.read_bytes` and
        :func:`vcf_batch.vcf.lora.weights.read`.
        """
        if not lora.is_file:
            return self._run[lora.source]
        with self._lock:
            held = self._asked.pop(lora.source, None)
            if held is None or (held.done() and held.exception()):
                held = self._threads.submit(self._read, lora.source)
                self.loads += 1
            self._asked[lora.source] = held
            self._drop()
        return held

    @property
    def resident(self) -> list[str]:
        """The LoRAs of rows that are held, that of the latest request last."""
        return [*self._asked]

    def _drop(self) -> None:
        sizes = {source: _size(held) for source, held in self._asked.items()}
        for source in [*sizes][:-1]:
            if len(sizes) <= RESIDENT and sum(sizes.values()) <= RESIDENT_BYTES:
                return
            del sizes[source], self._asked[source]

    def _read(self, source: str) -> LoraWeights:
        data = self._reader.read_bytes(Reference(uri=source))
        return read(data, f"LoRA {Lora(source, None).shown().rpartition(':')[0]!r}", self._pipeline, self._layers)

    def _read_file(self, name: str, file: str) -> LoraWeights:
        try:
            with open(file, "rb") as opened:
                data = opened.read()
        except OSError as error:
            raise ModelError(f"LoRA {name} cannot be read on this node: {error}") from error
        return read(data, f"LoRA {name}", self._pipeline, self._layers)


def _size(held: "Future[LoraWeights]") -> int:
    return held.result().size if held.done() and not held.exception() else 0
