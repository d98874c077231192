"""A part of a manifest's rows is read as the whole manifest would read them, and no other row is."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import ManifestError
from vcf_batch.manifest.manifest import Manifest


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Two files of 10 rows in groups of 4, without ids: the first four prompts are blank, which no part may have."""
    for file in range(2):
        first = 10 * file
        columns: dict[str, list[Any]] = {
            "prompt": [" " if row < 4 else f"cat {row}" for row in range(first, first + 10)],
            "fusion": ["naive" if row == 17 else None for row in range(first, first + 10)],
        }
        pq.write_table(pa.table(columns), tmp_path / f"{file}.parquet", row_group_size=4)
    return str(tmp_path)


@pytest.mark.parametrize("part", [range(4, 9), range(8, 12), range(11, 20), range(19, 20)])
def test_rows_of_a_part_are_those_of_the_whole(url: str, part: range) -> None:
    """With their numbers, keys and seeds."""
    opened, whole = Manifest.open(url, part=part), Manifest.open(url)
    assert (opened.num_rows, opened.first_row, opened.stop) == (len(part), part.start, part.stop)
    assert not opened.is_whole and whole.is_whole
    rows = opened.rows(part.start, part.stop, 5)
    assert rows == whole.rows(part.start, part.stop, 5)
    assert [row.number for row in rows] == [int(row.key) for row in rows] == [*part]
    assert [*opened.first_rows(3, 5)] == rows[:3]
    assert opened.prompts(2) == [f"cat {row}" for row in part[:2]]
    with pytest.raises(ValueError, match=f"rows 0 to 1 were asked for; the manifest has {part.start} to {part.stop}"):
        opened.rows(0, 1, 5)


def test_only_rows_of_a_part_are_checked_and_counted(url: str) -> None:
    assert Manifest.open(url, part=range(4, 20)).check().rows == 16
    with pytest.raises(ManifestError, match="1 row is empty"):
        Manifest.open(url, part=range(3, 20)).check()
    assert Manifest.open(url, part=range(4, 17)).values("fusion", ["naive"]) == set()
    assert Manifest.open(url, part=range(4, 18)).values("fusion", ["naive"]) == {"naive"}
    assert not Manifest.open(url, part=range(4, 17)).has_any("fusion")
    assert Manifest.open(url, part=range(17, 18)).has_any("fusion")


def test_the_identity_of_a_part_covers_its_rows(url: str) -> None:
    """As with a limit, rows from the manifest's first one to the part's last one."""
    assert Manifest.open(url, part=range(4, 8)).identity == Manifest.open(url, 8).identity
    assert Manifest.open(url, part=range(8, 12)).identity != Manifest.open(url, part=range(4, 8)).identity


def test_a_part_that_is_not_there_is_refused(url: str) -> None:
    with pytest.raises(ManifestError, match=r"rows is 4:21, and .* has 20 rows, numbered from 0: end at 20 at most"):
        Manifest.open(url, part=range(4, 21))
