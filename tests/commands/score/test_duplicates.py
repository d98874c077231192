"""Duplicates of an output are found whole or not at all, count as absent once they are stale, and can be left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import vcf_batch
from support import exports, runs
from vcf_batch import images
from vcf_batch.cli import main
from vcf_batch.errors import Unfinished
from vcf_batch.output.output import Output

ROWS, FAILED = 10, 3
HASHES = [0, 7 << 40, 1, 0, (1 << 64) - 1, 7 << 40 | 1, 1 << 20, 3 << 50, (1 << 64) - 2, 5]
"""Hash of each row's image. Row 3 has none."""
SAME = {2: 0, 5: 1, 6: 0, 7: 0, 8: 4, 9: 0}
"""Rows that are duplicates by a distance of 2, each with the first row that stays and that it resembles."""
REFERENCES = [0, 1, 2, 0, None, 2, 0, 1, 2, None]
"""Reference of each row, see :func:`support.runs.write_manifest`."""
SAME_REFERENCES = {5: 2, 6: 0, 7: 1, 8: 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows in three shards, one of them without an image, with the hashes above."""
    folder = tmp_path_factory.mktemp("source")
    hashes = iter(HASHES[:FAILED] + HASHES[FAILED + 1 :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Sample", _hashed(runs.Sample, hashes))
        runs.write_output(runs.write_manifest(folder / "in", ROWS), folder / "out", 4, failed={FAILED})
    return folder / "out"


def _hashed(sample: Any, hashes: Any) -> Any:
    """``Sample`` with the next hash, if it has an image."""

    def build(row: Any, status: Any, *given: Any, **more: Any) -> Any:
        own = {"phash": f"{next(hashes):016x}"} if status == "success" else {}
        return sample(row, status, *given, **own, **more)

    return build


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A copy of the output that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def search(output: Path, *given: object) -> dict[str, Any]:
    """The document of a search by a distance of 2."""
    result = call("score", output, "--with", "duplicates", "--threshold", 2, *given, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def found(output: Path, column: str = "duplicate_of", name: str = "duplicates") -> dict[int, int]:
    """The rows that have a value, with it, by their numbers."""
    tables = [pq.read_table(path) for path in sorted(output.glob(f"_scores/{name}/*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [int(row["key"]) for row in rows] == [*range(ROWS)]
    return {int(row["key"]): int(row[column]) for row in rows if row[column] is not None}


def parquets(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in exports.tree(output / "_scores").items() if name.endswith(".parquet")}


def test_the_first_row_that_stays_is_named(output: Path) -> None:
    """Over all shards, in the order of the manifest; rows without an image take no part. The output keeps its bytes."""
    before = {name: data for name, data in exports.tree(output).items() if "_scores" not in name}
    done = search(output)
    assert done["scores"] == {"duplicates": ["duplicate_of", "reference_duplicate_of"]}
    assert found(output) == SAME and found(output, "reference_duplicate_of") == SAME_REFERENCES
    assert done["notes"] == [
        "6 images are near-duplicates of an earlier one, by phash within 2 bits; 4 rows have the reference of an "
        "earlier one, by SHA-256, so exactly"
    ]
    assert {name: data for name, data in exports.tree(output).items() if "_scores" not in name} == before
    assert call("verify", output).exit_code == 0


def test_other_thresholds_stand_beside_one_another_under_names_of_their_own(output: Path) -> None:
    """Under the same name they are refused, with both values and the remedy."""
    search(output)
    result = call("score", output, "--with", "duplicates", "--threshold", 0)
    assert result.exit_code == 4 and "distance: 2 there, 0 now" in result.output
    assert call("score", output, "--with", "duplicates:exact", "--threshold", 0).exit_code == 0
    assert found(output, "exact_duplicate_of", "exact") == {}


def test_references_of_several_names_are_compared_by_their_bytes(output: Path) -> None:
    """A copy under another name is the same reference; one that cannot be read has no value, and is told."""
    manifest = Path(Output(str(output)).config.manifest)
    other, gone = manifest.parent / "reference2.png", manifest.parent / "reference1.png"
    kept = other.read_bytes(), gone.read_bytes()
    try:
        other.write_bytes((manifest.parent / "reference0.png").read_bytes())
        gone.unlink()
        done = search(output)
        assert found(output, "reference_duplicate_of") == {2: 0, 5: 0, 6: 0, 8: 0}
        assert done["without"] == 2
    finally:
        other.write_bytes(kept[0])
        gone.write_bytes(kept[1])


def test_references_are_near_duplicates_by_a_column_of_hashes(tmp_path: Path) -> None:
    """``reference_phash``, where a manifest carries it."""
    columns = {"reference_phash": [None if value is None else f"{1 << value:016x}" for value in REFERENCES]}
    manifest = runs.write_manifest(tmp_path / "in", ROWS, columns)
    runs.write_output(manifest, tmp_path / "out", 4)
    _with_hashes(tmp_path / "out")
    done = search(tmp_path / "out")
    assert "rows have the reference of an earlier one, by phash within 2 bits" in done["notes"][0]
    assert found(tmp_path / "out", "reference_duplicate_of") == dict.fromkeys((1, 2, 3, 5, 6, 7, 8), 0)


def _with_hashes(output: Path) -> None:
    for path in sorted(output.glob("0*.parquet")):
        files = runs.Files(output, path.stem)
        for row in range(files.table.num_rows):
            files.edit(row, phash=images.perceptual_hash(_noise(int(files.table["key"][row].as_py()))))
        files.write()


def _noise(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_and_rerun_it_ends_with_the_same_bytes(output: Path, after: bool) -> None:
    """Whatever change a call dies at, before or after it; another call commits what is missing, and that alone."""
    search(output)
    expected, steps = parquets(output), 0
    while True:
        shutil.rmtree(output / "_scores")
        if not runs.dies_in_scores(lambda: search(output), steps, after):
            break
        there = len([*output.glob("_scores/duplicates/*_stats.json")])
        assert search(output)["scored"] == 3 - there
        assert parquets(output) == expected
        steps += 1
    assert steps > 6
    assert search(output)["scored"] == 0


def test_a_search_is_stale_once_any_shard_has_changed(output: Path, tmp_path: Path) -> None:
    """Nobody sees its values any more, an export is refused even with ``--partial``, and a new search mends it."""
    search(output)
    files = runs.Files(output, "00000")
    files.edit(0, phash="f" * 16)
    files.write()
    assert {row["duplicate_of"] for row in vcf_batch.Output(output).rows()} == {None}
    told = call("verify", output).output
    assert "3 finished shards" in told
    for partial in (False, True):
        with pytest.raises(
            Unfinished, match=r"'duplicates': vcf-batch score .*/out --with duplicates --by phash --threshold 2$"
        ):
            exports.make(tmp_path / "t", output, split="train=1", partial=partial)
    assert search(output)["scored"] == 3
    assert found(output) == {4: 0, 5: 1, 6: 2, 8: 0, 9: 2}
    exports.make(tmp_path / "t", output, split="train=1")


def test_a_search_among_the_shards_that_there_are(output: Path, tmp_path: Path) -> None:
    """Shards that are not generated yet are told with exit code 6; once they are, the search is stale."""
    receipt = output / "00001_stats.json"
    kept = receipt.read_bytes()
    receipt.unlink()
    result = call("score", output, "--with", "duplicates", "--threshold", 2)
    assert result.exit_code == 6 and "left out" in result.output
    exports.make(tmp_path / "t", output, split="train=1", partial=True, where="duplicate_of IS NULL")
    assert [int(row["key"]) for row in exports.rows(tmp_path / "t")] == [0, 1, 8]
    receipt.write_bytes(kept)
    assert search(output)["scored"] == 3 and found(output) == SAME


def test_an_export_leaves_duplicates_out(output: Path, tmp_path: Path) -> None:
    """``--where "duplicate_of IS NULL"`` keeps one row of each group; rows that are handed on have the column."""
    search(output)
    exports.make(tmp_path / "t", output, split="train=1", where="duplicate_of IS NULL")
    assert [int(row["key"]) for row in exports.rows(tmp_path / "t")] == [0, 1, 4]
    assert {row["duplicate_of"] for row in exports.rows(tmp_path / "t")} == {None}
    exports.make(tmp_path / "all", output, split="train=1")
    assert exports.rows(tmp_path / "all")[2]["duplicate_of"] == "000000000"
    assert call("verify", tmp_path / "all").exit_code == 0


def test_status_and_report_show_duplicates(output: Path) -> None:
    search(output)
    assert "duplicates of 3 shards" in call("status", output).output
    assert call("report", output).exit_code == 0
    text = (output / "index.html").read_text()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["duplicates"] == {"duplicate_of": 6, "reference_duplicate_of": 4}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--with", "duplicates", "--threshold", "17"), "give 0 to 16 of the 64 bits"),
        (("--with", "duplicates", "--threshold", "1.5"), "--threshold 1.5 is no number of bits"),
        (("--with", "duplicates", "--by", "sight"), "--by sight is none of phash"),
        (("--with", "duplicates=model"), "takes no model"),
        (("--with", "texture", "--threshold", "2"), "--threshold 2.0 is for --with duplicates"),
        (("--with", "duplicates", "--with", "duplicates"), "two scores have the name 'duplicates'"),
    ],
)
def test_what_cannot_be_searched_is_refused(output: Path, given: tuple[str, ...], message: str) -> None:
    result = call("score", output, *given)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (output / "_scores").exists()


def test_damage_to_a_search_is_named(output: Path) -> None:
    """As that of any score; and a rerun after deleting what is named mends it."""
    search(output)
    path = output / "_scores/duplicates/00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    result = call("verify", output)
    assert result.exit_code == 5 and "its receipt says" in result.output
    path.with_name("00001_stats.json").unlink()
    assert search(output)["scored"] == 1 and call("verify", output).exit_code == 0
