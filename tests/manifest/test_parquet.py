"""Parquet in bounded memory, and without a crash, whatever its footer says."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import ManifestError
from vcf_batch.manifest import contract, parquet
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.records import Row

WRITTEN = Path(__file__).parents[1] / "data" / "manifests"


@pytest.mark.parametrize("length", [5, 100_000, 4_000_000])
def test_batches_fit_in_memory(tmp_path: Path, length: int) -> None:
    """Memory does not grow with the manifest, nor with the length of its texts, written out or in a dictionary."""
    long = [f"{n}" * (length // 3) for n in range(100, 116)]
    pq.write_table(pa.table({"prompt": long, "note": long}), tmp_path / "plain.parquet")
    bomb = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 0] * 10_000, pa.int32()), ["x" * length, "y"])
    path = tmp_path / "dictionary.parquet"
    pq.write_table(pa.table({"prompt": bomb, "note": bomb}), path, dictionary_pagesize_limit=1 << 30)
    for name in ("plain", "dictionary"):
        opened = Manifest.open(str(tmp_path / f"{name}.parquet"))
        for _, batch in opened._batches(["prompt"], 0, opened.num_rows, 65_536):
            assert batch.nbytes <= parquet.BATCH_BYTES + 16 * length
        opened.check()
    errors = [row.error for row in opened.rows(20_000, 20_004, 0)]
    if length > contract.MAX_CARRIED_BYTES:
        assert errors == [f"the carried columns have {length} bytes; the limit is 1000000", None, None, errors[0]]


def test_a_damaged_footer_never_ends_the_process(tmp_path: Path) -> None:
    """A manifest is usable or refused: pyarrow's accessors abort on some statistics, so none are looked at."""
    path = tmp_path / "m.parquet"
    table = pa.table({"prompt": ["a"] * 3, "sample_id": ["x", "y", "z"], "reference": ["r"] * 3})
    pq.write_table(table, path, store_schema=False)
    good = path.read_bytes()
    outcomes = set()
    for at in range(len(good) - 8 - int.from_bytes(good[-8:-4], "little"), len(good) - 8):
        path.write_bytes(good[:at] + b"\x7f" + good[at + 1 :])
        try:
            opened = Manifest.open(str(path))
            opened.check()
            assert len(opened.rows(0, min(opened.num_rows, 9), 0)) == min(opened.num_rows, 9)
            opened.has_any("reference")
        except ManifestError as error:
            outcomes.add(str(error).partition(str(path))[2][:40])
    assert any("it ends after 0 of" in outcome for outcome in outcomes), "a footer that promises rows is found out"
    assert len(outcomes) > 3


def test_an_index_outside_of_its_dictionary_is_damage(tmp_path: Path) -> None:
    """Arrow decodes such a page without a complaint, and fails where the text is used."""
    path = tmp_path / "m.parquet"
    texts = pa.table({"prompt": ["a cat", "a dog", "a hat"] * 20, "sample_id": [f"{n}" for n in range(60)]})
    pq.write_table(texts, path, compression="none")
    good, outcomes = path.read_bytes(), set()
    for at in range(4, len(good) - 8 - int.from_bytes(good[-8:-4], "little")):
        path.write_bytes(good[:at] + b"\xff" + good[at + 1 :])
        try:
            opened = Manifest.open(str(path))
            opened.check()
            opened.rows(0, 60, 0)
        except ManifestError as error:
            outcomes.add(str(error).partition(str(path))[2])
    assert " is damaged: column 'prompt' has the dictionary index 3, and its dictionary has 3 values" in outcomes


TEXT_ENCODINGS = ("PLAIN", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY")
COMPRESSIONS = ("none", "snappy", "gzip", "zstd", "lz4", "brotli")


def encoded(path: Path, table: pa.Table, encoding: str, **options: Any) -> str:
    """Write a table whose texts all have one encoding."""
    texts = [
        name for name in ("prompt", "sample_id", "reference.list.element") if name.split(".")[0] in table.schema.names
    ]
    kind = {} if encoding == "RLE_DICTIONARY" else {"column_encoding": dict.fromkeys(texts, encoding)}
    pq.write_table(table, path, use_dictionary=encoding == "RLE_DICTIONARY", **kind, **options)
    return str(path)


@pytest.mark.parametrize("encoding", TEXT_ENCODINGS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_every_encoding_is_read_in_every_compression(tmp_path: Path, encoding: str, kind: pa.DataType) -> None:
    """Every encoding that pyarrow reads is read, flat and in lists, with any compression and version of pages."""
    texts = [f"a long common beginning {number}" for number in range(300)]
    lists = pa.array([[text, "b.png"] if text[-1] != "7" else None for text in texts], pa.list_(pa.string()))
    table = pa.table({"prompt": pa.array(texts, kind), "reference": lists, "sample_id": [f"k-{n}" for n in range(300)]})
    expected: list[Row] = []
    for compression, pages in itertools.product(COMPRESSIONS, ("1.0", "2.0")):
        options = {"compression": compression, "data_page_version": pages, "row_group_size": 110}
        opened = Manifest.open(encoded(tmp_path / f"{compression}.parquet", table, encoding, **options))
        opened.check()
        found = opened.rows(0, 300, 0)
        assert [row.prompt for row in found] == texts
        expected = expected or found
        assert found == expected


@pytest.mark.parametrize(("length", "rows"), [(5, 30_000), (30_000, 8_000), (2_000_000, 50)])
def test_delta_encoded_texts_fit_in_memory(tmp_path: Path, length: int, rows: int) -> None:
    """A text may name what it shares with the one before, so a few kilobytes of a file may stand for gigabytes."""
    table = pa.table({"prompt": pa.array(["x" * length] * rows)})
    opened = Manifest.open(encoded(tmp_path / "m.parquet", table, "DELTA_BYTE_ARRAY"))
    before = pa.total_allocated_bytes()
    for _, batch in opened._batches(["prompt"], 0, opened.num_rows, 65_536):
        assert batch.nbytes < parquet.BATCH_BYTES + length
        assert pa.total_allocated_bytes() - before < 10 * parquet.BATCH_BYTES
    assert len(opened.rows(rows - 1, rows, 0)) == 1


def test_what_arrow_does_not_support_is_not_called_damaged(tmp_path: Path) -> None:
    """The file or column is named, with what to convert it to."""
    with pytest.raises(ManifestError, match=r"polars_int128\.parquet cannot be read because column 'big' has integers"):
        Manifest.open(str(WRITTEN / "unread" / "polars_int128.parquet"))
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "label": ["b"]}), path, compression="gzip")
    data = path.read_bytes()
    assert data.count(b"\x05label\x15\x04") == 1
    path.write_bytes(data.replace(b"\x05label\x15\x04", b"\x05label\x15\x06"))  # LZO in place of gzip
    with pytest.raises(ManifestError, match=r"column 'label' of .*m\.parquet cannot be read because .*; convert it"):
        Manifest.open(str(path)).rows(0, 1, 0)
