"""Write the manifests in tests/data/manifests: the same four rows by each of the tools that people write Parquet with.

They are kept in the repository, so that the tests need none of these tools. Versions that wrote them are in
tests/data/manifests/README.md. Run it with pyarrow, pandas, polars, duckdb, fastparquet, datasets and Pillow installed.
"""

import importlib.metadata
import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import duckdb
import fastparquet
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FOLDER = Path(__file__).parent / "manifests"
ROWS: dict[str, list[Any]] = {
    "sample_id": ["a-0", "a-1", "a-2", "a-3"],
    "prompt": ["a red disc", "a blue star on sand", "two rings", "green waves, soft"],
    "reference": ["red.png", "red.png", None, "red.png"],
    "seed": [7, None, 9, 10],
    "note": ["x", "y", None, "é"],
}


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def with_datasets(name: str, feature: Any, references: list[Any]) -> None:
    kinds = {"sample_id": "string", "prompt": "string", "seed": "int64", "note": "string"}
    features = datasets.Features({key: datasets.Value(kind) for key, kind in kinds.items()} | {"reference": feature})
    made = datasets.Dataset.from_dict(ROWS | {"reference": references}, features)
    made.to_parquet(FOLDER / f"{name}.parquet")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / "red.png").write_bytes(picture())
    rows = pa.table(ROWS)
    pq.write_table(rows, FOLDER / "pyarrow.parquet")
    for version in ("v1", "v2"):
        target = FOLDER / f"duckdb_{version}.parquet"
        duckdb.sql(f"COPY (SELECT * FROM rows) TO '{target}' (FORMAT parquet, PARQUET_VERSION {version})")
    pl.DataFrame(ROWS).write_parquet(FOLDER / "polars.parquet")
    frame = pd.DataFrame(ROWS).astype({"seed": "Int64"})
    frame.to_parquet(FOLDER / "pandas.parquet")
    fastparquet.write(str(FOLDER / "fastparquet.parquet"), frame)
    image = {"bytes": picture(), "path": "red.png"}
    embedded = [None if each is None else image for each in ROWS["reference"]]
    with_datasets("datasets_bytes", datasets.Image(), embedded)
    with_datasets("datasets_path", datasets.Value("string"), ROWS["reference"])
    with_datasets("datasets_list", datasets.List(datasets.Image()), [each and [each] for each in embedded])
    with_datasets("datasets_no_decode", datasets.Image(decode=False), embedded)
    spark = FOLDER / "spark"
    spark.mkdir()
    for number in range(2):
        name = f"part-{number:05d}-5f8e3ee6-5432-4fc6-adab-f7b463d062a6-c000.snappy.parquet"
        pq.write_table(rows.slice(2 * number, 2), spark / name, compression="snappy")
        (spark / f".{name}.crc").write_bytes(b"crc\0\0\0\2\0\0\0\0\0")
    (spark / "red.png").write_bytes(picture())
    (spark / "_SUCCESS").touch()
    (spark / "._SUCCESS.crc").write_bytes(b"crc\0\0\0\2\0")
    wide = pl.DataFrame({"prompt": ["a red disc"], "big": [1]}).with_columns(pl.col("big").cast(pl.Int128))
    (FOLDER / "unread").mkdir()
    wide.write_parquet(FOLDER / "unread" / "polars_int128.parquet")
    tools = ("pyarrow", "pandas", "polars", "duckdb", "fastparquet", "datasets")
    versions = ", ".join(f"{tool} {importlib.metadata.version(tool)}" for tool in tools)
    (FOLDER / "README.md").write_text(
        f"Manifests of the same four rows, written by `tests/data/write_manifests.py` with {versions}.\n"
        "`spark/` has the names that Spark gives, and pyarrow's contents. `unread/` has what pyarrow cannot read.\n"
    )


if __name__ == "__main__":
    main()
