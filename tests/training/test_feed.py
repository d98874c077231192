"""Batches for each worker: shares, shuffling, what is broken."""

import contextlib
import random
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from support.captioned import texts, write_captioned
from vcf_batch.errors import RowError, StorageError, UsageError
from vcf_batch.training.captions import CaptionedData
from vcf_batch.training.feed import Feed, shuffled
from vcf_batch.training.tar_samples import CaptionedImage


def caption(pair: CaptionedImage, rng: random.Random) -> str:
    return pair.captions[0]


def feed(data: CaptionedData, draw_example: Any = caption, **settings: Any) -> Feed[str]:
    defaults: dict[str, Any] = {"rank": 0, "world": 1, "seed": 0, "buffer": 4, "threads": 2, "note": lambda text: None}
    return Feed(data, data.files, draw_example, **{**defaults, **settings})


@pytest.fixture
def data(tmp_path: Path) -> CaptionedData:
    """Four files of six pairs."""
    return CaptionedData.open(str(write_captioned(tmp_path / "data", files=4, pairs=6)))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_an_epoch_is_every_pair_once_over_all_workers(world: int, data: CaptionedData) -> None:
    seen: Counter[str] = Counter()
    for rank in range(world):
        worker = feed(data, rank=rank, world=world)
        share = len(worker.all())
        assert share in (24 // world, 24 // world + 1)
        seen.update(next(worker.batches(0, share)))
    assert set(seen.values()) == {1} and len(seen) == 24


def test_every_epoch_has_an_order_of_its_own_that_can_be_had_again(data: CaptionedData) -> None:
    first, second = ([next(feed(data).batches(epoch, 24)) for epoch in range(3)] for _ in range(2))
    assert first == second
    assert len({tuple(order) for order in first}) == 3
    assert first[0] != sorted(first[0])
    assert next(feed(data, seed=1).batches(0, 24)) != first[0]


def test_batches_begin_again_when_the_share_is_used_up(data: CaptionedData) -> None:
    """Every worker has as many batches as the others, however many of its pairs are broken."""
    batches = list(islice(feed(data).batches(0, 5), 12))
    assert [len(batch) for batch in batches] == [5] * 12
    counts = Counter(text for batch in batches for text in batch)
    assert set(counts.values()) == {2, 3} and len(counts) == 24


def test_the_buffer_shuffles_without_loss() -> None:
    assert list(shuffled(iter(range(5)), 1, random.Random(0))) != []
    for buffer in (1, 3, 100):
        items = list(shuffled(iter(range(50)), buffer, random.Random(0)))
        assert sorted(items) == list(range(50)) and items != sorted(items)
        assert buffer == 100 or all(place >= item - buffer for place, item in enumerate(items))


def test_broken_pairs_are_left_out_counted_and_named(data: CaptionedData) -> None:
    def draw_example(pair: CaptionedImage, rng: random.Random) -> str:
        if pair.captions[0].endswith((".0", ".1")):
            raise RowError("it is broken")
        return pair.captions[0]

    notes: list[str] = []
    worker = feed(data, draw_example, note=notes.append)
    assert worker.all() == [text for text in texts(data.read(data.files)) if not text.endswith((".0", ".1"))]
    assert worker.broken == 8
    assert len(notes) == 3 and notes[0].endswith("00000.tar 00: it is broken")
    assert notes[0].startswith("left out: ")


def test_data_that_is_mostly_broken_ends_the_training(tmp_path: Path, data: CaptionedData) -> None:
    """The error tells how many, and why: at the end of a pass, and within a long one."""

    def draw_example(pair: CaptionedImage, rng: random.Random) -> str:
        raise RowError("the image file is empty")

    with pytest.raises(UsageError, match=r"24 of the first 24 pairs cannot be used, .*: the image file is empty"):
        next(feed(data, draw_example).batches(0, 2))
    large = CaptionedData.open(str(write_captioned(tmp_path / "large", files=1, pairs=300)))
    with feed(large, draw_example) as worker:
        with pytest.raises(UsageError, match="33 of the first 33 pairs cannot be used"):
            next(worker.batches(0, 2))
        with pytest.raises(UsageError, match="33 of the first 33 validation pairs cannot be used"):
            worker.all()


def test_a_broken_pair_is_named_once_and_counts_once_in_an_epoch(data: CaptionedData) -> None:
    """Although a share that is used up begins again, and every epoch meets the pair."""

    def draw_example(pair: CaptionedImage, rng: random.Random) -> str:
        if pair.captions[0] in ("0.0", "3.5"):
            raise RowError("it is broken")
        return pair.captions[0]

    notes: list[str] = []
    with feed(data, draw_example, note=notes.append) as worker:
        for epoch in range(3):
            with contextlib.closing(worker.batches(epoch, 11)) as batches:
                assert [len(batch) for batch in islice(batches, 6)] == [11] * 6
            assert worker.broken == 2 * (epoch + 1)
    assert sorted(note.rpartition("/")[2] for note in notes) == [
        "00000.tar 00: it is broken",
        "00003.tar 35: it is broken",
    ]


def test_a_few_broken_pairs_end_no_training(data: CaptionedData) -> None:
    """Workers judge their shares alone, and one of a few pairs says nothing of the data: all other pairs are used."""

    def draw_example(pair: CaptionedImage, rng: random.Random) -> str:
        if pair.captions[0] in ("0.0", "0.1", "0.2"):
            raise RowError("it is broken")
        return pair.captions[0]

    for rank in range(8):
        with feed(data, draw_example, rank=rank, world=8) as worker:
            assert len(worker.all()) == (3 if rank else 0)
    for rank in range(5):
        with feed(data, draw_example, rank=rank, world=5) as worker:
            assert len(next(worker.batches(0, 4))) == 4


def test_a_share_of_which_all_is_broken_does_not_begin_again_for_ever(data: CaptionedData) -> None:
    """However few pairs it has: there is nothing to train on."""

    def draw_example(pair: CaptionedImage, rng: random.Random) -> str:
        raise RowError("it is broken")

    told = "3 of the first 3 pairs cannot be used, more than half; the last: .*: it is broken"
    with feed(data, draw_example, rank=0, world=8) as worker, pytest.raises(UsageError, match=told):
        next(worker.batches(0, 2))


def test_each_pair_has_randomness_of_its_own(data: CaptionedData) -> None:
    """What is drawn for a pair depends on seed and epoch, not on how many workers there are."""

    def draw(pair: CaptionedImage, rng: random.Random) -> Any:
        return pair.name, rng.random()

    def drawn(epoch: int, size: int, **place: int) -> set[Any]:
        return set(next(feed(data, draw, **place).batches(epoch, size)))

    assert drawn(1, 12, rank=1, world=2) < drawn(1, 24)
    assert not drawn(2, 24) & drawn(1, 24)


def test_nothing_of_a_pair_s_content_ends_the_training(data: CaptionedData) -> None:
    """Whatever a library raises over a pair leaves that pair out, by name; trouble of the storage is passed on."""
    error: Exception = RecursionError("too deep")

    def draw_example(pair: CaptionedImage, rng: random.Random) -> str:
        if pair.captions[0] == "0.1":
            raise error
        return pair.captions[0]

    notes: list[str] = []
    worker = feed(data, draw_example, note=notes.append)
    assert len(worker.all()) == 23
    assert len(notes) == 1 and notes[0].endswith("00000.tar 01: RecursionError: too deep")
    error = StorageError("no answer")
    with pytest.raises(StorageError):
        feed(data, draw_example).all()


def test_its_threads_end_with_it(data: CaptionedData) -> None:
    """Those that prepare pairs and the one that makes batches."""
    before = {*threading.enumerate()}
    with feed(data) as worker, contextlib.closing(worker.batches(0, 4)) as batches:
        next(batches)
        begun = {*threading.enumerate()} - before
    own = [thread for thread in begun if thread.name.startswith(("pairs_", "batches_"))]
    assert {thread.name.partition("_")[0] for thread in own} == {"pairs", "batches"}
    for thread in own:
        thread.join(60)
        assert not thread.is_alive()
