"""Batches of training examples: each worker's share of an epoch, shuffled and prepared ahead, without broken pairs."""

import itertools
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

from vcf_batch import storage
from vcf_batch.errors import RowError, StorageError, UsageError, redact
from vcf_batch.training.captions import CaptionedData, Piece, cut
from vcf_batch.training.tar_samples import CaptionedImage

T = TypeVar("T")

_VALIDATION = "validation"

PREPARED_AHEAD = 64
MOST_IS_BROKEN_AFTER = 32
"""Number of broken pairs after which a worker may stop a pass because most of its data is broken."""
FEWEST_BROKEN = 16
"""Fewest broken pairs of a whole share that end a training as most of it: a share may be a single pair."""
NOTED = 3
"""Number of broken pairs that are named, each once."""


class Feed(Generic[T]):
    """One worker's batches of training examples; use it with ``with``, which ends its threads.

    Args:
        data: the data set to read.
        pieces: the pairs to train on, the same for all workers.
        draw_example: makes an example from a pair and the pair's own random generator, in one of ``threads`` threads.
            Whatever it raises is the pair's fault, except a StorageError and a lack of memory.
        rank, world: number of this worker from 0, and number of workers.
        seed: seed of all randomness.
        buffer: number of undecoded pairs that are shuffled at a time.
        threads: number of threads that call ``draw_example``.
        note: called with a message for each of the first broken pairs.
    """

    def __init__(
        self,
        data: CaptionedData,
        pieces: Sequence[Piece],
        draw_example: Callable[[CaptionedImage, random.Random], T],
        *,
        rank: int,
        world: int,
        seed: int,
        buffer: int,
        threads: int,
        note: Callable[[str], None],
    ) -> None:
        self.data, self.pieces, self.draw_example = data, pieces, draw_example
        self.rank, self.world, self.seed, self.buffer, self.note = rank, world, seed, buffer, note
        self.threads = ThreadPoolExecutor(threads, "pairs")
        self.broken = 0
        """Number of broken pairs met so far, up to the last batch that was returned. Each counts once in an epoch."""
        self.last_broken = ""
        """Name and fault of the last broken pair."""
        self._noted = set[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.threads.shutdown(cancel_futures=True)

    def batches(self, epoch: int, size: int, first: int = 0) -> Generator[list[T], None, None]:
        """Yield batches of ``size`` examples without end. When the worker's share is used up, it begins again.

        The order of the files changes from epoch to epoch. The next batch is made while the last one is used.

        Args:
            epoch: number of the epoch.
            size: number of examples in a batch.
            first: number of batches to skip at the start of the epoch.

        Raises:
            UsageError: most pairs are broken, or all of a share, or a file is damaged.
            StorageError: the storage failed.
        """
        with storage.reading_threads(1, "batches") as behind:
            examples = self._endless(epoch)
            for _ in range(first):
                _take(examples, size)
            following: Future[tuple[list[T], int]] = behind.submit(_take, examples, size)
            try:
                while True:
                    batch, broken = following.result()
                    following = behind.submit(_take, examples, size)
                    self.broken += broken
                    yield batch
            finally:
                following.cancel()

    def all(self) -> list[T]:
        """Every usable example of the worker's share of the validation, once and in order; none if all are broken.

        Raises:
            UsageError: most pairs are broken, or a file is damaged.
            StorageError: the storage failed.
        """
        examples = list(self._examples(self.data.read(self._share(self.pieces)), _VALIDATION))
        self.broken += examples.count(None)
        return [example for example in examples if example is not None]

    def _share(self, pieces: Sequence[Piece]) -> list[Piece]:
        total = sum(map(len, pieces))
        return cut(pieces, total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def _endless(self, epoch: int) -> Iterator[T | None]:
        order = random.Random(f"{self.seed}/{epoch}").sample(self.pieces, len(self.pieces))
        share, rng = self._share(order), random.Random(f"{self.seed}/{epoch}/{self.rank}")
        for number in itertools.count():
            examples = self._examples(shuffled(self.data.read(share), self.buffer, rng), epoch)
            # The first pass has told of the broken pairs.
            yield from examples if number == 0 else (example for example in examples if example is not None)

    def _examples(self, pairs: Iterator[CaptionedImage], epoch: object) -> Iterator[T | None]:
        """Yield the examples of one pass, and None for each broken pair."""
        seen, broken, reason = 0, 0, ""
        kind = "validation pairs" if epoch == _VALIDATION else "pairs"
        for pair, prepared in self._ahead(pairs, epoch):
            seen += 1
            try:
                yield prepared.result()
            except (StorageError, MemoryError):
                raise
            # An odd content makes a library raise nearly any exception.
            except Exception as error:
                broken += 1
                why = str(error) if isinstance(error, RowError) else f"{type(error).__name__}: {error}"
                self.last_broken = reason = f"{redact(pair.name)}: {why}"
                if pair.name not in self._noted and len(self._noted) < NOTED:
                    self._noted.add(pair.name)
                    self.note(f"left out: {reason}")
                if broken > MOST_IS_BROKEN_AFTER and 2 * broken > seen:
                    raise _mostly_broken(broken, seen, kind, reason) from error
                yield None
        # Without any example, a share would begin again for ever. Of a validation, other workers may have the rest.
        nothing = broken == seen and epoch != _VALIDATION
        if nothing or (broken >= FEWEST_BROKEN and 2 * broken > seen):
            raise _mostly_broken(broken, seen, kind, reason)

    def _ahead(self, pairs: Iterator[CaptionedImage], epoch: object) -> Iterator[tuple[CaptionedImage, "Future[T]"]]:
        """Yield each pair with the future of its example. :data:`PREPARED_AHEAD` examples are made ahead."""
        waiting: deque[tuple[CaptionedImage, Future[T]]] = deque()
        for pair in pairs:
            rng = random.Random(f"{self.seed}/{epoch}/{pair.name}")
            waiting.append((pair, self.threads.submit(self.draw_example, pair, rng)))
            if len(waiting) > PREPARED_AHEAD:
                yield waiting.popleft()
        yield from waiting


def _mostly_broken(broken: int, seen: int, kind: str, reason: str) -> UsageError:
    return UsageError(f"{broken:,} of the first {seen:,} {kind} cannot be used, more than half; the last: {reason}")


def shuffled(items: Iterator[T], buffer: int, rng: random.Random) -> Iterator[T]:
    """Yield the items in random order, shuffled within a buffer of ``buffer`` items."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) > buffer:
            place = rng.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()
    rng.shuffle(held)
    yield from held


def _take(examples: Iterator[T | None], size: int) -> tuple[list[T], int]:
    """The next ``size`` examples, and the number of broken pairs between them."""
    batch: list[T] = []
    broken = 0
    while len(batch) < size:
        example = next(examples)
        if example is None:
            broken += 1
        else:
            batch.append(example)
    return batch, broken
