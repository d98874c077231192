"""From pairs to batches: each worker's share of an epoch, shuffled, prepared ahead, without what is broken."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from vcf_batch.errors import RowError, UsageError, redact
from vcf_batch.training.captions import CaptionedData, CaptionedImage, Piece, cut

T = TypeVar("T")

PREPARED_AHEAD = 64
MOST_IS_BROKEN_AFTER = 32
"""Broken pairs before a worker may conclude, within a pass, that most of its data is broken."""
NOTED = 3
"""Broken pairs that are named."""


class Feed(Generic[T]):
    """One worker's batches of training examples.

    Args:
        data: where pairs are read.
        pieces: the pairs to train on; all workers give the same.
        prepare: makes an example of a pair in one of ``threads`` threads, with randomness of that pair's own; raises
            RowError for one that is broken.
        rank, world: this worker, of how many.
        seed: of all randomness.
        buffer: pairs that are shuffled at a time, undecoded.
        threads: that prepare.
        note: is told of the first broken pairs.
    """

    def __init__(
        self,
        data: CaptionedData,
        pieces: Sequence[Piece],
        prepare: Callable[[CaptionedImage, random.Random], T],
        *,
        rank: int,
        world: int,
        seed: int,
        buffer: int,
        threads: int,
        note: Callable[[str], None],
    ) -> None:
        self.data, self.pieces, self.prepare = data, pieces, prepare
        self.rank, self.world, self.seed, self.buffer, self.note = rank, world, seed, buffer, note
        self.threads = ThreadPoolExecutor(threads)
        self.broken = 0
        """Pairs that could not be used, among those before and in the batches that were handed out."""
        self._notes = 0

    def batches(self, epoch: int, size: int, first: int = 0) -> Iterator[list[T]]:
        """Batches of ``size`` examples without end: when the share is used up, it begins again.

        Its files come in another order in every epoch. The next batch is made while the last one is used.

        Args:
            first: batches at the epoch's start to pass over.

        Raises:
            UsageError: most pairs are broken, or a file is damaged.
            StorageError: the storage failed.
        """
        with ThreadPoolExecutor(1) as behind:
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
        """Every usable example of the share, once and in order.

        Raises:
            UsageError, StorageError: as :meth:`batches`.
        """
        examples = list(self._examples(self.data.read(self._share(self.pieces)), "validation"))
        self.broken += examples.count(None)
        return [example for example in examples if example is not None]

    def _share(self, pieces: Sequence[Piece]) -> list[Piece]:
        total = sum(map(len, pieces))
        return cut(pieces, total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def _endless(self, epoch: int) -> Iterator[T | None]:
        order = random.Random(f"{self.seed}/{epoch}").sample(self.pieces, len(self.pieces))
        share, rng = self._share(order), random.Random(f"{self.seed}/{epoch}/{self.rank}")
        while True:
            yield from self._examples(shuffled(self.data.read(share), self.buffer, rng), epoch)

    def _examples(self, pairs: Iterator[CaptionedImage], epoch: object) -> Iterator[T | None]:
        """The examples of one pass; None for each broken pair."""
        seen, broken = 0, 0
        for pair, prepared in self._ahead(pairs, epoch):
            seen += 1
            try:
                yield prepared.result()
            except RowError as error:
                broken += 1
                reason = f"{redact(pair.name)}: {error}"
                if self._notes < NOTED:
                    self._notes += 1
                    self.note(f"left out: {reason}")
                if broken > MOST_IS_BROKEN_AFTER and 2 * broken > seen:
                    raise _mostly_broken(broken, seen, reason) from error
                yield None
        if 2 * broken > seen:
            raise _mostly_broken(broken, seen, reason)

    def _ahead(self, pairs: Iterator[CaptionedImage], epoch: object) -> Iterator[tuple[CaptionedImage, "Future[T]"]]:
        """Pairs, and what is made of them in the background, a few ahead."""
        waiting: deque[tuple[CaptionedImage, Future[T]]] = deque()
        for pair in pairs:
            rng = random.Random(f"{self.seed}/{epoch}/{pair.name}")
            waiting.append((pair, self.threads.submit(self.prepare, pair, rng)))
            if len(waiting) > PREPARED_AHEAD:
                yield waiting.popleft()
        yield from waiting


def _mostly_broken(broken: int, seen: int, reason: str) -> UsageError:
    return UsageError(f"{broken:,} of the first {seen:,} pairs cannot be used, more than half; the last: {reason}")


def shuffled(items: Iterator[T], buffer: int, rng: random.Random) -> Iterator[T]:
    """The items in random order, as far as a buffer of so many lets them move."""
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
    """The next ``size`` examples, and how many broken pairs came between."""
    batch: list[T] = []
    broken = 0
    while len(batch) < size:
        example = next(examples)
        if example is None:
            broken += 1
        else:
            batch.append(example)
    return batch, broken
