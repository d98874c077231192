"""The pictures of a shard and what they are compared with, read and decoded by threads ahead of the scoring."""

import contextlib
import hashlib
import itertools
import queue
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from vcf_batch import images
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.config.strengths import reference_shares
from vcf_batch.errors import RowError, StorageError, VcfBatchError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.shown import Shown
from vcf_batch.output import shards
from vcf_batch.output.output import Output
from vcf_batch.records import Reference, Row, Shard

AHEAD = 64
"""Rows of a shard that are decoded ahead."""
READERS = 4
"""Threads that decode pictures and read references."""
KEPT_BYTES = 1 << 28
"""Bytes of decoded references that a shard keeps for later rows."""

_NEEDED = ("key", "status", "prompt", "sha256", "reference_weights")
_END = object()


@dataclass(frozen=True, slots=True)
class Seat:
    """A row of a shard on its way to a score."""

    place: int
    """Its place in the shard, from 0."""
    key: str
    shown: Shown | None
    """None for a row without an image, or one that cannot be scored."""
    prepared: Sequence[Any] = ()
    """What each scorer has prepared of the picture."""
    error: str | None = None
    """Why a row with an image cannot be scored."""


class ShardPictures:
    """The rows of one committed shard, in order; use it with ``with``. Threads begin to read at once.

    Args:
        output: the output.
        shard: the shard.
        prepare: the scorers' ways to prepare a picture.
        references: reader of references; None if no scorer asks for them.
        twins: whether twins are read.
        whole_rows: whether rows have all of their columns, or those alone that scoring needs.
        left_out: reasons of rows that are not scored, by number.
    """

    def __init__(
        self,
        output: Output,
        shard: Shard,
        prepare: Sequence[Callable[[NDArray[np.uint8]], Any]],
        references: ReferenceReader | None,
        twins: bool,
        whole_rows: bool,
        left_out: Mapping[int, str],
    ) -> None:
        self._output, self._shard, self._prepare, self._references = output, shard, prepare, references
        self._twins, self._whole_rows, self._left_out = twins, whole_rows, left_out
        self._known: OrderedDict[Reference, Future[Image.Image]] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._stopped = threading.Event()

    def __enter__(self) -> Iterator[Seat]:
        self._threads = ThreadPoolExecutor(READERS, "pictures")
        self._reader = threading.Thread(target=self._read, name="tar", daemon=True)
        self._reader.start()
        return self._seats()

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        with contextlib.suppress(queue.Empty):  # lets a reader end that waits for room
            while True:
                self._queue.get_nowait()
        self._reader.join()
        self._threads.shutdown(cancel_futures=True)

    def _seats(self) -> Iterator[Seat]:
        """Each row of the shard.

        Raises:
            StorageError: the storage failed, or the shard is damaged.
        """
        while (found := self._queue.get()) is not _END:
            if isinstance(found, BaseException):
                raise found
            yield found.result() if isinstance(found, Future) else found

    def _read(self) -> None:
        """Read the tar and the rows into the queue."""
        try:
            for found in self._begun():
                self._put(found)
            self._put(_END)
        except VcfBatchError as error:
            self._put(error)
        # A damaged file may hold anything.
        except (tarfile.TarError, pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
            self._put(self._damaged(f"{type(error).__name__}: {error}"))
        except BaseException as error:
            self._put(error)
            raise

    def _put(self, found: Any) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(found, timeout=0.5)
                return

    def _begun(self) -> Iterator[Seat | Future[Seat]]:
        config, shard = self._output.config, self._shard
        rows: Iterator[Row | None] = itertools.repeat(None, len(shard))
        if self._references:
            rows = self._output.manifest_rows(shard.start, shard.stop)
        samples = shards.read_samples(shards.file_url(self._output.url, shard, "tar"))
        place = itertools.count()
        with shards.open_parquet(shards.file_url(self._output.url, shard, "parquet")) as parquet:
            columns = None if self._whole_rows else [*_NEEDED]
            for batch in parquet.iter_batches(shards.ROWS_AT_ONCE, columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    row, number = next(rows), next(place)
                    if record["status"] != "success":
                        yield Seat(number, record["key"], None)
                        continue
                    sample = next(samples, None)
                    if sample is None or sample["__key__"] != record["key"]:
                        raise self._damaged(f"its tar has no image of row {record['key']!r}")
                    if reason := self._left_out.get(shard.start + number):
                        yield Seat(number, record["key"], None, error=reason)
                        continue
                    image = sample[config.image_format]
                    twin = sample.get(f"content.{config.image_format}") if self._twins else None
                    if hashlib.sha256(image).hexdigest() != record["sha256"]:
                        raise self._damaged(f"row {record['key']!r} has another sha256")
                    yield self._threads.submit(self._seat, number, record, image, twin, row)

    def _seat(self, place: int, record: Mapping[str, Any], image: bytes, twin: bytes | None, row: Row | None) -> Seat:
        try:
            picture = np.asarray(images.decode(image, MAX_PIXELS))
            shown = Shown(
                picture,
                record["prompt"],
                [self._reference(reference) for reference in row.references] if row else (),
                reference_shares(record["reference_weights"], len(row.references)) if row else (),
                None if twin is None else np.asarray(images.decode(twin, MAX_PIXELS)),
                record,
            )
            return Seat(place, record["key"], shown, [prepare(picture) for prepare in self._prepare])
        except RowError as error:
            return Seat(place, record["key"], None, error=str(error))

    def _reference(self, reference: Reference) -> Image.Image:
        """A reference, which one thread reads for all."""
        assert self._references
        with self._lock:
            known = self._known.get(reference)
            if is_new := known is None:
                known = self._known[reference] = Future()
            self._known.move_to_end(reference)
        if is_new:
            try:
                known.set_result(self._references.read(reference))
            except BaseException as error:
                known.set_exception(error)
            with self._lock:
                self._forget()
        return known.result()

    def _forget(self) -> None:
        """Drop the references that were not used for longest, beyond :data:`KEPT_BYTES`."""
        sizes = {
            reference: 3 * image.width * image.height
            for reference, known in self._known.items()
            if known.done() and not known.exception() and (image := known.result())
        }
        excess = sum(sizes.values()) - KEPT_BYTES
        for reference, size in sizes.items():
            if excess > 0 and len(self._known) > 1:
                del self._known[reference]
                excess -= size

    def _damaged(self, how: str) -> StorageError:
        return StorageError(
            f"shard {self._shard.name} cannot be read ({how}); see 'vcf-batch verify {self._output.url}'"
        )
