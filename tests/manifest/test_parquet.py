"""Parquet in bounded memory, and without a crash, whatever its footer says."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import ManifestError
from vcf_batch.manifest import contract, parquet
from vcf_batch.manifest.manifest import Manifest


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
