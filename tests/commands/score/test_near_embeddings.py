"""Near-duplicates by embeddings are those that a comparison of all pairs finds, and clusters miss few."""

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vcf_batch.commands.score.duplicates import near_embeddings
from vcf_batch.commands.score.duplicates.near_embeddings import EmbeddingComparison
from vcf_batch.errors import UsageError

NONE = np.empty((0, 1), np.float16)
ROWS, WIDTH, CENTRES = 1200, 24, 30


def embeddings(rows: int = ROWS) -> np.ndarray:
    """``[rows, WIDTH]`` float16 of length 1, around a few centres: near and nearest to one another, and in chains."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((CENTRES, WIDTH))[rng.integers(0, CENTRES, rows)]
    found = found + 0.24 * rng.random((rows, 1)) * rng.standard_normal((rows, WIDTH))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def one_by_one(values: np.ndarray, cosine: float) -> list[int]:
    """The definition: the first earlier row that stays and is near, else the row itself."""
    cosines = values.astype(np.float64) @ values.astype(np.float64).T
    firsts: list[int] = []
    staying: list[int] = []
    for row, own in enumerate(cosines):
        firsts.append(next((other for other in staying if own[other] >= cosine), row))
        staying += [row] if firsts[-1] == row else []
    return firsts


def compared(values: np.ndarray, cosine: float, parts: Sequence[int], sample: np.ndarray = NONE) -> list[int]:
    """The first like of each row, with the rows added in parts that end there."""
    comparison = EmbeddingComparison(cosine, len(values), sample)
    for part in np.split(values, parts):
        comparison.add(part)
    return comparison.firsts().tolist()


@pytest.mark.parametrize("cosine", [0.5, 0.9, 0.97, 0.99, 1.0])
@pytest.mark.parametrize(("parts", "at_once"), [((), 4096), ((500, 501, 1100), 300), ((7, 7, 600), 13)])
def test_duplicates_are_those_of_a_comparison_of_all_pairs(
    cosine: float, parts: Sequence[int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes together, and however many pairs are looked at together."""
    monkeypatch.setattr(near_embeddings, "_AT_ONCE", at_once)
    monkeypatch.setattr(near_embeddings, "_PAIRS", at_once)
    values = embeddings()
    expected = one_by_one(values, cosine)
    assert compared(values, cosine, parts) == expected
    assert 1 < len({*expected}) <= len(expected)


def test_equal_rows_have_the_first_of_them() -> None:
    """Many of them, at a cosine that rounding of their length may miss by a little."""
    values = np.repeat(embeddings(3), 400, axis=0)
    assert compared(values, 0.999, (100, 900)) == [0] * 400 + [400] * 400 + [800] * 400


def test_clusters_miss_few_and_what_they_find_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any number of threads; and nothing is found that is not near."""
    monkeypatch.setattr(near_embeddings, "EXACT_ROWS", 1000)
    monkeypatch.setattr(near_embeddings, "_AT_ONCE", 50)
    values = embeddings()
    faiss = near_embeddings.faiss()
    threads, found = faiss.omp_get_max_threads(), []
    for number in (1, 1, 2):
        faiss.omp_set_num_threads(number)
        try:
            found.append(compared(values, 0.97, (), values[::2]))
        finally:
            assert faiss.omp_get_max_threads() == number
            faiss.omp_set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    exact = one_by_one(values, 0.97)
    assert np.mean(np.array(found[0]) != np.array(exact)) < 0.02
    wide = values.astype(np.float64)
    assert all((wide[row] * wide[first]).sum() >= 0.97 for row, first in enumerate(found[0]) if row != first)


def test_a_few_rows_of_many_need_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sample has none of them: references that few rows have."""
    monkeypatch.setattr(near_embeddings, "EXACT_ROWS", 2)
    values = embeddings(20)
    assert compared(values, 0.9, ()) == one_by_one(values, 0.9)
    assert EmbeddingComparison(0.9, 5, NONE).firsts().tolist() == []


def test_a_missing_library_is_told_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *given: Any, **more: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return importing(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs faiss.*pip install 'vcf-batch\[duplicates\]'"):
        EmbeddingComparison(0.9, 5, NONE)
