"""The builder pairs prompts with references in bounded memory, and fixes no noise unless it is asked to."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import UsageError
from vcf_batch.manifest import build as builder
from vcf_batch.manifest.build import Built, build
from vcf_batch.manifest.manifest import Manifest


def rows_of(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_the_cross_product_has_the_seeds_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt comes with every reference and every seed, in order, however rows fall into row groups."""
    monkeypatch.setattr(builder, "_BUILD_ROWS", 5)
    prompts = (line for line in ["a cat\n", "\n", "  a dog  ", "a fox"])
    out = str(tmp_path / "new" / "m.parquet")
    assert build(prompts, ["x.png", "y.png"], out, seeds=4) == Built(24, prompts=3, duplicates=0, blank=1, seeds=4)
    assert [(r["prompt"], r["reference"], r["seed"]) for r in rows_of(out)] == [
        (prompt, reference, seed)
        for prompt in ("a cat", "a dog", "a fox")
        for reference in ("x.png", "y.png")
        for seed in range(4)
    ]
    opened = Manifest.open(out)
    opened.check()
    assert [row.seed for row in opened.rows(0, 4, 0)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("pairing", "seeds"), [("cross", None), ("balanced", None), ("balanced", 3), ("random", None), ("random", 3)]
)
def test_no_seed_is_written_unless_noises_are_to_be_fixed(tmp_path: Path, pairing: str, seeds: int | None) -> None:
    """So 'generate --seed' decides, and no two rows start from the same noise."""
    out = str(tmp_path / "m.parquet")
    built = build(["a cat", "a dog"], ["x.png", "y.png"], out, pairing=pairing, seeds=seeds)
    assert (built.rows, built.seeds) == (4 * (seeds or 1), None)
    assert pq.read_schema(out).names == ["prompt", "reference"]
    first, second = (Manifest.open(out).rows(0, built.rows, run_seed) for run_seed in (0, 1))
    assert len({row.key for row in first}) == built.rows
    assert len({row.seed for row in [*first, *second]}) == 2 * built.rows


def test_duplicate_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    """The first one of equal prompts is kept, in its place; white space around a prompt makes no difference."""
    out = str(tmp_path / "m.parquet")
    built = build(["a cat", "a dog ", " a cat", "a dog", "A cat"], ["x.png"], out)
    assert built == Built(3, prompts=3, duplicates=2, blank=0, seeds=None)
    assert [row["prompt"] for row in rows_of(out)] == ["a cat", "a dog", "A cat"]


def test_duplicate_prompts_are_kept_on_request(tmp_path: Path) -> None:
    """Each has rows of its own, and so other keys and other noises."""
    out = str(tmp_path / "m.parquet")
    built = build(["a cat", "a dog", "a cat"], [], out, keep_duplicates=True)
    assert built == Built(3, prompts=3, duplicates=1, blank=0, seeds=None)
    assert [row["prompt"] for row in rows_of(out)] == ["a cat", "a dog", "a cat"]
    assert len({row.seed for row in Manifest.open(out).rows(0, 3, 0)}) == 3


def test_without_references_the_rows_are_text_only_and_repeatable(tmp_path: Path) -> None:
    """A second build gives the same bytes, and replaces what is there."""
    for name in ("a", "b", "b"):
        assert build(["a cat"], [], str(tmp_path / name), seeds=2).rows == 2
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert [row.references for row in Manifest.open(str(tmp_path / "a")).rows(0, 2, 0)] == [(), ()]


def test_as_many_rows_of_a_pairing_are_written_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Balanced: every prompt and every reference equally often, each pair with all its images."""
    monkeypatch.setattr(builder, "_BUILD_ROWS", 7)
    out = str(tmp_path / "m.parquet")
    prompts, references = [f"cat {n}" for n in range(6)], [f"{n}.png" for n in range(4)]
    assert build(prompts, references, out, pairing="balanced", rows=24, seeds=2).rows == 24
    table = rows_of(out)
    assert set(Counter((row["prompt"], row["reference"]) for row in table).values()) == {2}
    assert set(Counter(row["prompt"] for row in table).values()) == {4}
    assert set(Counter(row["reference"] for row in table).values()) == {6}


def test_a_row_group_has_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts make row groups of fewer rows."""
    monkeypatch.setattr(builder, "_BUILD_BYTES", 1000)
    out = str(tmp_path / "m.parquet")
    build(["a" * 300, "b"], [f"{n}.png" for n in range(4)], out)
    assert [pq.read_metadata(out).row_group(n).num_rows for n in range(3)] == [3, 3, 2]
    monkeypatch.setattr(builder, "_BUILD_BYTES", 10)
    assert build(["a" * 300], [], out).rows == 1


def test_nothing_to_do_is_refused(tmp_path: Path) -> None:
    """And nothing is written."""
    out = str(tmp_path / "m.parquet")
    with pytest.raises(UsageError, match="seeds is 0"):
        build(["a"], [], out, seeds=0)
    with pytest.raises(UsageError, match="no prompts"):
        build([" ", ""], [], out)
    with pytest.raises(
        UsageError, match=r"2 prompts and 1 references with 3 seeds each make 6 different rows: .* 1 to 6"
    ):
        build(["a", "b"], [], out, rows=7, seeds=3)
    with pytest.raises(UsageError, match=r"rows is 3; 2 prompts \(1 duplicates left out\) and 1 references"):
        build(["a", "b", "a"], [], out, rows=3)
    assert list(tmp_path.iterdir()) == []
