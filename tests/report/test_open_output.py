"""An output read from Python: its rows, images and state, and its cell in a notebook."""

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vcf_batch
from support import runs
from vcf_batch import storage
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output import shards
from vcf_batch.report import notebook_cell

ROWS, SHARD_SIZE, FAILED = 24, 8, 7
EVIL = "<script>alert('x')</script> & \x1b[31m"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """24 rows in three shards, in another order of keys than of rows; one failed, and one has a prompt that attacks."""
    columns: dict[str, list[Any]] = {
        "sample_id": [f"id-{row * 7 % ROWS}" for row in range(ROWS)],
        "prompt": [EVIL if row == 1 else f"prompt {row}" for row in range(ROWS)],
    }
    manifest = runs.write_manifest(tmp_path / "in", ROWS, columns)
    return Path(runs.write_output(manifest, tmp_path / "out", SHARD_SIZE, failed={FAILED}).config.output)


def opened(output: Path) -> "vcf_batch.Output":
    return vcf_batch.Output(str(output))


def numbers(rows: Iterator[dict[str, Any]]) -> list[int]:
    return [int(row["label"].removeprefix("row ")) for row in rows]


def test_rows_come_in_the_order_of_the_manifest_with_the_values_of_the_parquets(output: Path) -> None:
    assert [*opened(output).rows()] == runs.rows_of(output)


def test_an_output_may_be_named_by_a_path(output: Path) -> None:
    assert vcf_batch.Output(str(output)).url == vcf_batch.Output(Path(output)).url
    with pytest.raises(UsageError, match="the output is 5, a int; give a folder or URL"):
        vcf_batch.Output(5)  # type: ignore[arg-type]


def test_a_condition_selects_rows(output: Path) -> None:
    """It is that of `repair`: SQL over the columns, carried ones too."""
    found = opened(output)
    assert numbers(found.rows("status = 'failed'")) == [FAILED]
    assert numbers(found.rows("clip_score >= 1.25 AND label <> 'row 21'")) == [20, 22, 23]
    assert numbers(found.rows("false")) == []


@pytest.mark.parametrize("where", ["nothing > 1", "status =", "key IN (SELECT 'id-1')", "getenv('HOME') = ''"])
def test_what_is_no_condition_is_refused_before_the_first_row(output: Path, where: str) -> None:
    with pytest.raises(UsageError, match="is not a condition on the columns key, status"):
        opened(output).rows(where)


def test_only_committed_rows_are_given(output: Path) -> None:
    """A shard without its receipt, or with a file of another size, is left out."""
    (output / "00001_stats.json").unlink()
    (output / "00002.tar").write_bytes(b"cut")
    assert numbers(opened(output).rows()) == [*range(8)]
    for path in output.glob("*_stats.json"):
        path.unlink()
    assert [*opened(output).rows("no condition at all")] == []


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard of ten row groups, the first row needs no more bytes than the footer and the first group."""
    rows = 10 * shards.ROWS_PER_GROUP
    labels = [f"{row:09d}" * 100 for row in range(rows)]
    output = Path(big_output(tmp_path, rows, {"label": labels}))
    parquet = pq.ParquetFile(output / "00000.parquet")
    groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
    assert len(groups) == 10
    read: list[tuple[int, int]] = []
    open_read = storage.open_read

    def spied(url: str) -> Any:
        file = open_read(url)
        if not url.endswith(".parquet"):
            return file

        class Spy(io.RawIOBase):
            def read(self, size: int = -1) -> bytes:
                begin = file.tell()
                data = file.read(size)
                read.append((begin, begin + len(data)))
                return data

            def seek(self, *place: int) -> int:
                return int(file.seek(*place))

            def tell(self) -> int:
                return int(file.tell())

            def readable(self) -> bool:
                return True

            def seekable(self) -> bool:
                return True

        return Spy()

    monkeypatch.setattr(storage, "open_read", spied)
    found = opened(output).rows()
    assert next(found)["label"] == labels[0]
    second = groups[1].column(0).dictionary_page_offset or groups[1].column(0).data_page_offset
    last = groups[-1].column(groups[-1].num_columns - 1)
    data_end = last.data_page_offset + last.total_compressed_size
    ends = [stop for _, stop in read if stop <= data_end]  # without the footer
    assert ends and max(ends) <= second
    assert sum(1 for _ in found) == rows - 1


def big_output(folder: Path, rows: int, columns: dict[str, list[Any]], shard_size: int | None = None) -> str:
    """An output of failed rows, which need no pictures."""
    manifest = runs.write_manifest(folder / "in", rows, {"reference": [None] * rows, **columns})
    return runs.write_output(manifest, folder / "out", shard_size or rows, failed=range(rows)).config.output


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Eight times the rows, and eight times the shards, hold no more at once, with a condition or without."""

    def peak(output: str, where: str | None) -> int:
        found = vcf_batch.Output(output)
        before = pa.total_allocated_bytes()
        highest = 0
        tracemalloc.start()
        for number, _ in enumerate(found.rows(where)):
            if not number % 64:
                highest = max(highest, pa.total_allocated_bytes() - before)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest + python

    sizes = {rows: big_output(tmp_path / str(rows), rows, {"label": ["x" * 500] * rows}, 512) for rows in (1024, 8192)}
    for where in (None, "label <> 'y'"):
        few, many = (peak(output, where) for output in sizes.values())
        assert many < 1.5 * few, where


def test_an_image_is_found_by_its_key(output: Path) -> None:
    """In whatever shard it is; the pixels are those of the tar."""
    found = opened(output)
    for number in (0, 9, 23):
        expected = Image.open(io.BytesIO(runs.png(number, 32))).convert("RGB")
        assert found.image(f"id-{number * 7 % ROWS}").tobytes() == expected.tobytes()


def test_a_key_that_is_a_number_costs_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows have no ids, the others are not even opened."""
    manifest = runs.write_manifest(tmp_path / "in", ROWS)
    output = Path(runs.write_output(manifest, tmp_path / "out", 2).config.output)
    names: list[str] = []
    open_parquet = shards.open_parquet

    def noted(url: str) -> Any:
        names.append(storage.name(url))
        return open_parquet(url)

    monkeypatch.setattr(shards, "open_parquet", noted)
    expected = Image.open(io.BytesIO(runs.png(17, 32))).convert("RGB")
    assert opened(output).image("000000017").tobytes() == expected.tobytes()
    assert names[0] == "00008.parquet"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (f"id-{FAILED * 7 % ROWS}", "has no image, it is failed: no"),
        ("id-99", "none of the 3 finished shards has a row with the key 'id-99'"),
    ],
)
def test_a_row_without_an_image_is_told(output: Path, key: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        opened(output).image(key)


def test_a_damaged_tar_is_told(output: Path) -> None:
    tar = output / "00000.tar"
    tar.write_bytes(b"x" * tar.stat().st_size)
    with pytest.raises(DamageFound, match=r"00000\.tar cannot be read"):
        opened(output).image("id-0")


def test_the_summary_is_that_of_status(output: Path) -> None:
    """In words as the command prints it, in a notebook as well."""
    found = opened(output).summary()
    assert found.state == "finished" and +found.totals.counts == {"success": ROWS - 1, "failed": 1}
    assert str(found) == repr(found) and f"{ROWS - 1} success, 0 rejected, 1 failed" in str(found)


def test_the_cell_shows_state_and_pictures_as_text_that_cannot_act(output: Path) -> None:
    """Prompts come from anyone: no tag of theirs is one of the page's."""
    cell = opened(output)._repr_html_()
    assert cell.count("<img ") == 2 * notebook_cell.PICTURES - 1 and "finished, 24 of 24 rows" in cell
    assert "<script" not in cell and "&lt;script&gt;" in cell and "\x1b" not in cell


def test_the_cell_names_the_embedded_model_as_such(tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 2)
    runs.write_output(manifest, tmp_path / "out", 2, model="tiny")
    assert "tiny (embedded test model)" in opened(tmp_path / "out")._repr_html_()


def test_the_cell_is_of_bounded_size(tmp_path: Path) -> None:
    """Whatever is in it: many rows, long prompts, pictures of noise, a name of any length."""
    prompts = ["p" * 50_000] * 200
    manifest = runs.write_manifest(tmp_path / "in", 200, {"prompt": prompts})
    pictures = [runs.png(number, 512) for number in range(3)]
    for number, data in enumerate(pictures):
        (tmp_path / "in" / f"reference{number}.png").write_bytes(data)
    runs.write_output(manifest, tmp_path / ("o" * 200), 50)
    cell = opened(tmp_path / ("o" * 200))._repr_html_()
    assert len(cell) < 512 << 10


def test_the_cell_of_a_damaged_or_unfinished_output_says_so(output: Path) -> None:
    (output / "00001.parquet").write_bytes(b"x" * (output / "00001.parquet").stat().st_size)
    cell = opened(output)._repr_html_()
    assert "00001.parquet cannot be read" in cell and "24 of 24 rows" in cell
    for path in output.glob("*_stats.json"):
        path.unlink()
    (output / "_progress.json").unlink(missing_ok=True)
    cell = opened(output)._repr_html_()
    assert "stopped, 0 of 24 rows" in cell and "<img" not in cell
