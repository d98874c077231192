"""The figures of an output: nothing is counted twice, nothing grows with the rows."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from support import runs
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import Shard
from vcf_batch.report import figures
from vcf_batch.report.figures import Figures, Histogram, Intervals, cause_of


def rows(count: int, start: int = 0, **columns: list[Any]) -> tuple[Shard, pa.Table]:
    """A shard whose scores are the rows' numbers; ``columns`` replace."""
    numbers = [float(number) for number in range(start, start + count)]
    values: dict[str, list[Any]] = {
        "key": [f"k{number:.0f}" for number in numbers],
        "status": ["success"] * count,
        "error_message": [None] * count,
        "prompt": ["p"] * count,
        "reference": ["r.png"] * count,
        "seed": [1] * count,
        "fusion": ["concat"] * count,
        "strength": [0.5] * count,
        "pno_steps": [0] * count,
        **dict.fromkeys(figures.SCORE_LABELS, numbers),
    }
    return Shard(0, start, start + count, "00000"), pa.table(values | columns)


def numbers(chosen: figures.Lowest) -> list[int]:
    return [row.number for row in chosen.rows]


def test_best_and_worst_are_those_of_all_shards_and_each_scores_own_way_round() -> None:
    found = Figures()
    for start in (200, 0, 100):
        found.add_rows(*rows(100, start))
    ends = [*range(figures.EXTREMES)], [*range(299, 299 - figures.EXTREMES, -1)]
    assert (numbers(found.worst["clip_score"]), numbers(found.best["clip_score"])) == ends
    assert (numbers(found.best["lpips"]), numbers(found.worst["lpips"])) == ends
    assert found.best["lpips"].rows[3].record["key"] == "k3"


def test_the_random_sample_depends_on_neither_order_nor_shards() -> None:
    """A row draws its lot by its number: another run of the report shows the same rows."""
    whole, parts = Figures(), Figures()
    whole.add_rows(*rows(3000))
    for start in (2000, 0, 1000):
        parts.add_rows(*rows(1000, start))
    assert numbers(whole.random) == numbers(parts.random)
    assert numbers(whole.points) == numbers(parts.points)
    assert len(set(numbers(whole.points))) == figures.POINTS
    assert np.mean(numbers(whole.points)) == pytest.approx(1500, rel=0.05)


def test_only_samples_are_scored_and_shown() -> None:
    found = Figures()
    status = ["success", "failed", "success", "rejected"]
    nothing: list[Any] = [0.5, 0.1, None, 0.2]
    found.add_rows(*rows(4, status=status, error_message=[None, "no", None, "low"], clip_score=nothing))
    assert found.scores["clip_score"].count == 1
    assert numbers(found.best["clip_score"]) == [0]
    assert sorted(numbers(found.random)) == [0, 2]
    assert [(cause.status, cause.text) for cause in found.causes.values()] == [("failed", "no"), ("rejected", "low")]


def test_memory_does_not_grow_with_causes() -> None:
    found = Figures()
    letters = [chr(ord("a") + n // 26) + chr(ord("a") + n % 26) + "x" * (n // 676) for n in range(600)]
    found.add_rows(*rows(600, status=["failed"] * 600, error_message=letters))
    assert len(found.causes) == figures.MAX_CAUSES + 1
    assert found.causes["failed", "other causes"].count == 100


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("the image is a damaged PNG file of 17 bytes", "the image is a damaged PNG file of 1,234 bytes"),
        ("reference 'a b.png' does not exist", "reference 'c.png' does not exist"),
        ("s3://bucket/a/1.png does not exist", "s3://bucket/b/2.png does not exist"),
        ("/data/a.png is gone", "photos/b.png is gone"),
        ("cat.jpeg is gone", "dog-2.webp is gone"),
        ("hash 0123456789abcdef0123 differs", "hash fedcba98765432100123 differs"),
    ],
)
def test_messages_that_differ_in_names_and_numbers_are_one_cause(one: str, other: str) -> None:
    assert cause_of(one) == cause_of(other)
    assert cause_of(one) != cause_of("another thing altogether")


def test_histograms_count_every_value_and_know_their_quantiles() -> None:
    values = np.random.default_rng(0).normal(0.3, 0.1, 10_000)
    histogram = Histogram()
    for part in np.split(values, 4):
        histogram.add(part)
    start, width, bars = histogram.bars()
    assert sum(bars) == histogram.count == 10_000
    assert len(bars) <= 40
    assert start <= values.min() < start + width
    assert start + width * (len(bars) - 1) <= values.max() < start + width * len(bars)
    assert histogram.mean == pytest.approx(values.mean())
    for share in (0.05, 0.5, 0.95):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.001)


@pytest.mark.parametrize(
    ("middle", "spread", "within"), [(6.0, 1.0, 0.001), (128.0, 40.0, 0.03), (1e9, 1e8, 1e5), (-1e-3, 1e-2, 0.001)]
)
def test_histograms_take_values_of_any_size(middle: float, spread: float, within: float) -> None:
    """Scores that are added may be grades from 1 to 10 or levels up to 255."""
    values = np.random.default_rng(1).normal(middle, spread, 10_000)
    histogram = Histogram()
    for part in np.split(np.sort(values), 4):
        histogram.add(part)
    start, width, bars = histogram.bars()
    assert sum(bars) == histogram.count == 10_000 and 4 <= len(bars) <= 40
    assert start <= values.min() and values.max() <= start + width * len(bars)
    for share in (0.05, 0.5, 0.95):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share), abs=within)


def test_histograms_take_values_far_apart() -> None:
    histogram = Histogram()
    for value in (0.0, -7.0, 1e300, -1e300):
        histogram.add(np.array([value]))
    assert sum(histogram.bars()[2]) == 4
    assert (histogram.low, histogram.high) == (-1e300, 1e300)


def test_intervals_stay_few_and_lose_no_row() -> None:
    """A run of a month and one of a minute take the same memory."""
    intervals = Intervals()
    for hour in (500, 3, 0, 719):
        intervals.add(1e9 + hour * 3600, 1e9 + hour * 3600 + 1800, 900)
    start, rates = intervals.rates()
    assert len(rates) <= figures.MAX_INTERVALS
    assert start <= 1e9
    assert sum(intervals._rows.values()) == pytest.approx(3600)

    short = Intervals()
    short.add(10.5, 12.5, 4)
    assert short.rates() == (10.0, [2, 2, 2])


def test_receipts_tell_time_devices_and_attempts() -> None:
    found = Figures()
    timings = {"ended": "2026-01-01T00:00:10+00:00", "total": 10.0, "sample": 8.0, "model_loads": 1, "worker": "a:1"}
    receipt = Receipt(Shard(0, 0, 5, "00000"), "f", 1, {"success": 5}, {}, {"type": "gpu"}, timings)
    found.add(receipt)
    found.add(dataclasses.replace(receipt, shard=Shard(1, 5, 10, "00001"), attempt=2, device={}, timings={}))
    assert (found.rows, len(found.done), found.retried, found.worker_seconds) == (10, 2, 1, 10)
    assert found.phases == {"sample": 8}
    assert found.devices == {"gpu": 5, "unknown": 5}


def test_finished_shards_of_an_unfinished_run_are_read(tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 10)
    runs.write_output(manifest, tmp_path / "out", 4, failed={1})
    (tmp_path / "out" / "00001_stats.json").unlink()
    found = figures.read(Output(str(tmp_path / "out")))
    assert found.counts == {"success": 5, "rejected": 0, "failed": 1}
    assert {row.number for row in found.random.rows} == {0, 2, 3, 8, 9}

    (tmp_path / "out" / "00002.parquet").write_bytes(b"x" * (tmp_path / "out" / "00002.parquet").stat().st_size)
    with pytest.raises(DamageFound, match=r"00002\.parquet cannot be read"):
        figures.read(Output(str(tmp_path / "out")))
    for name in ("00000", "00002"):
        (tmp_path / "out" / f"{name}_stats.json").unlink()
    with pytest.raises(UsageError, match="no finished shard"):
        figures.read(Output(str(tmp_path / "out")))
